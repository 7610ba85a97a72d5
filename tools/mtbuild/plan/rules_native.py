"""Rules 3 to 6: what the binaries say, where metadata is silent. Functions of (cell, facts); pure."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from packaging.version import Version

from mtbuild.plan.cell import Finding
from mtbuild.plan.pairs import odds
from mtbuild.plan.reading import measured_releases
from mtbuild.plan.rules_metadata import fix_for_torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mtbuild.plan.cell import Cell
    from mtbuild.plan.facts import CellFacts
    from mtbuild.plan.wheels import WheelFacts

__all__ = ["architectures", "covers", "native_code"]


def native_code(cell: Cell, facts: CellFacts) -> Iterator[Finding]:
    """3, 4, 5: built for which torch, loads which CUDA runtime, knows which attention operators."""
    torch = facts.wheel("torch")
    if torch is None:
        return
    for extension in facts.wheels:
        if extension.name in {"torch", "triton"}:
            continue
        for one in odds(torch, extension):
            fix = (
                fix_for_torch(cell, facts)
                if extension.name == "xformers"
                else _other_release(torch, extension, facts)
            )
            if one.severity == "degraded":
                built = extension.cpp_lib
                instead = f", or torch {built.torch}, which it was built for" if built else ""
                fix = f"`allow: [degraded]` if PyTorch's attention operators are enough{instead}"
            yield Finding(
                rule=one.rule, severity=one.severity, message=one.message, source=one.source, fix=fix
            )


def _other_release(torch: WheelFacts, extension: WheelFacts, facts: CellFacts) -> str:
    """The newest release that fits this torch."""
    name = extension.name
    for other in facts.alternatives:
        if other.name == name and not odds(torch, other):
            return f"{name} {other.version}"
    return f"leave {name} out (the model here does not need it): no release of it fits torch {torch.version}"


def architectures(cell: Cell, facts: CellFacts) -> Iterator[Finding]:
    """6: torch has machine code for every GPU that the cell is meant for, or is smoked on."""
    torch = facts.wheel("torch")
    if torch is None or not torch.sass:
        return
    wanted = {target: f"target {target}" for target in cell.targets}
    wanted |= {gpu.sm: f"{gpu.name} ({gpu.sm})" for gpu in cell.smoke_on}
    for sm, name in sorted(wanted.items(), key=lambda item: _key(item[0])):
        if not covers(torch.sass, sm):
            yield Finding(
                rule="gpu-architectures",
                severity="refused",
                message=f"torch {torch.local_version} has no machine code for {name}, only for "
                f"{', '.join(torch.sass)}, and no PTX: CUDA error: no kernel image is available",
                source=f"{torch.filename}: {' '.join(torch.sass)} ({torch.sass_source})",
                fix=_other_torch(cell.torch, sm),
            )


def covers(sass: Iterable[str], sm: str) -> bool:
    """Machine code X.y runs on X.z with z ≥ y, on no other major; an `a` variant on exactly its chip.

    Source: NVIDIA's architecture compatibility guides ("Application Compatibility").
    """
    major, minor = _key(sm)
    for code in sass:
        if code[-1].isalpha():
            if _key(code) == (major, minor):
                return True
        elif _key(code)[0] == major and _key(code)[1] <= minor:
            return True
    return False


def _key(sm: str) -> tuple[int, int]:
    number = re.fullmatch(r"(\d+)\.(\d+)[a-z]?", sm)
    return (int(number.group(1)), int(number.group(2))) if number else (0, 0)


def _other_torch(torch: str, sm: str) -> str:
    """The nearest release measured to have it: the first later one, else the last earlier one."""
    have = sorted((Version(v).public, covers(s, sm)) for v, s in measured_releases().items())
    good = sorted(Version(version) for version, fits in have if fits)
    later = [version for version in good if version > Version(torch)]
    earlier = [version for version in good if version < Version(torch)]
    leave = f"leave {sm} out of this cell"
    if later:
        return f"torch {later[0]} or later, or {leave}"
    return f"torch {earlier[-1]} or earlier, or {leave}" if earlier else leave
