"""The gate: may this digest be public? A pure function of the digest, signed statements, a policy and a time.

Fails closed. Evidence that is absent, unsigned, expired, about another digest, cell or build, made by another
suite or in a container that was not shut in proves nothing; a skipped or missing required check is no pass; a
build that was forced past the compatibility rules is never let out, whatever else is known of it (promises 1,
4 and 5). On each GPU model, and on CPUs, the newest run decides. A pass wears off with age; a failure never
does, and one that another suite found counts as well (docs/decisions/0004).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, cast

from mtbuild.digest import Digest
from mtbuild.plan.cell import Finding
from mtbuild.publish.isolation import open_doors

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mtbuild.publish.evidence import Statement

__all__ = ["POLICY", "Channel", "Policy", "Standing", "Verdict", "end_of", "judge", "standing"]

Channel = Literal["verified", "checked"]
# Names what `judge` does; a demand more is a new name. By v1, containers' settings were recorded, not judged.
POLICY = "tag:mtbuild,2026:policy/v2"
_POLICY_1 = "tag:mtbuild,2026:policy/v1"

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
    uri: str = POLICY

    def to_json(self) -> dict[str, Any]:
        return {
            "uri": self.uri,
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
        """From such a document, of this policy or of v1; ValueError if it is another policy's."""
        if data["uri"] not in (POLICY, _POLICY_1):
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
            uri=data["uri"],
        )

    @property
    def digest(self) -> Digest:
        """Of its canonical JSON: what a verdict says it was made by."""
        return Digest.of(json.dumps(self.to_json(), sort_keys=True, separators=(",", ":")).encode())


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Yes or no for one digest and channel. `findings` say why not; `used` are the envelopes that counted.

    `expires` is when a yes ends by age alone (UTC); empty for a no.
    """

    digest: Digest
    policy: Policy
    passed: bool
    findings: tuple[Finding, ...]
    used: tuple[Digest, ...]
    degraded: tuple[str, ...]
    at: str
    expires: str = ""

    def to_json(self) -> dict[str, Any]:
        """State file `verdict.json`."""
        return {
            "schema": 1,
            "digest": str(self.digest),
            "channel": self.policy.channel,
            "passed": self.passed,
            "at": self.at,
            "expires": self.expires or None,
            "policy": self.policy.to_json(),
            "policy_digest": str(self.policy.digest),
            "findings": [dict(vars(finding)) for finding in self.findings],
            "evidence": [str(digest) for digest in self.used],
            "degraded": list(self.degraded),
        }


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What the runs of a digest come to under a policy, their age aside.

    `newest` is the newest run of each tier and GPU model; `proofs` those of them that prove the channel while
    they are not too old; `objections` hold whatever else is proven; `aside` says why runs were not heard.
    """

    digest: Digest
    newest: tuple[Statement, ...]
    proofs: tuple[Statement, ...]
    objections: tuple[Finding, ...]
    aside: tuple[Finding, ...]
    policy: Policy

    @property
    def expires(self) -> datetime | None:
        """When the last proof is too old; None where there is none, or something stands against the image."""
        ends = [end for proof in self.proofs if (end := end_of(proof, self.policy)) is not None]
        return max(ends) if ends and not self.objections else None

    @property
    def reasons(self) -> tuple[Finding, ...]:
        """Why the answer is no, age aside; empty where it is yes."""
        if self.proofs:
            return self.objections
        said = {
            _about(finding) for finding in self.objections
        }  # each check and user once, with its diagnosis
        short = [f for s in self.newest for f in _short_of(s, self.policy) if _about(f) not in said]
        return tuple(dict.fromkeys([*self.objections, *self.aside, *short])) or (self._absent,)

    @property
    def _absent(self) -> Finding:
        channel = self.policy.channel
        tier = " on a GPU host" if channel == "verified" else ""
        msg = f"there is no evidence for {self.digest}"
        return _no("absent", msg, f"channel {channel}", f"smoke it{tier} first")


def judge(digest: Digest, statements: Iterable[Statement], policy: Policy, *, now: datetime) -> Verdict:
    """Whether `statements` let `digest` into the policy's channel at the time `now` (aware)."""
    found = standing(digest, statements, policy, now=now)
    old = {id(s): finding for s in found.newest if (finding := _too_old(s, policy, now)) is not None}
    proofs = [proof for proof in found.proofs if id(proof) not in old]
    passed = bool(proofs) and not found.objections
    worn = () if proofs else tuple(old[id(proof)] for proof in found.proofs)
    reasons = tuple(dict.fromkeys([*found.reasons, *worn]))
    # An old pass no longer counts for anything; what failed does, whenever that was.
    used = [s for s in found.newest if id(s) not in old or not s.report.passed()]
    return Verdict(
        digest=digest,
        policy=policy,
        passed=passed,
        findings=() if passed else reasons,
        used=tuple(s.envelope for s in used if s.envelope is not None) if passed else (),
        degraded=tuple(sorted({name for s in proofs for name in s.tests("degraded")})) if passed else (),
        at=_text(now),
        expires=_text(found.expires) if passed and found.expires is not None else "",
    )


