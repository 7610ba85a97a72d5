"""Requires-Dist and its markers, evaluated for a cell. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from mtbuild.plan.tags import Target

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mtbuild.plan.cell import Cell
    from mtbuild.plan.wheels import WheelFacts

__all__ = ["Conflict", "Wish", "admits", "conflicts", "target_of", "wishes"]


@dataclass(frozen=True, kw_only=True)
class Wish:
    """One Requires-Dist line. `applies`: its marker is true here (no extras)."""

    name: str
    line: str
    specifier: str
    applies: bool


@dataclass(frozen=True, kw_only=True)
class Conflict:
    """`wheel` asks for `wish`; the cell has `version` of it."""

    wheel: WheelFacts
    wish: Wish
    version: str


def target_of(cell: Cell) -> Target:
    """Where the cell's wheels must run."""
    return Target(python=cell.python, platform=cell.platform, glibc=cell.base.glibc)


def wishes(lines: Iterable[str], target: Target) -> tuple[Wish, ...]:
    """Lines as parsed requirements; unreadable ones are left out, as installers do with old metadata."""
    return tuple(wish for line in lines if (wish := _wish(line, target)) is not None)


@lru_cache(maxsize=8192)
def _wish(line: str, target: Target) -> Wish | None:
    try:
        requirement = Requirement(line)
    except InvalidRequirement:
        return None
    marker = requirement.marker
    return Wish(
        name=canonicalize_name(requirement.name),
        line=line,
        specifier=str(requirement.specifier),
        applies=marker is None or marker.evaluate(_environment(target)),
    )


def _environment(target: Target) -> dict[str, str]:
    return {
        "implementation_name": "cpython",
        "implementation_version": f"{target.python}.0",
        "os_name": "posix",
        "platform_machine": target.machine,
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": "Linux",
        "platform_version": "",
        "python_full_version": f"{target.python}.0",
        "python_version": target.python,
        "sys_platform": "linux",
        "extra": "",
    }


def admits(wish: Wish, version: str) -> bool:
    """Whether the line allows this version; pre-releases count, because the cell names them on purpose."""
    return Requirement(wish.line).specifier.contains(Version(version), prereleases=True)


def conflicts(wheels: Iterable[WheelFacts], versions: dict[str, str], target: Target) -> tuple[Conflict, ...]:
    """Every line of these wheels that one of `versions` (by canonical name) breaks."""
    return tuple(
        Conflict(wheel=wheel, wish=wish, version=versions[wish.name])
        for wheel in wheels
        for wish in wishes(wheel.requires_dist, target)
        if wish.applies and wish.name in versions and not admits(wish, versions[wish.name])
    )
