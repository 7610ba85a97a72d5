"""Floors and windows that no wheel tells: read from `data/floors.json`, each with its source."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

__all__ = [
    "Floor",
    "compiler_need",
    "driver_floor",
    "driver_reaches",
    "family_driver",
    "numpy_window",
    "stable_abi",
    "toolkit_driver",
    "torch_floor",
    "undeclared",
]

Floor = tuple[str, str]  # (value, source)


@lru_cache(maxsize=1)
def _data() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(
        files("mtbuild.plan").joinpath("data/floors.json").read_text(encoding="utf-8")
    )
    return data


def stable_abi(package: str, version: str) -> str | None:
    """The source that says its native code outlives the torch it was built for, None where nothing does."""
    for entry in _data()["stable_abi"]:
        if entry["package"] == package and Version(version) >= Version(entry["since"]):
            return str(entry["source"])
    return None


def torch_floor(package: str, version: str) -> Floor | None:
    """(lowest torch, source) in which this release's native code loads, where its wheel does not tell."""
    for entry in _data()["torch_floor"]:
        if entry["package"] == package and _within(version, entry["versions"]):
            return entry["torch"], entry["source"]
    return None


def undeclared(package: str, version: str) -> tuple[Floor, ...]:
    """(requirement, source) for each project that this release imports and its wheel does not ask for."""
    return tuple(
        (entry["needs"], entry["source"])
        for entry in _data()["undeclared"]
        if entry["package"] == package and _within(version, entry["versions"])
    )


def numpy_window(torch: str) -> Floor:
    """(specifier, source) of the numpy that a torch, and MultiTalk on it, can have."""
    for entry in _data()["numpy"]:
        if _within(torch, entry["versions"]):
            return entry["numpy"], entry["source"]
    raise AssertionError  # the last entry holds for every torch


def driver_floor(
    *, cuda: str | None, triton: str | None = None, sm: str | None = None, extensions: tuple[str, ...] = ()
) -> Floor | None:
    """(lowest driver branch, source): the highest of torch's CUDA, its extensions' CUDA and Triton's ptxas.

    `cuda` and `extensions` are CUDA versions ("12.6"), `sm` the GPU's compute capability. None: a CPU build.
    """
    drivers = _data()["drivers"]
    asked = [(Version(text).major, drivers["source"]) for text in (cuda, *extensions) if text]
    if triton is not None and sm is not None:
        for entry in _data()["ptxas"]:
            if _within(triton, entry["triton"]) and _within(sm, entry["sm"]):
                asked.append((Version(entry["cuda"]).major, entry["source"]))
                break
    known = [
        (drivers["minimum"][str(major)].partition(".")[0], source)
        for major, source in asked
        if str(major) in drivers["minimum"]
    ]
    return max(known, key=lambda floor: int(floor[0]), default=None)


def family_driver(cuda: str) -> Floor | None:
    """(first driver of the family that runs this CUDA's whole major version, source); None: not known."""
    drivers = _data()["drivers"]
    found = drivers["minimum"].get(str(Version(cuda).major))
    return (found, drivers["source"]) if found else None


def toolkit_driver(cuda: str) -> Floor | None:
    """(driver that shipped with this CUDA, source): below it, minor-version compatibility limits apply."""
    drivers = _data()["drivers"]
    found = drivers["toolkit"].get(cuda)
    return (found, drivers["source"]) if found else None


def driver_reaches(driver: str, floor: str) -> bool:
    """Whether `driver` ("580.65") is at least `floor` ("580.65.06"), as far as both are spelled out."""
    have, need = Version(driver).release, Version(floor).release
    shared = min(len(have), len(need))
    return have[:shared] >= need[:shared]


def compiler_need(triton: str) -> tuple[str, str] | None:
    """(what Triton says without a C compiler, source); None for a Triton that is not known to need one."""
    entry = _data()["compiler"]
    return (entry["message"], entry["source"]) if _within(triton, entry["versions"]) else None


def _within(version: str, specifier: str) -> bool:
    return SpecifierSet(specifier, prereleases=True).contains(Version(version))
