"""Evidence: a smoke report as an in-toto test-result on exactly one digest. Failures are attested too.

The report goes in whole, so that whoever judges later sees what was seen: each check as each user, each
fact with the word of who observed it. Sources: in-toto Statement v1, predicate test-result v0.1.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from mtbuild.digest import Digest
from mtbuild.errors import InputError
from mtbuild.prove.report import SmokeReport
from mtbuild.publish import dsse
from mtbuild.publish.dsse import Envelope, UnverifiedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mtbuild.digest import Reference
    from mtbuild.plan.cell import Cell
    from mtbuild.publish.keys import PrivateKey, PublicKey

__all__ = [
    "EXTENSION",
    "STATEMENT",
    "TEST_RESULT",
    "BuildRecord",
    "Device",
    "Statement",
    "payload_of",
    "sign",
    "statement",
    "verify",
]

STATEMENT = "https://in-toto.io/Statement/v1"
TEST_RESULT = "https://in-toto.io/attestation/test-result/v0.1"
EXTENSION = "tag:mtbuild,2026:smoke/v1"  # names our fields in the predicate; others ignore them
SCHEMA = 1


class BuildRecord(Protocol):
    """What publishing needs of a build (`mtbuild.prove.build.Build`)."""

    @property
    def cell_id(self) -> str: ...
    @property
    def cell_name(self) -> str: ...
    @property
    def build_id(self) -> str: ...
    @property
    def ref(self) -> Reference: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def override(self) -> str | None: ...
    @property
    def created(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Device:
    """The GPU of a run, as the host saw it: compute capability "9.0", memory in GiB where known."""

    name: str
    sm: str
    driver: str
    vram_gib: float | None = None


@dataclass(frozen=True, kw_only=True)
class Statement:
    """What a smoke run says of one digest. `signer` (the key's hint) is set by `verify` and nothing else."""

    subject: Digest
    report: SmokeReport
    build_id: str | None
    override: str | None
    signer: str = ""
    envelope: Digest | None = None

    @property
    def device(self) -> Device | None:
        """The GPU by the host's facts alone; None for tier cpu, or where the host saw it unused."""
        facts = self.report.host_facts
        held = facts.get("gpu.held_bytes")
        if not isinstance(held, dict) or not any(held.values()):
            return None
        name, sm, driver = facts.get("gpu.name"), facts.get("gpu.sm"), facts.get("gpu.driver")
        if self.report.tier != "gpu" or not (
            isinstance(name, str) and isinstance(sm, str) and isinstance(driver, str)
        ):
            return None
        memory = facts.get("gpu.memory_bytes")
        gib = round(memory / 2**30, 1) if isinstance(memory, int | float) else None
        return Device(name=name, sm=sm, driver=driver, vram_gib=gib)

    @property
    def result(self) -> str:
        """in-toto's word for it: PASSED, WARNED (with something degraded) or FAILED."""
        if not self.report.passed():
            return "FAILED"
        return "WARNED" if self.tests("degraded") else "PASSED"

    def tests(self, status: str) -> tuple[str, ...]:
        """Checks by their worst status over all users; `failed` takes error and timeout in."""
        order = ("passed", "skipped", "degraded", "failed")
        worst: dict[str, str] = {}
        for result in self.report.results:
            seen = "failed" if result.status in ("error", "timeout") else result.status
            worst[result.check] = max(worst.get(result.check, "passed"), seen, key=order.index)
        return tuple(check for check, seen in worst.items() if seen == status)

    def to_json(self) -> dict[str, Any]:
        """As an in-toto Statement v1."""
        build = None if self.build_id is None else {"id": self.build_id, "override": self.override}
        return {
            "_type": STATEMENT,
            "subject": [
                {"name": self.report.ref.repository, "digest": {"sha256": self.subject.hex}},
            ],
            "predicateType": TEST_RESULT,
            "predicate": {
                "result": self.result,
                "configuration": [
                    {"name": "mtbuild-smoke-suite", "digest": {"sha256": self.report.suite.hex}}
                ],
                "passedTests": list(self.tests("passed")),
                "warnedTests": list(self.tests("degraded")),
                "failedTests": list(self.tests("failed")),
                EXTENSION: {"schema": SCHEMA, "report": self.report.to_json(), "build": build},
            },
        }


def statement(report: SmokeReport, cell: Cell | None, *, build: BuildRecord | None = None) -> Statement:
    """What `report` says, with the build that made the image where it is known.

    Raises InputError if report, cell and build are not about the same thing.
    """
    if cell is not None and report.cell_id != cell.id:
        msg = f"the report is about cell {report.cell_id}, not {cell.id}"
        raise InputError(msg, fix="smoke the image with the cell that it was built from")
    if build is not None and build.ref.digest != report.digest:
        msg = f"the build made {build.ref.digest}, the report is about {report.digest}"
        raise InputError(msg, fix="name the build record that belongs to this digest")
    return Statement(
        subject=report.digest,
        report=report,
        build_id=build.build_id if build is not None else None,
        override=build.override if build is not None else None,
    )


def sign(subject: Statement, key: PrivateKey) -> Envelope:
    """Sign a statement."""
    return dsse.sign(payload_of(subject.to_json()), key)


def payload_of(document: Mapping[str, Any]) -> bytes:
    """A document's bytes as they are signed: one line, keys in the order given."""
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()


def predicate_type(envelope: Envelope) -> str:
    """The predicate type that an unverified envelope claims; empty if it is no in-toto statement."""
    try:
        data = json.loads(envelope.payload)
        return str(data["predicateType"]) if data.get("_type") == STATEMENT else ""
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""


def verify(
    envelope: Envelope, public_key: PublicKey | Iterable[PublicKey], *, where: str = "evidence"
) -> Statement:
    """The statement in an envelope, if one of the keys signed it and it does not contradict itself.

    Raises UnverifiedError otherwise.
    """
    keys = public_key if not hasattr(public_key, "hint") else (public_key,)
    signer = dsse.verify(envelope, keys, where=where)  # type: ignore[arg-type]
    if predicate_type(envelope) != TEST_RESULT or envelope.payload_type != dsse.IN_TOTO:
        msg = f"is no test result ({predicate_type(envelope) or envelope.payload_type})"
        raise UnverifiedError(msg, where=where, fix="name the evidence that `mtbuild smoke` wrote")
    try:
        data = json.loads(envelope.payload)
        subjects, predicate = data["subject"], data["predicate"]
        extension = predicate[EXTENSION]
        if extension["schema"] != SCHEMA or len(subjects) != 1:
            msg = f"has schema {extension['schema']} and {len(subjects)} subjects; known is {SCHEMA} with one"
            raise UnverifiedError(msg, where=where, fix="smoke the image again with this mtbuild")
        build = extension["build"] or {}
        found = Statement(
            subject=Digest(subjects[0]["digest"]["sha256"]),
            report=SmokeReport.from_json(extension["report"], where=where),
            build_id=build.get("id"),
            override=build.get("override"),
        )
    except (KeyError, TypeError, ValueError, AttributeError, InputError) as error:
        msg = f"is signed but malformed ({type(error).__name__}: {error})"
        raise UnverifiedError(msg, where=where, fix="smoke the image again with this mtbuild") from error
    if found.subject != found.report.digest or found.result != predicate.get("result"):
        msg = "contradicts itself: its subject or result is not that of the report in it"
        raise UnverifiedError(msg, where=where, fix="smoke the image again; never edit evidence")
    return replace(found, signer=signer.hint, envelope=envelope.digest)
