"""Let a proven digest out: from staging to release, byte for byte, tags last.

The order is the promise (6): evidence and verdict lie in the release repository, read back, before the
first tag names the digest. Killed between any two steps, no tag names anything unproven, and the same
command goes on: every step is a no-op where it was done.
"""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NoReturn

from filelock import FileLock, Timeout

from mtbuild.errors import InfrastructureError, InputError, MtbuildError
from mtbuild.plan.cell import Finding
from mtbuild.prove.report import required_checks
from mtbuild.publish import catalog, evidence, vsa
from mtbuild.publish.dsse import UnverifiedError
from mtbuild.publish.gpus import floors
from mtbuild.publish.policy import Policy, judge
from mtbuild.publish.referrers import attach, attached
from mtbuild.publish.registry import Repository, check_tag, repository_name
from mtbuild.publish.transport import Transport
from mtbuild.publish.vsa import Image, Summary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from mtbuild.digest import Digest, Reference
    from mtbuild.paths import Paths
    from mtbuild.plan.cell import Cell
    from mtbuild.prove.report import Tier
    from mtbuild.publish.dsse import Envelope
    from mtbuild.publish.evidence import BuildRecord, Statement
    from mtbuild.publish.keys import Keys
    from mtbuild.publish.policy import Channel, Verdict
    from mtbuild.publish.registry import Manifest

__all__ = [
    "Promotion",
    "RefusedError",
    "TagTakenError",
    "policy_for",
    "publish",
    "release_lock",
    "release_tag",
]

_LOCK_S = 600
OVERRIDE_LABEL = "mtbuild.override"  # `mtbuild build --override-compat REASON` sets it


class RefusedError(MtbuildError):
    """Raised when the policy says no; `verdict` says why, finding by finding."""

    def __init__(self, verdict: Verdict) -> None:
        lines = [f"  - {f.message}\n    because: {f.source}\n    fix: {f.fix}" for f in verdict.findings]
        msg = f"{verdict.digest} is not {verdict.policy.channel}:\n" + "\n".join(lines)
        super().__init__(msg)
        self.verdict = verdict


class TagTakenError(InputError):
    """Raised when a write-once tag names another digest already."""


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """What is out now: `tags` with the write-once tag first. `changed` is False where all of it was there."""

    repository: str
    digest: Digest
    tags: tuple[str, ...]
    channel: Channel
    verdict: Verdict
    changed: bool

    @property
    def name(self) -> str:
        """`repo:tag@sha256:…`, what `pick` prints."""
        return f"{self.repository}:{self.tags[0]}@{self.digest}"


def release_tag(cell_id: str, build_id: str, channel: Channel) -> str:
    """The write-once tag: `<id>-<build12>`, and `-checked` behind it where no GPU vouches."""
    return check_tag(f"{cell_id}-{build_id[:12]}" + ("-checked" if channel == "checked" else ""))


def policy_for(cell: Cell, build: BuildRecord, *, channel: Channel, keys: Keys, max_age_days: int) -> Policy:
    """What a channel demands of this build, by the suite of this tree."""
    from mtbuild.prove.smoke import suite_digest  # late: it brings the engine's client with it

    runtime = cell.flavour == "runtime-deps"  # as smoke itself expects it
    tier: Tier = "gpu" if channel == "verified" else "cpu"
    return Policy(
        channel=channel,
        cell_id=cell.id,
        build_id=build.build_id,
        required=required_checks(cell, tier, runtime=runtime),
        basic=required_checks(cell, "cpu", runtime=runtime),
        allow_degraded="degraded" in cell.allow,
        max_age_days=max_age_days,
        suite=suite_digest(),
        signers=tuple(sorted(key.hint for key in keys.trusted)),
    )


def release_lock(paths: Paths, release: str) -> FileLock:
    """The lock that one machine's publishers of a repository share."""
    folder = paths.state / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / (re.sub(r"[^A-Za-z0-9._-]+", "_", release) + ".lock"), timeout=_LOCK_S)


