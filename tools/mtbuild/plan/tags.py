"""Which wheels an installer would take: Python, platform and C library against the tags in file names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import InvalidWheelFilename, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from mtbuild.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mtbuild.plan.index import Link

__all__ = ["Target", "admits_python", "best_wheel", "by_version", "pythons_of", "version_of"]

_MACHINES = {"linux/amd64": "x86_64", "linux/arm64": "aarch64"}
# Older names of the same platforms, by PEP 600.
_LEGACY = {(2, 17): "manylinux2014", (2, 12): "manylinux2010", (2, 5): "manylinux1"}
_OLDEST_MINOR = 5
_FIRST_PYTHON, _NEWEST_PYTHON = 8, 14


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where wheels must run: `python` "3.11", `platform` "linux/amd64", `glibc` "2.36"."""

    python: str
    platform: str
    glibc: str

    @property
    def machine(self) -> str:
        """`x86_64` or `aarch64`; raises InputError for a platform that images aren't made for."""
        if self.platform not in _MACHINES:
            msg = f"platform {self.platform!r} is not known"
            raise InputError(msg, fix=f"use one of: {', '.join(_MACHINES)}")
        return _MACHINES[self.platform]

    @property
    def interpreter(self) -> str:
        """As wheels call it: `cp311`."""
        return f"cp{self.python.replace('.', '')}"

    @property
    def tags(self) -> dict[Tag, int]:
        """All tags that run there, by preference (0 is best), in pip's and uv's order."""
        return _tags(self.python, self.machine, self.glibc)


@lru_cache(maxsize=64)
def _tags(python: str, machine: str, glibc: str) -> dict[Tag, int]:
    version = Version(python)
    pair = (version.major, version.minor)
    interpreter = f"cp{version.major}{version.minor}"
    platforms = _platforms(machine, glibc)
    ordered = [
        *cpython_tags(python_version=pair, abis=[interpreter], platforms=platforms),
        *compatible_tags(python_version=pair, interpreter=interpreter, platforms=platforms),
    ]
    return {tag: rank for rank, tag in reversed(list(enumerate(ordered)))}


def _platforms(machine: str, glibc: str) -> list[str]:
    """`manylinux_2_36_x86_64` and everything older; built here: packaging knows only its host's."""
    parsed = Version(glibc)
    names = [f"linux_{machine}"]  # first, as in packaging and pip
    for minor in range(parsed.minor, _OLDEST_MINOR - 1, -1):
        names.append(f"manylinux_{parsed.major}_{minor}_{machine}")
        legacy = _LEGACY.get((parsed.major, minor))
        # manylinux1 and 2010 were only ever defined for Intel machines
        if legacy is not None and (machine == "x86_64" or minor >= 17):
            names.append(f"{legacy}_{machine}")
    return names


@lru_cache(maxsize=16384)
def _parsed(filename: str) -> tuple[tuple[int, str] | tuple[()], frozenset[Tag]] | None:
    try:
        _, _, build, tags = parse_wheel_filename(filename)
    except (InvalidWheelFilename, InvalidVersion):
        return None
    return build, tags


@lru_cache(maxsize=16384)
def version_of(filename: str) -> Version | None:
    """Of a wheel or sdist file name, None where it holds none. Cheap: index pages have thousands of names."""
    if filename.endswith(".whl"):
        text = filename.split("-", 2)[1] if filename.count("-") >= 4 else ""
    else:
        text = filename.removesuffix(".tar.gz").removesuffix(".zip").rpartition("-")[2]
    return _version(text)


@lru_cache(maxsize=4096)
def _version(text: str) -> Version | None:
    try:
        return Version(text)
    except InvalidVersion:
        return None


def by_version(links: Iterable[Link]) -> dict[Version, list[Link]]:
    """Newest first; files without a version are left out."""
    found: dict[Version, list[Link]] = {}
    for link in links:
        version = version_of(link.filename)
        if version is not None:
            found.setdefault(version, []).append(link)
    return dict(sorted(found.items(), reverse=True))


def best_wheel(links: Iterable[Link], target: Target) -> Link | None:
    """The file of one version that an installer would take: best tag, then highest build number."""
    best: tuple[tuple[int, tuple[int, str] | tuple[()]], Link] | None = None
    ranks = target.tags
    for link in links:
        parsed = _parsed(link.filename) if link.filename.endswith(".whl") else None
        if parsed is None:
            continue
        build, tags = parsed
        rank = min((ranks[tag] for tag in tags if tag in ranks), default=None)
        if rank is None:
            continue
        key = (-rank, build)
        if best is None or key > best[0]:
            best = (key, link)
    return best[1] if best else None


def pythons_of(links: Iterable[Link], target: Target, *, glibc: str | None = None) -> tuple[str, ...]:
    """Pythons ("3.9", …) for which one of these files is a usable wheel on the target's platform."""
    files = list(links)
    # An abi3 or py3 wheel fits every later Python; those that nobody has released yet are no help.
    named = [int(minor) for link in files for minor in re.findall(r"cp3(\d+)", link.filename)]
    found = []
    for minor in range(_FIRST_PYTHON, max([*named, _NEWEST_PYTHON]) + 1):
        there = Target(python=f"3.{minor}", platform=target.platform, glibc=glibc or target.glibc)
        link = best_wheel(files, there)
        if link is not None and admits_python(link.requires_python, there.python):
            found.append(there.python)
    return tuple(found)


def admits_python(requires_python: str | None, python: str) -> bool:
    """Requires-Python against "3.11" (any patch of it); an unreadable one doesn't exclude, as in pip."""
    if not requires_python:
        return True
    try:
        return SpecifierSet(requires_python).contains(f"{python}.99", prereleases=True)
    except InvalidSpecifier:
        return True
