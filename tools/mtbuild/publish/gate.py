"""What stands at the gate: the policy for a build, whose evidence is believed, and how a no is told."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

from mtbuild.errors import InputError, MtbuildError
from mtbuild.plan.cell import Finding
from mtbuild.prove.report import required_checks
from mtbuild.publish import evidence
from mtbuild.publish.dsse import UnverifiedError
from mtbuild.publish.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mtbuild.plan.cell import Cell
    from mtbuild.prove.report import Tier
    from mtbuild.publish.dsse import Envelope
    from mtbuild.publish.evidence import BuildRecord, Statement
    from mtbuild.publish.job import Job
    from mtbuild.publish.keys import Keys
    from mtbuild.publish.policy import Channel, Verdict
    from mtbuild.publish.registry import Manifest

__all__ = ["RefusedError", "believed", "check_label", "policy_for", "refuse_forced", "withheld"]

OVERRIDE_LABEL = "mtbuild.override"  # `mtbuild build --override-compat REASON` sets it


class RefusedError(MtbuildError):
    """Raised when the policy says no; `verdict` says why, finding by finding."""

    def __init__(self, verdict: Verdict) -> None:
        lines = [f"  - {f.message}\n    because: {f.source}\n    fix: {f.fix}" for f in verdict.findings]
        msg = f"{verdict.digest} is not {verdict.policy.channel}:\n" + "\n".join(lines)
        super().__init__(msg)
        self.verdict = verdict


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


def withheld(verdict: Verdict, why: str) -> Verdict:
    """A yes by other runs, or by fewer checks than the newest run had to pass, made a no."""
    finding = Finding(
        rule="withheld",
        severity="refused",
        message=f"it is not let out from here: {why}",
        source="the smoke run that has just ended on this host",
        fix="repair the cell or this host and smoke again",
    )
    return replace(verdict, passed=False, findings=(finding,), used=(), degraded=())


def check_label(job: Job, manifest: Manifest) -> None:
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
        refuse_forced(str(reason))


def refuse_forced(reason: str) -> NoReturn:
    """Raise MtbuildError: a build that was forced past the rules stays in."""
    msg = f"this build was forced past the compatibility rules ({reason}); it is for study only"
    fix = "choose versions that fit (`mtbuild suggest`) and build them without --override-compat"
    raise MtbuildError(msg, fix=fix)


def believed(job: Job, envelopes: Iterable[Envelope]) -> Iterator[Statement]:
    """The statements that a believed key signed; the others are noted."""
    for envelope in envelopes:
        try:
            yield evidence.verify(envelope, job.keys.trusted, where=f"evidence {envelope.digest.short}")
        except UnverifiedError as error:
            job.note(f"does not count: {error}")
