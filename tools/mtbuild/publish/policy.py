"""The gate: may this digest be public? A pure function of the digest, signed statements, a policy and a time.

Fails closed. Evidence that is absent, unsigned, expired, about another digest, cell or build, or made by
another suite does not count; a skipped or missing required check is no pass; a build that was forced past
the compatibility rules is never let out, whatever else is known of it (promises 1, 4 and 5).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, cast

from mtbuild.digest import Digest
from mtbuild.plan.cell import Finding

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mtbuild.publish.evidence import Statement

__all__ = ["POLICY", "Channel", "Policy", "Verdict", "judge"]

Channel = Literal["verified", "checked"]
POLICY = "tag:mtbuild,2026:policy/v1"  # names what `judge` does; a change of its rules is a new name

_SKEW = timedelta(minutes=10)  # clocks of two hosts
_BAD = ("failed", "error", "timeout")


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a channel demands of one cell's image.

    `required` must pass in one and the same run; `basic` (the checks that need no GPU) may fail in no
    group's newest run. `suite` is the only suite whose results count, `signers` the hints of the keys.
    """

    channel: Channel
    cell_id: str
    build_id: str
    required: tuple[str, ...]
    basic: tuple[str, ...]
    allow_degraded: bool
    max_age_days: int
    suite: Digest
    signers: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "uri": POLICY,
            "channel": self.channel,
            "cell": self.cell_id,
            "build": self.build_id,
            "required": list(self.required),
            "basic": list(self.basic),
            "allow_degraded": self.allow_degraded,
            "max_age_days": self.max_age_days,
            "suite": str(self.suite),
            "signers": sorted(self.signers),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Policy:
        """From such a document; ValueError if it is another policy's."""
        if data["uri"] != POLICY:
            msg = f"policy {data['uri']!r} is not {POLICY!r}"
            raise ValueError(msg)
        return cls(
            channel=cast("Channel", data["channel"]),
            cell_id=data["cell"],
            build_id=data["build"],
            required=tuple(data["required"]),
            basic=tuple(data["basic"]),
            allow_degraded=bool(data["allow_degraded"]),
            max_age_days=int(data["max_age_days"]),
            suite=Digest.parse(data["suite"]),
            signers=tuple(data["signers"]),
        )

    @property
    def digest(self) -> Digest:
        """Of its canonical JSON: what a verdict says it was made by."""
        return Digest.of(json.dumps(self.to_json(), sort_keys=True, separators=(",", ":")).encode())


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Yes or no for one digest and channel. `findings` say why not; `used` are the envelopes that counted."""

    digest: Digest
    policy: Policy
    passed: bool
    findings: tuple[Finding, ...]
    used: tuple[Digest, ...]
    degraded: tuple[str, ...]
    at: str

    def to_json(self) -> dict[str, Any]:
        """State file `verdict.json`."""
        return {
            "schema": 1,
            "digest": str(self.digest),
            "channel": self.policy.channel,
            "passed": self.passed,
            "at": self.at,
            "policy": self.policy.to_json(),
            "policy_digest": str(self.policy.digest),
            "findings": [dict(vars(finding)) for finding in self.findings],
            "evidence": [str(digest) for digest in self.used],
            "degraded": list(self.degraded),
        }


def judge(digest: Digest, statements: Iterable[Statement], policy: Policy, *, now: datetime) -> Verdict:
    """Whether `statements` let `digest` into the policy's channel at the time `now` (aware)."""
    findings: list[Finding] = []
    counting: list[Statement] = []
    for statement in sorted(statements, key=lambda s: (str(s.envelope), repr(s))):  # any order, one answer
        why = _does_not_count(digest, statement, policy, now)
        if why is None:
            counting.append(statement)
        else:
            findings.append(why)
    newest = _newest(counting)
    hard = [finding for finding in findings if finding.rule == "override"]
    hard += [finding for statement in newest for finding in _contradictions(statement, policy)]
    proofs = [statement for statement in newest if not _short_of(statement, policy)]
    passed = bool(proofs) and not hard
    if passed:
        reasons: list[Finding] = []
    elif proofs:
        reasons = hard
    else:
        said = {_about(finding) for finding in hard}  # each check and user once, with its diagnosis
        short = [f for s in newest for f in _short_of(s, policy) if _about(f) not in said]
        reasons = list(dict.fromkeys([*hard, *findings, *short])) or [_absent(digest, policy)]
    return Verdict(
        digest=digest,
        policy=policy,
        passed=passed,
        findings=tuple(reasons),
        used=tuple(s.envelope for s in newest if s.envelope is not None) if passed else (),
        degraded=tuple(sorted({name for s in proofs for name in s.tests("degraded")})) if passed else (),
        at=_text(now),
    )


