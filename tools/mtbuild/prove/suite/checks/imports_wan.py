"""Every module of `wan` imports, and every public name is there (V71.1: cannot import name 'configs')."""

from __future__ import annotations

import pkgutil
import time
import traceback
from importlib import import_module, metadata
from importlib.util import find_spec

from result import CheckResult, Context, failed, passed, skipped

ID = "imports.wan"
TIERS = ("cpu", "gpu")
LIMIT_S = 300


def run(ctx: Context) -> CheckResult:
    """Walk the package; for each module resolve all that its `__all__` promises."""
    if find_spec("wan") is None:
        if not ctx.request["runtime"]:
            return skipped("the image is not meant to hold the runtime")
        return failed(
            "the image holds no package `wan`",
            diagnosis="the wheel multitalk-runtime was not installed",
            fix="build the image with its runtime wheel",
        )
    started = time.monotonic()
    package = import_module("wan")
    broken, names, modules = [], 0, ["wan"]
    for found in pkgutil.walk_packages(package.__path__, "wan.", onerror=lambda name: None):
        modules.append(found.name)
    for name in modules:
        try:
            module = import_module(name)
            for public in getattr(module, "__all__", ()):
                names += 1
                getattr(module, public)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            broken.append(f"{name}: {type(error).__name__}: {error} ({frame.filename}:{frame.lineno})")
    if broken:
        return failed(
            f"{len(broken)} of {len(modules)} modules of wan do not import: {broken[0]}"[:500],
            detail="\n".join(broken),
            diagnosis="a name that a module promises or uses is not there, or a package it "
            "needs is missing in the image",
            fix="build the wheel from a tree whose tests pass; add what is missing to the "
            "root pyproject.toml",
        )
    try:
        version = metadata.version("multitalk-runtime")
    except metadata.PackageNotFoundError:
        return failed(
            "`wan` imports, but the distribution multitalk-runtime is not installed",
            diagnosis="the files were copied into the image, so neither their version nor "
            "their hashes are known",
            fix="install the wheel",
        )
    return passed(
        f"{len(modules)} modules and {names} public names of wan {version}, from {package.__path__[0]}",
        wan__modules=len(modules),
        wan__version=version,
        wan__import_s=round(time.monotonic() - started, 3),
    )