def publish(
    ref: Reference,
    *,
    cell: Cell,
    build: BuildRecord,
    envelopes: Sequence[Envelope],
    release: str,
    channel: Channel,
    paths: Paths,
    keys: Keys,
    note: Callable[[str], None] = lambda _: None,
    aliases: Sequence[str] = (),
    max_age_days: int = 90,
    policy: Policy | None = None,
    now: datetime | None = None,
    withhold: str = "",
) -> Promotion:
    """Judge a staged digest by its evidence and let it out into `release` (`HOST/REPOSITORY`).

    `aliases` are moved only in channel `verified`, beside `<id>` and `<name>`. `policy` is what the channel
    demands by this tree (`policy_for`) unless another is given. `withhold` says why nothing may come out
    whatever the policy says: then only the evidence is attached. Raises RefusedError where
    the policy says no (the evidence is attached all the same: failures count), TagTakenError where the
    write-once tag names another digest, InfrastructureError where a registry fails.
    """
    moment = (now or datetime.now(UTC)).replace(microsecond=0)
    tag = release_tag(cell.id, build.build_id, channel)
    moving = _aliases(cell, channel, aliases)
    policy = policy or policy_for(cell, build, channel=channel, keys=keys, max_age_days=max_age_days)
    _check_inputs(ref, cell, build, release, policy)
    with ExitStack() as stack:
        near = stack.enter_context(Transport(ref.host))
        staging = Repository(near, ref.path)
        far = repository_name(release)
        # One registry, one transport: blobs are then mounted, not copied.
        there = near if far.host == ref.host else stack.enter_context(Transport(far.host))
        target = Repository(there, far.path)
        try:
            stack.enter_context(release_lock(paths, target.name))
        except Timeout as error:
            msg = f"another publication to {target.name} has held its lock for {_LOCK_S} s"
            raise InfrastructureError(
                msg, fix="wait for it to end, then run the same command again"
            ) from error
        return _publish(
            _Job(
                staging=staging,
                target=target,
                digest=ref.digest,
                cell=cell,
                build=build,
                policy=policy,
                tag=tag,
                aliases=moving,
                paths=paths,
                keys=keys,
                now=moment,
                withhold=withhold,
                note=note,
            ),
            envelopes,
        )


@dataclass(frozen=True, kw_only=True)
class _Job:
    staging: Repository
    target: Repository
    digest: Digest
    cell: Cell
    build: BuildRecord
    policy: Policy
    tag: str
    aliases: tuple[str, ...]
    paths: Paths
    keys: Keys
    now: datetime
    withhold: str
    note: Callable[[str], None]


def _check_inputs(ref: Reference, cell: Cell, build: BuildRecord, release: str, policy: Policy) -> None:
    if build.override is not None:
        _refuse_forced(build.override)
    if build.ref.digest != ref.digest or build.cell_id != cell.id:
        msg = (
            f"the build record is about {build.ref.digest} of {build.cell_id}, not {ref.digest} of {cell.id}"
        )
        raise InputError(msg, fix="name the build record of this digest (--build FILE)")
    if policy.cell_id != cell.id or policy.build_id != build.build_id:
        msg = f"the policy is for build {policy.build_id[:12]} of {policy.cell_id}"
        raise InputError(msg, fix="make the policy for this cell and build")
    if release == ref.repository:
        msg = f"staging and release are the same repository, {release}"
        raise InputError(msg, fix="set registry.release in matrix.yaml to another one")


def _aliases(cell: Cell, channel: Channel, wanted: Sequence[str]) -> tuple[str, ...]:
    names = (f"{cell.id}-checked",) if channel == "checked" else (cell.id, cell.name, *wanted)
    for name in names:
        if check_tag(name) == catalog.TAG or name.startswith("sha256-"):
            msg = f"{name!r} can't be an alias: the release repository uses it itself"
            raise InputError(msg, where="matrix.yaml: aliases", fix="choose another name")
    return tuple(dict.fromkeys(names))


