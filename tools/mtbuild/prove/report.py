"""What a smoke run found: results of the checks, and facts with the word of who saw them.

A report is host-made. The container's own report enters it as results and as facts `observed_by: image`;
the digest that ran, exit statuses, limits, the GPU, its driver and the memory that the container held on it
are `observed_by: host`. The tier rests on host facts alone: what the image says of a GPU proves nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal, cast

import jsonschema

from mtbuild.digest import Digest, Reference
from mtbuild.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from mtbuild.plan.cell import Cell

__all__ = [
    "CPU_CHECKS",
    "EVERY_USER",
    "GPU_CHECKS",
    "RUNTIME_CHECKS",
    "TIMINGS",
    "WEIGHTS_CHECKS",
    "CheckResult",
    "ContainerRun",
    "Fact",
    "SmokeReport",
    "Tier",
    "required_checks",
    "validate",
]

Tier = Literal["cpu", "gpu"]
Status = Literal["passed", "failed", "degraded", "skipped", "error", "timeout"]
Observer = Literal["host", "image"]
Json = str | int | float | bool | None | list[Any] | dict[str, Any]

SCHEMA = 1

# The names of CONTRACTS "The suite"; the suite's own TIERS are tested against them.
CPU_CHECKS = (
    "compiler",
    "headers",
    "ldconfig",
    "versions",
    "xformers.extension",
    "triton.aot",
    "triton.interpret",
    "triton.stub",
    "imports.wan",
    "imports.runtime",
    "handler.inputs",
    "users",
    "caches",
    "disk",
    "generate",
)
GPU_CHECKS = ("libcuda", "triton.jit", "xformers.attention", "generate.gpu")
# Only where real checkpoints are given (`mtbuild smoke --weights DIR`); required then
WEIGHTS_CHECKS = ("generate.weights",)
# What an image without the runtime can't be asked
RUNTIME_CHECKS = ("imports.wan", "imports.runtime", "handler.inputs", "generate", "generate.gpu")
# Checks whose outcome depends on who runs them: they run again as a random uid with gid 0.
EVERY_USER = (
    "compiler",
    "triton.stub",
    "imports.wan",
    "imports.runtime",
    "handler.inputs",
    "users",
    "caches",
    "triton.jit",
)
# Phase → the facts that time it, the better one first: a GPU's word before a CPU's. `pull` is the host's, and
# next to nothing where the image was here already (`image.pulled`).
TIMINGS = {
    "pull": ("image.fetch_s",),
    "import": ("suite.generate_gpu.seconds.import_s", "suite.generate.seconds.import_s"),
    "load": ("suite.generate_gpu.seconds.load_s", "suite.generate.seconds.load_s"),
    "first_kernel": ("suite.triton_jit.first_s", "suite.triton_aot.first_s"),
    "first_frame": ("suite.generate_gpu.first_frame_s", "suite.generate.first_frame_s"),
}


def required_checks(cell: Cell | None, tier: Tier, *, runtime: bool) -> tuple[str, ...]:
    """The checks that must pass: `checked` needs those of tier cpu, `verified` those of both.

    xFormers' checks are required only where the cell has xformers, those of the runtime only where the image
    is meant to hold it. Without a cell (a foreign image) nothing of the two is required.
    """
    names = CPU_CHECKS + (GPU_CHECKS if tier == "gpu" else ())
    has_xformers = cell is not None and cell.xformers is not None
    return tuple(
        name
        for name in names
        if (has_xformers or not name.startswith("xformers.")) and (runtime or name not in RUNTIME_CHECKS)
    )


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One thing known of a run; `value` is JSON. Only `host` facts may decide anything."""

    name: str
    value: Json
    observed_by: Observer


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """Outcome of one check as one user (`uid:gid`). `diagnosis` and `fix` are set where it did not pass."""

    check: str
    status: Status
    user: str
    seconds: float
    message: str
    detail: str = ""
    diagnosis: str = ""
    fix: str = ""


@dataclass(frozen=True, kw_only=True)
class ContainerRun:
    """One container of the run, as the host saw it end. `exit_status` is None if it was ended by the host."""

    user: str
    exit_status: int | None
    oom_killed: bool
    seconds: float