def standing(digest: Digest, statements: Iterable[Statement], policy: Policy, *, now: datetime) -> Standing:
    """What `statements` come to for `digest`, their age aside; by `now` (aware) only the future is known."""
    aside: list[Finding] = []
    heard: list[Statement] = []
    for statement in sorted(statements, key=lambda s: (str(s.envelope), repr(s))):  # any order, one answer
        why = _not_heard(digest, statement, policy, now)
        if why is None and statement.report.passed():
            why = _proves_nothing(statement, policy)
        if why is None:
            heard.append(statement)
        else:
            aside.append(why)
    newest = _newest(heard)
    hard = [finding for finding in aside if finding.rule == "override"]
    hard += [finding for statement in newest for finding in _contradictions(statement, policy)]
    return Standing(
        digest=digest,
        newest=newest,
        proofs=tuple(statement for statement in newest if not _short_of(statement, policy)),
        objections=tuple(dict.fromkeys(hard)),
        aside=tuple(aside),
        policy=policy,
    )


def end_of(statement: Statement, policy: Policy) -> datetime | None:
    """When a run is too old to prove anything; None where its own time can't be read."""
    finished = _time(statement.report.finished)
    return None if finished is None else finished + timedelta(days=policy.max_age_days)


def _not_heard(digest: Digest, statement: Statement, policy: Policy, now: datetime) -> Finding | None:
    """Why a statement says nothing of this digest, neither for nor against; None if it does."""
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
    finished = _time(report.finished)
    if finished is None or finished > now + _SKEW:
        return _no("expired", f"{run} ended in the future", f"now is {_text(now)}", "set the hosts' clocks")
    if report.tier == "gpu" and statement.device is None:
        said = "a GPU run needs gpu.name, .sm, .driver and .held_bytes observed by the host"
        return _no(
            "not-observed", f"{run} says gpu, but its host saw none in use", said, "smoke it on a GPU host"
        )
    if report.host_facts.get("digest") != str(digest):
        said = f"host fact digest: {report.host_facts.get('digest')}"
        return _no("not-observed", f"{run}: the host did not see this digest run", said, again)
    return None


def _proves_nothing(statement: Statement, policy: Policy) -> Finding | None:
    """Why a run can't prove anything, whatever its results; what failed in it failed all the same."""
    report = statement.report
    run = f"the run of {report.finished}"
    if report.suite != policy.suite:
        fix = "smoke the digest again, then publish"
        return _no("other-suite", f"{run} used suite {report.suite}", f"the suite is {policy.suite}", fix)
    doors = open_doors(report) if policy.uri != _POLICY_1 else ()
    if doors:
        said = "containers under test have no network, a read-only root, no capabilities, and limits"
        fix = "smoke it with this mtbuild's own container; don't change its options"
        return _no("not-isolated", f"{run} was not shut in: {'; '.join(doors)}", said, fix)
    return None


def _too_old(statement: Statement, policy: Policy, now: datetime) -> Finding | None:
    finished, end = _time(statement.report.finished), end_of(statement, policy)
    if finished is None or end is None or now <= end:
        return None
    said = f"the run of {statement.report.finished} is {(now - finished).days} days old"
    limit = f"policy.max_age_days: {policy.max_age_days}"
    return _no("expired", said, limit, "smoke the digest again, then publish")


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
    assert finished is not None  # `_not_heard` has seen to it
    return (finished, not statement.report.passed(), str(statement.envelope))


def _contradictions(statement: Statement, policy: Policy) -> list[Finding]:
    """Checks that need no GPU and failed in this run: no other run's pass outweighs them."""
    # A later suite may ask what this policy has never heard of; on a CPU none of it needs a GPU.
    own = statement.report.required if statement.report.tier == "cpu" else ()
    return [
        _no(
            "failed",
            f"{result.check} (as {result.user}) {result.status} {_on(statement)}: {result.message}",
            result.diagnosis or result.detail[:300] or f"status {result.status}",
            result.fix or "read the report's detail for this check, repair the cell, build and smoke again",
        )
        for result in statement.report.results
        if result.status in _BAD and result.check in (*policy.basic, *own)
    ]


def _short_of(statement: Statement, policy: Policy) -> list[Finding]:
    """What this run lacks to prove the channel by itself."""
    if policy.channel == "verified" and statement.device is None:
        said = "channel verified: a CPU can't vouch for a GPU"
        return [_no("no-gpu", f"the newest run {_on(statement)} used no GPU", said, "smoke it on a GPU host")]
    nothing = _proves_nothing(statement, policy)
    lines = statement.report.why_not(policy.required, allow_degraded=policy.allow_degraded)
    if nothing is not None and not lines:  # it was heard for what failed in it
        lines = statement.report.problems or (nothing.message,)
    fix = "repair the cell, build and smoke again; `mtbuild diagnose` names known failures"
    return [
        _no("not-passed", f"{line} {_on(statement)}", f"channel {policy.channel} requires it", fix)
        for line in lines
    ]


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
