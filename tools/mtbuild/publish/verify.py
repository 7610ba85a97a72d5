"""Is this published image what it claims to be? Numbered steps, each with what was seen.

Everything is judged again from what the registry serves and the keys that the caller believes; neither the
catalog's word nor a tag is taken for anything.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from mtbuild.digest import Digest, Reference
from mtbuild.errors import InputError
from mtbuild.publish import catalog
from mtbuild.publish.dsse import UnverifiedError
from mtbuild.publish.policy import judge
from mtbuild.publish.registry import check_tag

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mtbuild.publish.evidence import Statement
    from mtbuild.publish.keys import PublicKey
    from mtbuild.publish.registry import Repository
    from mtbuild.publish.vsa import Summary

__all__ = ["Name", "Step", "parse_name", "verify"]


@dataclass(frozen=True, kw_only=True)
class Name:
    """`repo[:tag]@sha256:…`, as `pick` prints it."""

    reference: Reference
    tag: str | None


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a verification. `seen` is what was found; `fix` what to do where `passed` is False."""

    name: str
    passed: bool
    seen: str
    fix: str = ""

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def parse_name(text: str) -> Name:
    """From `HOST[:PORT]/REPOSITORY[:TAG]@sha256:…`; InputError without a digest: a tag proves nothing."""
    front, at, digest = text.partition("@")
    tag = None
    match = re.fullmatch(r"(.+/[^:/]+):([^/:]+)", front)
    if at and match:
        front, tag = match[1], check_tag(match[2])
    return Name(reference=Reference.parse(f"{front}@{digest}" if at else text), tag=tag)


def verify(
    repository: Repository, name: Name, keys: Sequence[PublicKey], *, now: datetime | None = None
) -> tuple[Step, ...]:
    """All steps up to the first that can't go on; the image is verified if every one passed."""
    digest = name.reference.digest
    moment = now or datetime.now(UTC)
    steps: list[Step] = []
    manifest = repository.find_manifest(digest)
    steps.append(
        Step(
            name="the digest is served, with exactly its bytes",
            passed=manifest is not None,
            seen=f"{len(manifest.body)} bytes of {manifest.media_type}"
            if manifest
            else "not in the registry",
            fix="" if manifest else "check the repository and the digest",
        )
    )
    if manifest is None:
        return tuple(steps)
    if name.tag is not None:
        steps.append(_tag_step(repository, name.tag, digest))
    unsound: list[str] = []
    statements, summaries = catalog.proof_of(repository, digest, keys, note=unsound.append)
    steps.append(
        Step(
            name="signed evidence is attached",
            passed=bool(statements),
            seen=f"{len(statements)} test result(s) signed by a key you believe"
            + "".join(f"; left out: {line.splitlines()[0]}" for line in unsound),
            fix="" if statements else "name the publisher's key with --key; else don't run this image",
        )
    )
    summary = _summary(summaries, name.tag)
    steps.append(
        Step(
            name="a signed verdict binds digest, repository and policy",
            passed=summary is not None,
            seen=_words(summary) if summary else f"none for {repository.name}",
            fix="" if summary else "it was not let out here; ask the publisher, don't run it",
        )
    )
    if summary is not None:
        steps += _judged(digest, summary, statements, moment)
    steps.append(_catalog_step(repository, digest, keys))
    return tuple(steps)


def _tag_step(repository: Repository, tag: str, digest: Digest) -> Step:
    tagged = repository.find_manifest(tag)
    return Step(
        name=f"tag {tag} names this digest",
        passed=tagged is not None and tagged.digest == digest,
        seen=str(tagged.digest) if tagged is not None else "there is no such tag",
        fix=""
        if tagged is not None and tagged.digest == digest
        else "go by the digest; `mtbuild pick` again",
    )


def _summary(summaries: Sequence[Summary], tag: str | None) -> Summary | None:
    """The newest verdict: of the named tag where that is write-once, of its channel where an alias."""
    wanted = [summary for summary in summaries if summary.image.tag == tag]
    if not wanted:
        wanted = [summary for summary in summaries if tag is None or _moves(tag, summary)]
    return max(wanted, key=lambda s: (s.verified_at, str(s.envelope)), default=None)


def _moves(alias: str, summary: Summary) -> bool:
    """Whether the verdict's channel has this alias: what a CPU proves does not stand for a verified one."""
    checked = alias == f"{summary.image.cell_id}-checked"
    return summary.policy.channel == ("checked" if checked else "verified")


def _words(summary: Summary) -> str:
    return (
        f"{summary.policy.channel} on {summary.verified_at} by policy {summary.policy.digest.short} "
        f"from {len(summary.inputs)} run(s), for {summary.image.tag}"
    )


def _judged(digest: Digest, summary: Summary, statements: Sequence[Statement], now: datetime) -> list[Step]:
    """The verdict drawn again: as of then from what it named, and as of now from all there is."""
    then = datetime.strptime(summary.verified_at, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    named = [statement for statement in statements if statement.envelope in summary.inputs]
    missing = len(set(summary.inputs)) - len({statement.envelope for statement in named})
    first = judge(digest, named, summary.policy, now=then)
    again = "; ".join(finding.message for finding in first.findings) or "the same verdict"
    steps = [
        Step(
            name="the evidence gives that verdict when judged again",
            passed=first.passed and not missing,
            seen=again
            if not missing
            else f"{missing} of the runs it rests on are not attached (or unsigned)",
            fix="" if first.passed and not missing else "don't run it; ask the publisher to publish again",
        )
    ]
    today = judge(digest, statements, summary.policy, now=now)
    steps.append(
        Step(
            name="it still holds today",
            passed=today.passed,
            seen="; ".join(finding.message for finding in today.findings)
            or f"until {today.expires} ({summary.policy.max_age_days} days after the newest proof)",
            fix="" if today.passed else "smoke it again and publish that evidence, or pick another image",
        )
    )
    return steps


def _catalog_step(repository: Repository, digest: Digest, keys: Sequence[PublicKey]) -> Step:
    name = "the signed catalog lists it"
    try:
        listed = catalog.read(repository, keys)
    except (UnverifiedError, InputError) as error:
        fix = error.fix or "`mtbuild catalog rebuild`"
        return Step(name=name, passed=False, seen=error.message, fix=fix)
    tags = [entry.image.tag for entry in listed.entries if entry.digest == digest] if listed else []
    return Step(
        name=name,
        passed=bool(tags),
        seen=", ".join(tags) or ("not listed" if listed else "there is no catalog"),
        fix="" if tags else "ask the publisher for `mtbuild catalog rebuild`",
    )
