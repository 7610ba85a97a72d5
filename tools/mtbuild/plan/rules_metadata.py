"""Rules 1 and 2: what tags and metadata say. Each is a function of (cell, facts); pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from packaging.version import Version

from mtbuild.plan.cell import Finding
from mtbuild.plan.floors import numpy_window
from mtbuild.plan.pairs import worst
from mtbuild.plan.requires import conflicts, target_of, wishes
from mtbuild.plan.select import specifiers
from mtbuild.plan.tags import admits_python

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mtbuild.plan.cell import Cell
    from mtbuild.plan.facts import CellFacts
    from mtbuild.plan.select import Missing
    from mtbuild.plan.wheels import WheelFacts

__all__ = ["cuda_named", "files", "fix_for_torch", "markers", "numpy", "requires_dist", "requires_python"]


def files(cell: Cell, facts: CellFacts) -> Iterator[Finding]:
    """1: every pin has a wheel for this Python, platform and C library."""
    for gone in facts.missing:
        message, fix = _no_wheel(cell, gone)
        had = f"; it has {', '.join(gone.tags)}" if gone.why == "platform" else ""
        python = f", Requires-Python: {gone.requires_python}" if gone.requires_python else ""
        none = "no wheel at all, source only" if gone.why == "sdist" else f"no wheel for {cell.platform}"
        pythons = f"wheels for Python {', '.join(gone.pythons)}" if gone.pythons else none
        yield Finding(
            rule="tags" if gone.why != "platform" else "platform",
            severity="refused",
            message=message,
            source=f"index page of {gone.name}: {gone.name} {gone.wanted} has {pythons}{python}{had}",
            fix=fix,
        )


def _no_wheel(cell: Cell, gone: Missing) -> tuple[str, str]:
    what = f"{gone.name} {gone.wanted}"
    target = target_of(cell)
    if gone.why == "sdist":
        return (
            f"{what} has no wheel: it would be compiled during the build, which images never do",
            f"serve a {gone.name} wheel built for this cell from an index of your own, or leave it out "
            "(the model here does not need it)",
        )
    if gone.why == "platform":
        return (
            f"{what} has no wheel for glibc {cell.base.glibc} of base {cell.base.name} "
            f"(platform tag manylinux_{cell.base.glibc.replace('.', '_')}_{target.machine})",
            "take a base with a newer C library: glibc 2.28 (Debian 10, RHEL 8) or later carries this family",
        )
    if not gone.pythons:
        return f"{what} has no wheel for {cell.platform}", f"leave {gone.name} out, or take another version"
    fix = f"take Python {_nearest(gone.pythons, cell.python)}"
    if gone.name == "torch" and gone.versions:  # triton and xformers follow torch, so no other of them helps
        fix += f", or a torch that has wheels for {cell.python}: {', '.join(gone.versions[:3])}"
    only = ", ".join(gone.pythons)
    return f"{what} has no wheel for Python {cell.python} ({target.interpreter}), only for {only}", fix


def _nearest(pythons: tuple[str, ...], python: str) -> str:
    """The smallest step from what the cell has; the older one of two."""
    here = Version(python).minor
    return min(pythons, key=lambda text: (abs(Version(text).minor - here), Version(text).minor))


def requires_python(cell: Cell, facts: CellFacts) -> Iterator[Finding]:
    """1: Requires-Python, where the tags alone (`py3-none-any`, abi3) would admit too much."""
    for wheel in facts.wheels:
        asked = wheel.requires_python
        if not admits_python(asked, cell.python):
            yield Finding(
                rule="requires-python",
                severity="refused",
                message=f"{wheel.name} {wheel.version} requires Python {asked}; this cell has {cell.python}",
                source=f"{wheel.filename}: Requires-Python: {asked}",
                fix=f"take a Python that {asked} admits",
            )


def requires_dist(cell: Cell, facts: CellFacts) -> Iterator[Finding]:
    """2: what the pinned wheels ask of each other, whether or not the installer is told to look away."""
    for conflict in conflicts(facts.wheels, _versions(cell, facts), target_of(cell)):
        wheel, wish = conflict.wheel, conflict.wish
        hidden = (
            f" (no_deps hides this from the installer, not from {wheel.name}'s native code)"
            if wheel.name in cell.no_deps
            else ""
        )
        yield Finding(
            rule="requires-dist",
            severity="refused",
            message=f"{wheel.name} {wheel.version} requires {wish.name}{wish.specifier}; "
            f"this cell has {wish.name} {conflict.version}{hidden}",
            source=f"{wheel.filename}: Requires-Dist: {wish.line}",
            fix=fix_for_torch(cell, facts)
            if (wheel.name, wish.name) == ("xformers", "torch")
            else f"take {wish.name}{wish.specifier}, or another {wheel.name}",
        )


def fix_for_torch(cell: Cell, facts: CellFacts) -> str:
    """Which xformers fits this torch, among the releases that ask for it; else which torch this one fits."""
    torch = facts.wheel("torch")
    releases = [a for a in facts.alternatives if a.name == "xformers"]
    good = [a for a in releases if torch is None or worst(torch, a) == "fits"]
    if good:
        names = " or ".join(f"xformers {a.version}" for a in good[:2])
        return f"{names}, whose metadata says {_line(good[0], 'torch', cell)}"
    mine = facts.wheel("xformers")
    built = mine.cpp_lib.torch if mine is not None and mine.cpp_lib is not None else None
    instead = (
        f"; or torch {Version(built).base_version}, which xformers {mine.version} was built for"
        if (mine is not None and built)
        else ""
    )
    half = [a for a in releases if torch is not None and worst(torch, a) == "degraded"]
    if half:
        return f"xformers {half[0].version} with `allow: [degraded]`{instead}"
    return f"no released xformers fits torch {cell.torch}: leave xformers out{instead}"


def _line(wheel: WheelFacts, name: str, cell: Cell) -> str:
    lines = [w.line for w in wishes(wheel.requires_dist, target_of(cell)) if w.applies and w.name == name]
    return f"Requires-Dist: {lines[0]}" if lines else f"nothing of {name}"


def markers(cell: Cell, facts: CellFacts) -> Iterator[Finding]:
    """2: a marker that leaves Triton out on this Python says that torch.compile does not work there."""
    torch = facts.wheel("torch")
    if torch is None:
        return
    named = [wish for wish in wishes(torch.requires_dist, target_of(cell)) if wish.name == "triton"]
    if named and not any(wish.applies for wish in named):
        yield Finding(
            rule="marker",
            severity="refused",
            message=f"torch {cell.torch} does not bring triton on Python {cell.python}, {cell.platform}: "
            "@torch.compile, which MultiTalk uses, fails there at run time",
            source=f"{torch.filename}: Requires-Dist: {named[0].line}",
            fix="take a Python that the marker admits, or a newer torch",
        )


def cuda_named(cell: Cell, facts: CellFacts) -> Iterator[Finding]:
    """2: the cell's `cuda` is the one that the index's torch wheel was really built for."""
    torch = facts.wheel("torch")
    if torch is None or torch.cuda == cell.cuda:
        return
    real = f"CUDA {torch.cuda}" if torch.cuda else "no CUDA at all (a CPU build)"
    yield Finding(
        rule="cuda",
        severity="refused",
        message=f"this cell says CUDA {cell.cuda}, but torch {cell.torch} of this index is built for {real}",
        source=f"{torch.filename}: torch/version.py: "
        f"__version__ = {torch.local_version!r}, cuda = {torch.cuda!r}",
        fix=f'write cuda: "{torch.cuda}"'
        if torch.cuda
        else "configure an index that serves CUDA builds of torch",
    )


def numpy(cell: Cell, facts: CellFacts) -> Iterator[Finding]:
    """2: torch's metadata has no numpy bound, so the bound is ours."""
    pinned = facts.wheel("numpy")
    if pinned is None:
        return
    window, source = numpy_window(cell.torch)
    if not specifiers(window).contains(Version(pinned.version)):
        yield Finding(
            rule="numpy",
            severity="refused",
            message=f"numpy {pinned.version} does not go with torch {cell.torch}: numpy{window} is needed",
            source=source,
            fix=f'pin numpy "{window}" (1.26.4 is the last of them)',
        )


def _versions(cell: Cell, facts: CellFacts) -> dict[str, str]:
    """What the cell has of each pin: the file found, else the pin itself where it is a version."""
    versions = {wheel.name: wheel.version for wheel in facts.wheels}
    for name, pin in cell.pins.items():
        if pin[:1].isdigit():
            versions.setdefault(name, pin)
    return versions
