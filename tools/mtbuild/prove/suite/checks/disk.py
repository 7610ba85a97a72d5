"""There is room to work: caches and temporary files take real bytes. Leftovers of the build are named."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from result import CheckResult, Context, failed, passed

ID = "disk"
TIERS = ("cpu", "gpu")
LIMIT_S = 90

_MIB = 1 << 20
_NEED = {"cache": 256 * _MIB, "tmp": 128 * _MIB}  # a cold MultiTalk run fills about 40 MiB of caches
_LEFT = ("/root/.cache/pip", "/root/.cache/uv", "/var/cache/apt/archives", "/var/lib/apt/lists")


def run(ctx: Context) -> CheckResult:
    """Write 16 MiB to each place, ask what is left, and add up what a build left behind."""
    free = {}
    for name, folder in (("cache", ctx.cache), ("tmp", Path(tempfile.gettempdir()))):
        block = os.urandom(_MIB)
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                for _ in range(16):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
                file.seek(15 * _MIB)
                whole = file.read() == block
        except OSError as error:
            return failed(
                f"16 MiB can't be written to {folder}: {error.strerror}",
                diagnosis="the place is full, or its quota is",
                fix="give the tmpfs a size of at least 512 MiB",
            )
        free[name] = shutil.disk_usage(folder).free
        if not whole or free[name] < _NEED[name]:
            return failed(
                f"{folder} has {free[name] // _MIB} MiB free; {_NEED[name] // _MIB} MiB are needed",
                diagnosis="compile caches and temporary files of a run do not fit",
                fix="give the tmpfs a larger size, or leave less in the image",
            )
    left = {place: size for place in _LEFT if (size := _size(Path(place))) > _MIB}
    packages = sum(
        _size(Path(place)) for place in sys.path if place.endswith(("site-packages", "dist-packages"))
    )
    note = (
        "; left by the build: " + ", ".join(f"{k} {v // _MIB} MiB" for k, v in left.items()) if left else ""
    )
    return passed(
        f"{free['cache'] // _MIB} MiB for caches, {free['tmp'] // _MIB} MiB for temporary files{note}",
        disk__cache_free=free["cache"],
        disk__tmp_free=free["tmp"],
        disk__packages_bytes=packages,
        disk__leftovers=left,
    )


def _size(folder: Path) -> int:
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.lstat(f"{place}/{name}").st_size
            except OSError:
                continue
    return total
