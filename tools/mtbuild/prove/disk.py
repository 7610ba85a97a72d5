"""Free space before a build: how much is missing, where, what can be removed (V70 ran out of it halfway)."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mtbuild.errors import InfrastructureError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from mtbuild.plan.lock import Lock

__all__ = ["Need", "NotEnoughSpace", "needs", "outlook", "preflight"]

GB = 10**9
_SYSTEM = 900_000_000  # bytes: Debian's packages and the compiler, unpacked
_PACKED = 0.55  # of what is unpacked, as zstd layers (measured: docs/benchmarks/build.json)
_RESERVE = 1 * GB  # logs, the daemon's own, and room for the rest of the machine


class NotEnoughSpace(InfrastructureError):  # noqa: N818 - named for what it says
    """Raised before anything is downloaded. `missing` is bytes, `where` the file system's folder."""

    def __init__(self, message: str, *, missing: int, folder: Path, fix: str) -> None:
        super().__init__(message, fix=fix)
        self.missing = missing
        self.folder = folder


@dataclass(frozen=True, kw_only=True)
class Need:
    """So many bytes under a folder, and what for."""

    folder: Path
    size: int
    purpose: str


def needs(
    lock: Lock,
    where: Path,
    *,
    wheels: Path | None = None,
    registry: Path | None = None,
    built: Collection[str] = (),
) -> tuple[Need, ...]:
    """What a build takes: `where` is the engine's data, `wheels` the cache, `registry` an embedded one's.

    Wheels whose sha256 is in `built` are in layers that the engine has. The engine holds a wheel three times
    (as a file for the build, unpacked in a layer, and that layer packed), and once more where it runs.
    """
    fresh = [wheel for wheel in lock.wheels if wheel.sha256 not in built]
    packed_wheels = sum(wheel.size for wheel in fresh)
    unpacked = sum(wheel.unpacked_size or int(wheel.size * 1.9) for wheel in fresh)
    unpacked += _SYSTEM if not built else 0
    packed = int(unpacked * _PACKED)
    found = [
        Need(folder=where, size=packed_wheels, purpose="wheels for the build"),
        Need(folder=where, size=2 * unpacked, purpose="layers, and their unpacked copy to run"),
        Need(folder=where, size=packed, purpose="packed layers"),
    ]
    if wheels is not None:
        missing = sum(w.size for w in fresh if not (wheels / w.sha256 / w.filename).is_file())
        found.append(Need(folder=wheels, size=missing, purpose="wheels to download"))
    if registry is not None:
        found.append(Need(folder=registry, size=packed, purpose="packed layers in the registry"))
    return tuple(need for need in found if need.size)


def preflight(
    lock: Lock,
    where: Path,
    *,
    wheels: Path | None = None,
    registry: Path | None = None,
    built: Collection[str] = (),
    reserve: int = _RESERVE,
) -> None:
    """NotEnoughSpace, unless every file system that the build writes to has room for all of it at once."""
    wanted = needs(lock, where, wheels=wheels, registry=registry, built=built)
    for device in sorted({_device(need.folder) for need in wanted}):
        here = [need for need in wanted if _device(need.folder) == device]
        folder = _existing(here[0].folder)
        free = shutil.disk_usage(folder).free
        total = sum(need.size for need in here) + reserve
        if free >= total:
            continue
        parts = ", ".join(f"{need.size / GB:.1f} GB {need.purpose}" for need in here)
        msg = (
            f"{_gb(total - free)} missing on the file system of {folder}: "
            f"{lock.name or lock.cell_id} needs {_gb(total)} ({parts}), {_gb(free)} are free"
        )
        fix = _removable(lock, where, wheels, registry) + ", or put them on a larger disk (MTBUILD_CACHE)"
        raise NotEnoughSpace(msg, missing=total - free, folder=folder, fix=fix)


def outlook(
    locks: Sequence[Lock],
    where: Path,
    *,
    wheels: Path | None = None,
    registry: Path | None = None,
    built: Collection[str] = (),
) -> tuple[str, ...]:
    """The disk plan of several builds in a row, a line a file system: what each adds, and what is free.

    A wheel that cells share counts at the first of them. Nothing is refused here: each build looks again.
    """
    have = set(built)
    added: dict[int, list[tuple[str, int, Path]]] = {}
    for lock in locks:
        for need in needs(lock, where, wheels=wheels, registry=registry, built=have):
            part = (lock.name or lock.cell_id, need.size, need.folder)
            added.setdefault(_device(need.folder), []).append(part)
        have |= {wheel.sha256 for wheel in lock.wheels}
    lines = []
    for parts in added.values():
        folder = _existing(parts[0][2])
        names = list(dict.fromkeys(name for name, _, _ in parts))
        each = ", ".join(f"{name} {_gb(sum(n for k, n, _ in parts if k == name))}" for name in names)
        total, free = sum(size for _, size, _ in parts) + _RESERVE, shutil.disk_usage(folder).free
        fits = "fits" if total <= free else f"{_gb(total - free)} missing, so not all of them will be built"
        lines.append(f"disk plan: {each}; {_gb(total)} in all at {folder}, {_gb(free)} free: {fits}")
    return tuple(lines)


def _removable(lock: Lock, where: Path, wheels: Path | None, registry: Path | None) -> str:
    """What can go, largest first, with its size where that is cheap to tell."""
    kept = {wheel.sha256 for wheel in lock.wheels}
    found = []
    if wheels is not None and wheels.is_dir():
        others = sum(_size(folder) for folder in wheels.iterdir() if folder.name not in kept)
        if others:
            found.append((others, f"wheels of other cells under {wheels} ({_gb(others)})"))
    if registry is not None and registry.is_dir():
        staged = _size(registry)
        if staged:
            how = "`mtbuild engine clean --registry`: all that was published and the engine's images go too"
            found.append((staged, f"the registry in {registry} ({_gb(staged)}; {how})"))
    texts = [text for _, text in sorted(found, reverse=True)]
    texts.append("unused images and build cache (`mtbuild engine prune`)")
    return f"remove, on {where}'s machine: " + "; ".join(texts)


def _size(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(place) / name).lstat().st_size
            except OSError:
                continue  # removed meanwhile
    return total


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def _device(folder: Path) -> int:
    return _existing(folder).stat().st_dev


def _gb(size: int) -> str:
    return f"{size / GB:.1f} GB"
