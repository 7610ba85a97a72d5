"""The versions that fit one that is given: the same facts and rules, asked the other way round."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from packaging.version import Version

from mtbuild.errors import InputError
from mtbuild.plan.facts import asking_for
from mtbuild.plan.floors import driver_floor, numpy_window, toolkit_driver
from mtbuild.plan.pairs import odds
from mtbuild.plan.requires import wishes
from mtbuild.plan.select import choose, specifiers
from mtbuild.plan.tags import Target, pythons_of

if TYPE_CHECKING:
    from mtbuild.plan.index import Link
    from mtbuild.plan.wheels import WheelFacts, Wheels

__all__ = ["Candidate", "Suggestion", "Value", "suggest"]

_PLATFORM = "linux/amd64"
_GLIBC = "2.39"  # so that no base is assumed: the floor that the wheels need is part of the answer
_MULTITALK_PYTHONS = ("3.11", "3.12")


@dataclass(frozen=True, kw_only=True)
class Value:
    """One suggested value, why, and the words it rests on."""

    name: str
    value: str
    reason: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One xformers release whose metadata admits this torch. `degraded`: PyTorch's operators only."""

    version: str
    verdict: Literal["fits", "degraded", "refused"]
    reason: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """A cell that holds together; `values` in the order of a cell's keys, `xformers` newest first."""

    torch: str
    python: str
    values: tuple[Value, ...]
    xformers: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate | None:
        """The newest that fits, else the newest degraded one."""
        for verdict in ("fits", "degraded"):
            for candidate in self.xformers:
                if candidate.verdict == verdict:
                    return candidate
        return None


def suggest(torch: str, wheels: Wheels, *, python: str | None = None) -> Suggestion:
    """What fits this torch. Raises InputError for a torch or Python that the index has no wheel for."""
    files = _files(torch, wheels)
    pythons = pythons_of(files, Target(python="3.12", platform=_PLATFORM, glibc=_GLIBC))
    python = python or _default_python(torch, pythons)
    target = Target(python=python, platform=_PLATFORM, glibc=_GLIBC)
    link = choose(wheels.index, "torch", torch, target).or_raise(target)
    facts = wheels.of(link)
    with ThreadPoolExecutor(16) as pool:
        admitted = asking_for(wheels, "xformers", {"torch": facts.version}, target, pool)
    candidates = tuple(_candidate(facts, extension, target) for extension in admitted)
    return Suggestion(
        torch=facts.version,
        python=python,
        values=(
            _python(facts, python, pythons),
            _cuda(facts),
            _triton(facts, target, wheels),
            *_numpy(facts, target),
            *_base(facts),
            *_targets(facts),
            *_driver(facts),
        ),
        xformers=candidates,
    )


def _files(torch: str, wheels: Wheels) -> list[Link]:
    """Every file of this torch; raises InputError where there is none."""
    wanted = specifiers(torch)
    versions = wheels.index.versions("torch")
    files = [link for version, links in versions.items() if wanted.contains(version) for link in links]
    if not files:
        anywhere = Target(python="3.12", platform=_PLATFORM, glibc=_GLIBC)
        choose(wheels.index, "torch", torch, anywhere).or_raise(anywhere)
    return files


def _default_python(torch: str, pythons: tuple[str, ...]) -> str:
    """The newest Python that MultiTalk runs on and this torch has a wheel for."""
    both = [python for python in pythons if python in _MULTITALK_PYTHONS]
    if not both:
        have = ", ".join(pythons) or "none"
        msg = f"torch {torch} has wheels for Python {have}, but MultiTalk needs 3.11 or 3.12"
        raise InputError(msg, fix="take another torch, or name a Python with --python")
    return both[-1]


def _python(facts: WheelFacts, python: str, pythons: tuple[str, ...]) -> Value:
    return Value(
        name="python",
        value=python,
        reason=f"torch {facts.version} has wheels for {', '.join(pythons)}; numpy below 2 ends at 3.12",
        source=f"{facts.filename}: Requires-Python: {facts.requires_python}",
    )


def _cuda(facts: WheelFacts) -> Value:
    return Value(
        name="cuda",
        value=facts.cuda or "none",
        reason="the CUDA that this wheel is really built for",
        source=f"torch/version.py: __version__ = {facts.local_version!r}, cuda = {facts.cuda!r}",
    )


def _triton(facts: WheelFacts, target: Target, wheels: Wheels) -> Value:
    named = [wish for wish in wishes(facts.requires_dist, target) if wish.name == "triton"]
    wish = next((wish for wish in named if wish.applies), None)
    if wish is None:
        quote = f"Requires-Dist: {named[0].line}" if named else "METADATA: no Requires-Dist of triton"
        return Value(
            name="triton",
            value="none",
            reason=f"torch does not bring it on Python {target.python}, so torch.compile fails there",
            source=quote,
        )
    link = choose(wheels.index, "triton", wish.specifier, target).or_raise(target)
    version = link.filename.split("-")[1]
    return Value(
        name="triton",
        value=version,
        reason=f"torch asks for triton{wish.specifier}",
        source=f"Requires-Dist: {wish.line}",
    )


def _numpy(facts: WheelFacts, target: Target) -> tuple[Value, ...]:
    window, source = numpy_window(facts.version)
    return (Value(name="numpy", value=window, reason="torch's metadata has no bound", source=source),)


def _base(facts: WheelFacts) -> tuple[Value, ...]:
    """The lowest C library that one of the wheel's tags names."""
    minors = [
        int(tag.rpartition("manylinux_2_")[2].split("_")[0]) for tag in facts.tags if "manylinux_2_" in tag
    ]
    floor = min(minors, default=17)
    tags = ", ".join(tag.rpartition("-")[2] for tag in facts.tags)
    reason = "the wheel's platform tag"
    return (Value(name="glibc", value=f">=2.{floor}", reason=reason, source=f"{facts.filename}: {tags}"),)


def _targets(facts: WheelFacts) -> tuple[Value, ...]:
    if not facts.sass:
        return ()
    return (
        Value(
            name="targets",
            value=" ".join(facts.sass),
            reason="compute capabilities with machine code in this torch; X.y also runs on a later X.z",
            source=facts.sass_source,
        ),
    )


def _driver(facts: WheelFacts) -> tuple[Value, ...]:
    floor = driver_floor(cuda=facts.cuda)
    if floor is None or facts.cuda is None:
        return ()
    own = toolkit_driver(facts.cuda)
    full = f"; {own[0]} for all features" if own else ""
    reason = f"CUDA {Version(facts.cuda).major}.x by minor-version compatibility{full}"
    return (Value(name="driver", value=f">={floor[0]}", reason=reason, source=floor[1]),)


def _candidate(torch: WheelFacts, extension: WheelFacts, target: Target) -> Candidate:
    found = odds(torch, extension)
    worst = next((one for one in found if one.severity == "refused"), found[0] if found else None)
    lines = [
        wish.line for wish in wishes(extension.requires_dist, target) if wish.applies and wish.name == "torch"
    ]
    metadata = f"{extension.filename}: Requires-Dist: {lines[0]}" if lines else extension.filename
    if worst is not None:
        return Candidate(
            version=extension.version, verdict=worst.severity, reason=worst.message, source=worst.source
        )
    built = extension.cpp_lib
    runtime = extension.needed_cudart[0][1] if extension.needed_cudart else ""
    reason = f"built for torch {built.torch}" if built else "no native code"
    return Candidate(
        version=extension.version,
        verdict="fits",
        reason=f"{reason}, loads {runtime}" if runtime else reason,
        source=metadata,
    )