def _publish(job: _Job, envelopes: Sequence[Envelope]) -> Promotion:
    manifest = job.staging.manifest(job.digest)
    _check_label(job, manifest)
    _is_tagged(job)
    staged = attached(job.staging, job.digest, note=job.note)
    released = attached(job.target, job.digest, note=job.note)
    known = {envelope.digest: envelope for envelope in (*envelopes, *staged, *released)}
    tests = {d: e for d, e in known.items() if evidence.predicate_type(e) == evidence.TEST_RESULT}
    statements = tuple(_believed(job, tests.values()))
    verdict = judge(job.digest, statements, job.policy, now=job.now)
    counted = [e for d, e in sorted(tests.items()) if any(s.envelope == d for s in statements)]
    for envelope in counted:
        if envelope not in staged:
            attach(job.staging, manifest, envelope)
    fresh = [envelope for envelope in counted if envelope not in released]
    if verdict.passed and job.withhold:
        verdict = _withheld(verdict, job.withhold)
    if not verdict.passed:
        _record_refusal(job, manifest, fresh, verdict)
        raise RefusedError(verdict)
    job.note(f"{job.digest} is {job.policy.channel} by {len(verdict.used)} run(s)")
    changed = _copy(job, manifest) or bool(fresh)
    for envelope in fresh:
        attach(job.target, manifest, envelope)
    changed |= _attach_verdict(job, manifest, verdict, statements)
    _read_back(job)
    if not _is_tagged(job):  # again: copying took its time, and another machine holds another lock
        job.note(f"tag {job.target.name}:{job.tag}")
        job.target.put_manifest(manifest, tag=job.tag)
        changed = True
    moved, now_named = _move_aliases(job, manifest)
    changed |= moved
    changed |= catalog.update(job.target, job.digest, job.keys, note=job.note)
    _write_verdict(job, verdict)
    return Promotion(
        repository=job.target.name,
        digest=job.digest,
        tags=(job.tag, *now_named),
        channel=job.policy.channel,
        verdict=verdict,
        changed=changed,
    )


def _is_tagged(job: _Job) -> bool:
    """Whether the write-once tag is there already; TagTakenError if it names another digest."""
    taken = job.target.find_manifest(job.tag)
    if taken is not None and taken.digest != job.digest:
        msg = f"{job.target.name}:{job.tag} is write-once and names {taken.digest}, not {job.digest}"
        raise TagTakenError(msg, fix="two builds gave one build id: remove nothing, rebuild to get a new one")
    return taken is not None


def _withheld(verdict: Verdict, why: str) -> Verdict:
    """A yes by other runs, or by fewer checks than the newest run had to pass, made a no."""
    finding = Finding(
        rule="withheld",
        severity="refused",
        message=f"it is not let out from here: {why}",
        source="the smoke run that has just ended on this host",
        fix="repair the cell or this host and smoke again",
    )
    return replace(verdict, passed=False, findings=(finding,), used=(), degraded=())


def _check_label(job: _Job, manifest: Manifest) -> None:
    """An image can't vouch for itself, but it can give itself away: forced builds carry a label."""
    if manifest.is_index:
        return
    try:
        config = json.loads(job.staging.blob(manifest.blobs[0].digest))
        labels = (config.get("config") or {}).get("Labels") or {}
        reason = labels.get(OVERRIDE_LABEL)
    except (ValueError, AttributeError) as error:
        msg = f"the config of {job.digest} is not an image's: {error}"
        raise InputError(msg, fix="publish the digest that `mtbuild build` printed") from error
    if reason is not None:
        _refuse_forced(str(reason))


def _refuse_forced(reason: str) -> NoReturn:
    msg = f"this build was forced past the compatibility rules ({reason}); it is for study only"
    fix = "choose versions that fit (`mtbuild suggest`) and build them without --override-compat"
    raise MtbuildError(msg, fix=fix)


def _believed(job: _Job, envelopes: Iterable[Envelope]) -> Iterator[Statement]:
    for envelope in envelopes:
        try:
            yield evidence.verify(envelope, job.keys.trusted, where=f"evidence {envelope.digest.short}")
        except UnverifiedError as error:
            job.note(f"does not count: {error}")


def _record_refusal(job: _Job, manifest: Manifest, fresh: Sequence[Envelope], verdict: Verdict) -> None:
    """Keep a failure where the next one looks: with the digest, also where it is released already."""
    if job.target.find_manifest(job.digest) is not None:
        for envelope in fresh:
            attach(job.target, manifest, envelope)
        catalog.update(job.target, job.digest, job.keys, note=job.note)
    _write_verdict(job, verdict)


def _copy(job: _Job, manifest: Manifest) -> bool:
    """Blobs, then the manifest's own bytes, by digest only: nothing names it yet."""
    if job.target.find_manifest(manifest.digest) is not None:
        return False
    for child in manifest.children:
        _copy(job, job.staging.manifest(child.digest))
    for blob in manifest.blobs:
        job.note(f"copying {blob.digest.short} ({blob.size / 1e6:,.1f} MB)")
        job.target.copy_blob(job.staging, blob)
    job.target.put_manifest(manifest)
    return True