@dataclass(frozen=True, kw_only=True)
class SmokeReport:
    """Everything a smoke run of one digest established. Times are UTC, ISO 8601 with seconds."""

    ref: Reference
    cell_id: str | None
    cell_name: str | None
    tier: Tier
    required: tuple[str, ...]
    allow_degraded: bool
    results: tuple[CheckResult, ...]
    runs: tuple[ContainerRun, ...]
    facts: tuple[Fact, ...]
    suite: Digest
    started: str
    finished: str

    @property
    def digest(self) -> Digest:
        """Of the image that ran."""
        return self.ref.digest

    @property
    def host_facts(self) -> dict[str, Json]:
        return {fact.name: fact.value for fact in self.facts if fact.observed_by == "host"}

    @property
    def image_facts(self) -> dict[str, Json]:
        return {fact.name: fact.value for fact in self.facts if fact.observed_by == "image"}

    @property
    def timings(self) -> dict[str, float | None]:
        """Seconds of each phase of a cold start (TIMINGS); None where it was not seen."""
        known = {fact.name: fact.value for fact in self.facts}
        nested = ((name, value) for name, value in known.items() if isinstance(value, dict))
        seen = known | {f"{name}.{key}": inner for name, value in nested for key, inner in value.items()}
        found: dict[str, float | None] = {}
        for phase, names in TIMINGS.items():
            values = [seen.get(name) for name in names]
            found[phase] = next((float(v) for v in values if isinstance(v, int | float)), None)
        return found

    @property
    def problems(self) -> tuple[str, ...]:
        """Why this run does not prove the digest by its own `required` list; empty where it does."""
        return self.why_not(self.required, allow_degraded=self.allow_degraded)

    def passed(self, required: Iterable[str] | None = None, *, allow_degraded: bool | None = None) -> bool:
        """Whether every required check passed as every user, and every container ended by itself with 0."""
        names = self.required if required is None else required
        degraded = self.allow_degraded if allow_degraded is None else allow_degraded
        return not self.why_not(names, allow_degraded=degraded)

    def why_not(self, required: Iterable[str], *, allow_degraded: bool) -> tuple[str, ...]:
        """One line for each thing that stands against the image; absent and skipped are not passed."""
        fine = {"passed", "degraded"} if allow_degraded else {"passed"}
        lines = []
        users = [run.user for run in self.runs]
        if len(users) < 2:
            lines.append("the suite did not run as two users")
        by_key = {(result.check, result.user): result for result in self.results}
        for name in required:
            for user in users if name in EVERY_USER else users[:1]:
                result = by_key.get((name, user))
                if result is None:
                    lines.append(f"{name} (as {user}): absent")
                elif result.status not in fine:
                    lines.append(f"{name} (as {user}): {result.status}: {result.message}")
        for run in self.runs:
            if run.exit_status is None:
                lines.append(f"the container (as {run.user}) was ended by the host at its limit")
            elif run.oom_killed:
                lines.append(f"the container (as {run.user}) ran out of memory")
            elif run.exit_status not in (0, 1) or (run.exit_status == 1 and not lines):
                # 1 says "a required check did not pass"; with none of them, report and container disagree
                lines.append(f"the container (as {run.user}) ended with status {run.exit_status}")
        return tuple(lines)

    def to_json(self) -> dict[str, Any]:
        """As the document that `smoke.schema.json` describes."""
        return {
            "schema": SCHEMA,
            "ref": str(self.ref),
            "cell": None if self.cell_id is None else {"id": self.cell_id, "name": self.cell_name},
            "tier": self.tier,
            "required": list(self.required),
            "allow_degraded": self.allow_degraded,
            "passed": self.passed(),
            "problems": list(self.problems),
            "results": [dict(vars(result)) for result in self.results],
            "runs": [{**vars(run), "observed_by": "host"} for run in self.runs],
            "facts": {f.name: {"value": f.value, "observed_by": f.observed_by} for f in self.facts},
            "suite": str(self.suite),
            "started": self.started,
            "finished": self.finished,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any], *, where: str = "report") -> SmokeReport:
        """From such a document; InputError naming the key if it is not one, or contradicts itself."""
        validate(document, "smoke", where=where)
        cell = document["cell"] or {}
        report = cls(
            ref=Reference.parse(document["ref"]),
            cell_id=cell.get("id"),
            cell_name=cell.get("name"),
            tier=cast("Tier", document["tier"]),
            required=tuple(document["required"]),
            allow_degraded=document["allow_degraded"],
            results=tuple(CheckResult(**result) for result in document["results"]),
            runs=tuple(
                ContainerRun(**{k: v for k, v in run.items() if k != "observed_by"})
                for run in document["runs"]
            ),
            facts=tuple(
                Fact(name=name, value=fact["value"], observed_by=fact["observed_by"])
                for name, fact in document["facts"].items()
            ),
            suite=Digest.parse(document["suite"]),
            started=document["started"],
            finished=document["finished"],
        )
        if report.passed() != document["passed"]:
            msg = f"says passed: {document['passed']}, but its results say the opposite"
            raise InputError(msg, where=where, fix="smoke the image again; never edit a report")
        return report

    def write(self, path: Path) -> None:
        """To a file, whole or not at all."""
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> SmokeReport:
        """From a file; InputError if it is missing or no report."""
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            msg = "there is no such report"
            raise InputError(msg, where=str(path), fix="run `mtbuild smoke` first") from error
        except ValueError as error:
            msg = f"is not JSON: {error}"
            raise InputError(msg, where=str(path), fix="smoke the image again") from error
        return cls.from_json(document, where=str(path))


@cache
def _validator(name: str) -> jsonschema.Draft202012Validator:
    folder = resources.files("mtbuild.prove")
    place = folder / "schema" if name == "smoke" else folder / "suite"
    schema = json.loads((place / f"{name}.schema.json").read_text(encoding="utf-8"))
    return jsonschema.Draft202012Validator(schema)


def validate(document: object, name: Literal["smoke", "request", "report"], *, where: str) -> None:
    """Raise InputError naming the key where `document` does not fit `<name>.schema.json`."""
    for error in _validator(name).iter_errors(document):
        key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)
        msg = f"{key.lstrip('.') or 'the document'}: {error.message[:300]}"
        raise InputError(msg, where=where, fix=f"see {name}.schema.json (schema {SCHEMA})")
