"""Every module of a package, imported, with all that its `__all__` promises."""

from __future__ import annotations

import pkgutil
import traceback
from dataclasses import dataclass
from importlib import import_module, metadata

from result import CheckResult, failed

DISTRIBUTION = "multitalk-runtime"


@dataclass(frozen=True)
class Walk:
    """What came of it. `broken` has one line a module, with the place where it broke."""

    modules: list
    names: int
    broken: list
    place: str


def walk(package: str) -> Walk:
    """Import `package` and all below it. A module that ends the process's Python is caught too."""
    top = import_module(package)
    modules, names, broken = [package], 0, []
    for found in pkgutil.walk_packages(top.__path__, f"{package}.", onerror=lambda name: None):
        modules.append(found.name)
    for name in modules:
        try:
            module = import_module(name)
            for public in getattr(module, "__all__", ()):
                names += 1
                getattr(module, public)
        except (Exception, SystemExit) as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            broken.append(f"{name}: {type(error).__name__}: {error} ({frame.filename}:{frame.lineno})")
    return Walk(modules, names, broken, next(iter(top.__path__)))


def not_installed(package: str) -> CheckResult:
    """The result of a check whose package the image lacks."""
    return failed(
        f"the image holds no package `{package}`",
        diagnosis=f"the wheel {DISTRIBUTION} was not installed",
        fix="build the image with its runtime wheel",
    )


def do_not_import(package: str, found: Walk) -> CheckResult:
    """The result of a check that found broken modules."""
    return failed(
        f"{len(found.broken)} of {len(found.modules)} modules of {package} do not import: {found.broken[0]}"[
            :500
        ],
        detail="\n".join(found.broken),
        diagnosis="a name that a module promises or uses is not there, or a package it needs is missing "
        "in the image",
        fix="build the wheel from a tree whose tests pass; add what is missing to the root pyproject.toml",
    )


def version() -> str | None:
    """Of the runtime's distribution; None if its files are there without it."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return None


def without_metadata(package: str) -> CheckResult:
    """The result of a check that found the files, and no distribution that they belong to."""
    return failed(
        f"`{package}` imports, but the distribution {DISTRIBUTION} is not installed",
        diagnosis="the files were copied into the image, so neither their version nor their hashes are known",
        fix="install the wheel",
    )