def _attach_verdict(job: _Job, manifest: Manifest, verdict: Verdict, statements: Sequence[Statement]) -> bool:
    """Sign the verdict, bound to the release repository; one that says the same already stands."""
    summary = Summary(
        subject=job.digest,
        repository=job.target.name,
        policy=job.policy,
        verified_at=verdict.at,
        inputs=verdict.used,
        image=_image(job, verdict, manifest, statements),
    )
    _, standing = catalog.proof_of(job.target, job.digest, job.keys.trusted)
    for held in standing:
        if (held.policy, held.inputs, held.image) == (summary.policy, summary.inputs, summary.image):
            return False
    attach(job.target, manifest, vsa.sign(summary, job.keys.own))
    return True


def _image(job: _Job, verdict: Verdict, manifest: Manifest, statements: Sequence[Statement]) -> Image:
    cell, build = job.cell, job.build
    # For which CUDA xFormers was compiled is the image's word; it can only raise the driver floor.
    told = {
        s.report.image_facts.get("suite.xformers.built_for_cuda")
        for s in statements
        if s.envelope in verdict.used
    }
    built = sorted(f"{code // 100}.{code % 100}" for code in told if isinstance(code, int))
    return Image(
        cell_id=cell.id,
        cell_name=cell.name,
        build_id=build.build_id,
        tag=job.tag,
        flavour=cell.flavour,
        platform=cell.platform,
        python=cell.python,
        torch=cell.torch,
        cuda=cell.cuda,
        triton=cell.triton,
        xformers=cell.xformers,
        targets=cell.targets,
        floors=floors(
            torch=cell.torch,
            cuda=cell.cuda,
            triton=cell.triton,
            extensions=tuple((f"xformers {cell.xformers}", cuda) for cuda in built),
        ),
        degraded=verdict.degraded,
        size_bytes=sum(blob.size for blob in manifest.blobs),
        created=build.created,
    )


def _read_back(job: _Job) -> None:
    """The last look before a tag: what lies in the release repository is enough for a stranger to say yes."""
    job.target.manifest(job.digest)
    statements, summaries = catalog.proof_of(job.target, job.digest, job.keys.trusted)
    again = judge(job.digest, statements, job.policy, now=job.now)
    if not again.passed or not any(s.image.tag == job.tag for s in summaries):
        msg = f"{job.target.name} does not hold the evidence that was just attached to {job.digest}"
        raise InfrastructureError(msg, fix="nothing was tagged; run the same command again")


def _move_aliases(job: _Job, manifest: Manifest) -> tuple[bool, tuple[str, ...]]:
    """Point the aliases here, unless one names a newer build of this cell; all of them or none."""
    before: dict[str, Manifest | None] = {}
    named: list[str] = []
    try:
        for alias in job.aliases:
            current = job.target.find_manifest(alias)
            if current is not None and current.digest == job.digest:
                named.append(alias)
            elif current is not None and _is_newer(job, current.digest):
                job.note(f"alias {alias} stays: it names a newer build, {current.digest}")
            else:
                before[alias] = current
                job.note(f"alias {job.target.name}:{alias}")
                job.target.put_manifest(manifest, tag=alias)
                named.append(alias)
    except BaseException:
        for alias, held in before.items():
            if held is not None:
                _put_back(job, alias, held)
        raise
    return bool(before), tuple(named)


def _put_back(job: _Job, alias: str, held: Manifest) -> None:
    try:
        job.target.put_manifest(held, tag=alias)
    except MtbuildError as error:  # what stopped the move is what is told; both digests are proven
        job.note(f"alias {alias} could not be moved back to {held.digest}: {error.message}")


def _is_newer(job: _Job, digest: Digest) -> bool:
    _, summaries = catalog.proof_of(job.target, digest, job.keys.trusted)
    return any(s.image.cell_id == job.cell.id and s.image.created > job.build.created for s in summaries)


def _write_verdict(job: _Job, verdict: Verdict) -> None:
    folder = job.paths.cell(job.cell.id, job.build.build_id[:12])
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "verdict.json.part"
    part.write_text(json.dumps(verdict.to_json(), indent=2) + "\n", encoding="utf-8")
    part.replace(folder / "verdict.json")