def _does_not_count(digest: Digest, statement: Statement, policy: Policy, now: datetime) -> Finding | None:
    """Why a statement is no evidence for this digest under this policy; None if it is."""
    report = statement.report
    run = f"the run of {report.finished}"
    again = "smoke the digest again, then publish"
    if statement.subject != digest or report.digest != digest:
        other = statement.subject if statement.subject != digest else report.digest
        return _no("other-digest", f"{run} is about {other}", f"publish asked for {digest}", again)
    if not statement.signer or statement.signer not in policy.signers or statement.envelope is None:
        signer = statement.signer or "nobody"
        fix = "put the signer's public key under .mtbuild/keys/, if you believe it; else smoke again"
        return _no("unsigned", f"{run} is signed by {signer}", f"believed: {', '.join(policy.signers)}", fix)
    if statement.override is not None:
        fix = "choose versions that fit (`mtbuild suggest`) and build again without --override-compat"
        said = f"override: {statement.override}"
        return _no("override", "the build was forced past the compatibility rules", said, fix)
    if report.cell_id != policy.cell_id:
        return _no("other-cell", f"{run} tested it as {report.cell_id}", f"cell {policy.cell_id}", again)
    if statement.build_id is not None and statement.build_id != policy.build_id:
        return _no(
            "other-build",
            f"{run} names build {statement.build_id[:12]}",
            f"build {policy.build_id[:12]}",
            again,
        )
    if report.suite != policy.suite:
        return _no("other-suite", f"{run} used suite {report.suite}", f"the suite is {policy.suite}", again)
    finished = _time(report.finished)
    if finished is None or finished > now + _SKEW:
        return _no("expired", f"{run} ended in the future", f"now is {_text(now)}", "set the hosts' clocks")
    if now - finished > timedelta(days=policy.max_age_days):
        limit = f"policy.max_age_days: {policy.max_age_days}"
        return _no("expired", f"{run} is {(now - finished).days} days old", limit, again)
    if report.tier == "gpu" and statement.device is None:
        said = "a GPU run needs gpu.name, .sm, .driver and .held_bytes observed by the host"
        return _no(
            "not-observed", f"{run} says gpu, but its host saw none in use", said, "smoke it on a GPU host"
        )
    if report.host_facts.get("digest") != str(digest):
        said = f"host fact digest: {report.host_facts.get('digest')}"
        return _no("not-observed", f"{run}: the host did not see this digest run", said, again)
    return None


def _newest(statements: Iterable[Statement]) -> tuple[Statement, ...]:
    """Of each tier and GPU model the newest run; of two that ended together, one that failed."""
    newest: dict[tuple[str, str, str], Statement] = {}
    for statement in statements:
        device = statement.device
        group = (statement.report.tier, device.name if device else "", device.sm if device else "")
        held = newest.get(group)
        if held is None or _rank(statement) > _rank(held):
            newest[group] = statement
    return tuple(newest[group] for group in sorted(newest))


def _rank(statement: Statement) -> tuple[datetime, bool, str]:
    finished = _time(statement.report.finished)
    assert finished is not None  # `_does_not_count` has seen to it
    return (finished, not statement.report.passed(), str(statement.envelope))


def _contradictions(statement: Statement, policy: Policy) -> list[Finding]:
    """Checks that need no GPU and failed in this run: no other run's pass outweighs them."""
    return [
        _no(
            "failed",
            f"{result.check} (as {result.user}) {result.status} {_on(statement)}: {result.message}",
            result.diagnosis or result.detail[:300] or f"status {result.status}",
            result.fix or "read the report's detail for this check, repair the cell, build and smoke again",
        )
        for result in statement.report.results
        if result.check in policy.basic and result.status in _BAD
    ]


def _short_of(statement: Statement, policy: Policy) -> list[Finding]:
    """What this run lacks to prove the channel by itself."""
    if policy.channel == "verified" and statement.device is None:
        said = "channel verified: a CPU can't vouch for a GPU"
        return [_no("no-gpu", f"the newest run {_on(statement)} used no GPU", said, "smoke it on a GPU host")]
    lines = statement.report.why_not(policy.required, allow_degraded=policy.allow_degraded)
    fix = "repair the cell, build and smoke again; `mtbuild diagnose` names known failures"
    return [
        _no("not-passed", f"{line} {_on(statement)}", f"channel {policy.channel} requires it", fix)
        for line in lines
    ]


def _absent(digest: Digest, policy: Policy) -> Finding:
    tier = " on a GPU host" if policy.channel == "verified" else ""
    return _no(
        "absent", f"there is no evidence for {digest}", f"channel {policy.channel}", f"smoke it{tier} first"
    )


def _about(finding: Finding) -> str:
    """`check (as user`, which both kinds of findings about a check begin with."""
    return finding.message.partition(")")[0]


def _on(statement: Statement) -> str:
    device = statement.device
    return f"on {device.name}" if device else "on a CPU"


def _no(rule: str, message: str, source: str, fix: str) -> Finding:
    return Finding(rule=rule, severity="refused", message=message, source=source, fix=fix)


def _time(text: str) -> datetime | None:
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except ValueError:
        return None


def _text(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
