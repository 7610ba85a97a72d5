"""Run the suite in an unmodified container of one digest, twice, and write down who observed what.

First every check as uid 65532, then those that depend on the user once more as a random uid with gid 0. The
suite and its request are mounted read-only, `out` is the only thing that the image may write to; what it
writes there is read with care and is the image's word. The tier is the host's: `gpu` only where NVML showed a
GPU and a process of this very container holding its memory.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from packaging.utils import canonicalize_name

from mtbuild.errors import InputError, MtbuildError
from mtbuild.prove import attach as attaching
from mtbuild.prove import container as containers
from mtbuild.prove import host_facts, untrusted
from mtbuild.prove.report import (
    CPU_CHECKS,
    EVERY_USER,
    GPU_CHECKS,
    WEIGHTS_CHECKS,
    CheckResult,
    ContainerRun,
    Fact,
    SmokeReport,
    required_checks,
    validate,
)
from mtbuild.prove.suite_files import SUITE, lay_out, limit_s, suite_digest

if TYPE_CHECKING:
    from pathlib import Path

    from mtbuild.digest import Reference
    from mtbuild.plan.cell import Cell
    from mtbuild.prove.engine import Engine
    from mtbuild.prove.report import Tier

__all__ = ["SUITE", "smoke", "suite_digest", "tier_here"]

USER = "65532:65532"
_REPORT_LIMIT = 8 << 20
_HOLD_S = 15.0  # a GPU check holds memory until the host has seen it, at most so long
_WEIGHTS = "/mtbuild/weights"  # where real checkpoints lie in the container
Note = Callable[[str], None]


def tier_here(asked: Literal["cpu", "gpu", "auto"]) -> Tier:
    """The tier to run on this host; InputError if `gpu` is asked for where NVML sees none."""
    found = host_facts.gpus()
    if asked == "gpu" and not found:
        msg = "tier gpu was asked for, but NVML sees no GPU on this host"
        raise InputError(msg, fix="smoke on a GPU host, or with --tier cpu (channel `checked`)")
    if asked == "auto":
        return "gpu" if found else "cpu"
    return asked


def smoke(
    ref: Reference,
    *,
    cell: Cell | None,
    engine: Engine,
    out: Path,
    tier: Literal["cpu", "gpu", "auto"] = "auto",
    note: Note = lambda _: None,
    runtime: bool | None = None,
    limits: containers.Limits | None = None,
    gpu: str | None = None,
    weights: Path | None = None,
) -> SmokeReport:
    """Smoke one digest; the report is returned and stands in `out`/report.json.

    `cell` None smokes a foreign image: versions are recorded, not compared. `runtime` says whether the image
    is meant to hold the wheel multitalk-runtime (by default every `runtime-deps` cell is). `gpu` names the
    card to hand over, by index or UUID (the first by default); `weights` a folder of real checkpoints, which
    adds the check `generate.weights`. A failed check is a result, not an error; InfrastructureError where
    nothing can be said of the image, InputError for a card or a folder that is not here.
    """
    level = tier_here(tier)
    if weights is not None and not weights.is_dir():
        msg = f"{weights} is no folder"
        raise InputError(msg, where="--weights", fix="name the folder that `mtmodels verify DIR` accepts")
    if gpu is not None and level != "gpu":
        msg = "a GPU was named, but the tier is cpu"
        raise InputError(msg, where=f"--gpu {gpu}", fix="smoke with --tier gpu, on a host that has one")
    cards = host_facts.gpus() if level == "gpu" else ()
    card = host_facts.choose(cards, gpu) if level == "gpu" else None
    started = _now()
    holds = (cell is not None and cell.flavour == "runtime-deps") if runtime is None else runtime
    containers.sweep(engine)
    image = containers.fetch(ref, engine=engine, note=note)
    out.mkdir(parents=True, exist_ok=True)
    names = CPU_CHECKS + (GPU_CHECKS if level == "gpu" else ())
    more = () if weights is None else WEIGHTS_CHECKS
    session = _Session(
        ref=ref,
        cell=cell,
        engine=engine,
        out=out,
        tier=level,
        note=note,
        limits=limits or _limits(weights),
        required=required_checks(cell, level, runtime=holds) + more,
        runtime=holds,
        card=card,
        cards=len(cards),
        attachment=attaching.attach(engine.facts, card, count=len(cards)) if card else None,
        weights=weights,
    )
    for user, checks in ((USER, names + more), (_any_user(), tuple(n for n in names if n in EVERY_USER))):
        session.run(user, checks)
    report = SmokeReport(
        ref=ref,
        cell_id=cell.id if cell else None,
        cell_name=cell.name if cell else None,
        tier="gpu" if session.used_its_card else "cpu",
        required=session.required,
        allow_degraded=session.allow_degraded,
        results=tuple(session.results),
        runs=tuple(session.runs),
        facts=(*session.facts(image), *session.said),
        suite=suite_digest(),
        started=started,
        finished=_now(),
    )
    if level == "gpu" and not session.used_its_card:
        why = "on another card than it was given" if session.held_elsewhere else "no GPU memory held"
        note(f"NVML saw the container's processes: {why}. This run counts as tier cpu")
    report.write(out / "report.json")
    return report


@dataclass(kw_only=True)
class _Session:
    """What both containers of one run share, and what came of them."""

    ref: Reference
    cell: Cell | None
    engine: Engine
    out: Path
    tier: Tier
    note: Note
    limits: containers.Limits
    required: tuple[str, ...]
    runtime: bool
    card: host_facts.HostGpu | None  # the one that is handed over, of `cards` in this host
    cards: int
    attachment: attaching.Attachment | None
    weights: Path | None
    artefacts: tuple[untrusted.Artefact, ...] = ()
    results: list[CheckResult] = field(default_factory=list)
    runs: list[ContainerRun] = field(default_factory=list)
    said: list[Fact] = field(default_factory=list)
    held: dict[str, int] = field(default_factory=dict)  # user → most memory seen on the card, bytes
    held_elsewhere: dict[str, int] = field(default_factory=dict)  # UUID → the same on other cards
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def used_its_card(self) -> bool:
        """Whether this was a GPU run: its own memory on the card that it was given, and on no other."""
        return bool(self.held) and not self.held_elsewhere

    @property
    def allow_degraded(self) -> bool:
        return self.cell is not None and "degraded" in self.cell.allow

    def run(self, user: str, checks: tuple[str, ...]) -> None:
        """One container as one user; its results, its end and what the host saw are added."""
        nonce = secrets.token_hex(8)
        folder = self.out / f"run-{nonce}"
        request = self.request(user, checks, nonce)
        try:
            mounts = lay_out(folder, request)
            if "weights" in request and self.weights is not None:
                mounts[self.weights.resolve()] = (_WEIGHTS, "ro")
            finished = containers.run_in_container(
                self.ref,
                ["python3", "/mtbuild/suite", "--request", "/mtbuild/request.json"],
                engine=self.engine,
                user=user,
                nonce=nonce,
                mounts=mounts,
                limits=self.limits,
                limit_s=limit_s(checks),
                attachment=self.attachment,
                on_line=lambda line: _tell(line, self.note),
                watch=lambda container: self.watch(container, user, folder / "out"),
            )
            (self.out / f"log-{_slug(user)}.txt").write_text(finished.log, encoding="utf-8")
            results, said = _read(folder / "out", request, finished)
            if not self.runs:
                self.artefacts, left = untrusted.keep(folder / "out", self.out / "artefacts")
                for line in left:
                    self.note(f"not kept: {line}")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self.results += results
        if not self.runs:  # what a second user sees of the same image is not another fact
            self.said = said
        self.settings[user] = finished.settings
        self.runs.append(
            ContainerRun(
                user=user,
                exit_status=finished.exit_status,
                oom_killed=finished.oom_killed,
                seconds=finished.seconds,
            )
        )

    def request(self, user: str, checks: tuple[str, ...], nonce: str) -> dict[str, Any]:
        """The document that the suite reads (request.schema.json)."""
        cell = self.cell
        document = {
            "schema": 1,
            "nonce": nonce,
            "tier": self.tier,
            "user": user,
            "checks": list(checks),
            "required": [name for name in self.required if name in checks],
            "allow_degraded": self.allow_degraded,
            "runtime": self.runtime,
            "cell": None
            if cell is None
            else {
                "id": cell.id,
                "name": cell.name,
                "python": cell.python,
                "torch": cell.torch,
                "cuda": cell.cuda,
                "triton": cell.triton,
                "xformers": cell.xformers,
                "targets": list(cell.targets),
                "packages": {canonicalize_name(name): version for name, version in cell.packages},
            },
            "cache": "/cache",
            "out": "/mtbuild/out",
            "hold_s": _HOLD_S if self.tier == "gpu" else 0,
        }
        if self.weights is not None and set(checks) & set(WEIGHTS_CHECKS):
            document["weights"] = _WEIGHTS
        validate(document, "request", where="request")
        return document

    def watch(self, container: str, user: str, out: Path) -> None:
        """While it runs: note what it holds on the GPU, and let a check that waits for that go on."""
        if self.card is None:
            return
        seen = host_facts.held_by(container)
        held = seen.pop(self.card.uuid, 0)
        for uuid, other in seen.items():
            self.held_elsewhere[uuid] = max(other, self.held_elsewhere.get(uuid, 0))
        if held > self.held.get(user, 0):
            self.held[user] = held
        if held:
            # The image owns this folder: never follow what it may have put in the mark's place.
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW
            try:
                os.close(os.open(out / "gpu-seen", flags, 0o644))
            except OSError:
                return

    def facts(self, fetched: containers.Fetched) -> list[Fact]:
        """All that the host knows by itself."""
        engine, image = self.engine.facts, fetched.attributes
        known: dict[str, Any] = {
            "digest": str(self.ref.digest),
            "image.fetch_s": fetched.seconds,
            "image.pulled": fetched.pulled,
            "image.id": image["Id"],
            "image.size_bytes": image.get("Size"),
            "image.platform": f"{image.get('Os')}/{image.get('Architecture')}",
            "image.user": (image.get("Config") or {}).get("User", ""),
            "engine.version": engine.version,
            "engine.store": engine.store,
            "host.kernel": engine.kernel,
            "host.system": engine.system,
            "host.processor": host_facts.processor(),
            "host.cpus": engine.cpus,
            "host.memory_bytes": host_facts.host_memory_bytes(),
            "host.python": platform.python_version(),
            "container.settings": self.settings,
            "artefacts": [artefact.to_json() for artefact in self.artefacts],
            "mtbuild.runtime_expected": self.runtime,
        }
        if self.card is not None and self.attachment is not None:
            known |= {
                "gpu.name": self.card.name,
                "gpu.sm": self.card.sm,
                "gpu.uuid": self.card.uuid,
                "gpu.index": self.card.index,
                "gpu.memory_bytes": self.card.memory_bytes,
                "gpu.driver": self.card.driver,
                "gpu.driver_cuda": self.card.cuda,
                "gpu.count": self.cards,
                "gpu.attached_by": self.attachment.way,
                "gpu.held_bytes": dict(self.held),
                "gpu.held_elsewhere_bytes": dict(self.held_elsewhere),
            }
        return [Fact(name=name, value=value, observed_by="host") for name, value in known.items()]


def _read(
    out: Path, request: dict[str, Any], finished: containers.Finished
) -> tuple[list[CheckResult], list[Fact]]:
    """What the image says, checked for form; where it says nothing usable, every check is an error."""
    user = request["user"]
    try:
        document = json.loads(untrusted.read(out / "report.json", limit=_REPORT_LIMIT))
        validate(document, "report", where="the image's report.json")
        _matches(document, request)
    except (OSError, ValueError, MtbuildError) as error:
        why = f"no usable report came out of the container: {error}"
        if finished.oom_killed:
            why = "the container ran out of memory"
        elif finished.exit_status is None:
            why = "the container did not end within the sum of its checks' limits"
        lost = CheckResult(
            check="",
            status="error",
            user=user,
            seconds=0.0,
            message=why,
            detail=finished.log[-4000:],
            diagnosis="the suite was stopped, or something in the image interferes with it",
            fix="read the log under `detail`; raise the container's limits if it was stopped",
        )
        return [CheckResult(**{**vars(lost), "check": name}) for name in request["checks"]], []
    results = [CheckResult(user=user, **result) for result in document["results"]]
    # "suite.": so that nothing that an image says can take the place of a host's fact
    said = [
        Fact(name=f"suite.{name}", value=value, observed_by="image")
        for name, value in document["facts"].items()
    ]
    return results, said


def _matches(document: dict[str, Any], request: dict[str, Any]) -> None:
    """The report must answer this very request: not one that lies in the image."""
    got = [result["check"] for result in document["results"]]
    if document["nonce"] != request["nonce"] or document["tier"] != request["tier"]:
        msg = "it answers another request"
        raise MtbuildError(msg)
    if got != request["checks"]:
        msg = f"it holds {', '.join(got)} instead of {', '.join(request['checks'])}"
        raise MtbuildError(msg)


def _tell(line: str, note: Note) -> None:
    """A progress line of the suite, for people; lines that are not the suite's are let go."""
    try:
        event = json.loads(line)
        kind = event["event"]
        if kind == "start":
            note(f"as {event['user']}: {len(event['checks'])} checks")
        elif kind == "result":
            sign = {"passed": "✓", "skipped": "–", "degraded": "~"}.get(event["status"], "✗")
            text = str(event["message"]).splitlines()[0] if event["message"] else ""
            note(f"{sign} {event['check']:<19}{event['seconds']:6.1f} s  {text[:160]}")
    except (ValueError, KeyError, TypeError):
        return


def _limits(weights: Path | None) -> containers.Limits:
    """Real checkpoints pass through the host's memory on their way to the GPU; a tiny model's are small."""
    if weights is None:
        return containers.Limits()
    usual = containers.Limits()
    most = int(host_facts.host_memory_bytes() * 0.85)
    return containers.Limits(memory_bytes=max(usual.memory_bytes, most))


def _any_user() -> str:
    """A uid that no image knows, with gid 0, as container platforms choose it."""
    return f"{1_000_000_000 + secrets.randbelow(1_000_000_000)}:0"


def _slug(user: str) -> str:
    return "65532" if user == USER else "any"


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
