"""Every module of `wan` imports, and every public name is there (V71.1: cannot import name 'configs')."""

from __future__ import annotations

import time
from importlib.util import find_spec

from packages import do_not_import, not_installed, version, walk, without_metadata
from result import CheckResult, Context, passed, skipped

ID = "imports.wan"
TIERS = ("cpu", "gpu")
LIMIT_S = 300


def run(ctx: Context) -> CheckResult:
    """Walk the package; for each module resolve all that its `__all__` promises."""
    if find_spec("wan") is None:
        return (
            not_installed("wan")
            if ctx.request["runtime"]
            else skipped("the image is not meant to hold the runtime")
        )
    started = time.monotonic()
    found = walk("wan")
    if found.broken:
        return do_not_import("wan", found)
    if (installed := version()) is None:
        return without_metadata("wan")
    return passed(
        f"{len(found.modules)} modules and {found.names} public names of wan {installed}, from {found.place}",
        wan__modules=len(found.modules),
        wan__version=installed,
        wan__import_s=round(time.monotonic() - started, 3),
    )
