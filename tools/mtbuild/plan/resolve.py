"""Requirements into exact wheels, by `uv pip compile`: the resolver that knows every marker and extra."""

from __future__ import annotations

import re
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from packaging.markers import Marker
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

from mtbuild.errors import CommandError, InfrastructureError, InputError, MtbuildError
from mtbuild.plan.index import Link
from mtbuild.plan.tags import Target, best_wheel
from mtbuild.proc import run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mtbuild.plan.cell import Cell
    from mtbuild.plan.index import Index

__all__ = ["Resolved", "resolve", "uv_program"]

_COMPILE_S = 600
_UV_GLIBC = (17, 28, *range(31, 41))  # the manylinux_2_N that uv knows as platforms


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """One project's chosen wheel; `uploaded` is seconds since 1970, 0 where the index does not say."""

    name: str
    version: str
    link: Link
    uploaded: int


def resolve(
    requirements: Sequence[str], cell: Cell, index: Index, *, deps: bool = True
) -> tuple[Resolved, ...]:
    """The wheels for a cell's Python, platform and C library, one a project, sorted by name.

    With `deps` off, only the named projects. Raises InputError with uv's words where nothing fits, and
    InfrastructureError where the index can't be reached.
    """
    target = Target(python=cell.python, platform=cell.platform, glibc=cell.base.glibc)
    environment = _environment(target)
    chosen = [
        _best(package, target, cell)
        for package in _compile(requirements, cell, target, index, deps=deps)
        if "marker" not in package or Marker(package["marker"]).evaluate(environment)
    ]
    return tuple(sorted(chosen, key=lambda one: one.name))


def _compile(
    requirements: Sequence[str], cell: Cell, target: Target, index: Index, *, deps: bool
) -> list[dict[str, Any]]:
    """Packages of uv's pylock (PEP 751); in a fresh file, as an old one would be read as preferences."""
    minor = max((n for n in _UV_GLIBC if n <= Version(target.glibc).minor), default=_UV_GLIBC[0])
    with tempfile.TemporaryDirectory(prefix="mtbuild-lock-") as temporary:
        wanted, fresh = Path(temporary, "requirements.in"), Path(temporary, "pylock.toml")
        wanted.write_text("".join(f"{line}\n" for line in requirements), encoding="utf-8")
        options = [] if deps else ["--no-deps"]
        try:
            run(
                [
                    uv_program(), "pip", "compile", wanted, "--format=pylock.toml", f"--output-file={fresh}",
                    "--no-build", "--no-header", "--quiet", f"--python={sys.executable}",
                    f"--python-version={target.python}",
                    f"--python-platform={target.machine}-manylinux_2_{minor}", *options,
                ],
                timeout_s=_COMPILE_S,
                env={**index.uv_env(), "UV_PYTHON_DOWNLOADS": "never", "UV_NO_PROGRESS": "1"},
            )  # fmt: skip
        except CommandError as error:
            raise _refused(error, cell) from error
        document = tomllib.loads(fresh.read_text(encoding="utf-8"))
    packages: list[dict[str, Any]] = document.get("packages", [])
    return packages


def _refused(error: CommandError, cell: Cell) -> MtbuildError:
    """uv's own words, as our kind of error: a conflict is the matrix's fault, anything else the machine's."""
    words = re.sub(r"\s+", " ", re.sub(r"[×╰─▶⚠├│]", " ", error.output)).strip()
    if "No solution found" in words:
        fix = f"`mtbuild suggest --torch {cell.torch}` names versions that fit"
        return InputError(words, where=cell.where or cell.name, fix=fix)
    msg = f"uv can't resolve {cell.name}: {words or error.message}"
    fix = "check the package index of this machine (uv's settings, or pip's index-url), then try again"
    return InfrastructureError(msg, fix=fix)


def _best(package: dict[str, Any], target: Target, cell: Cell) -> Resolved:
    links: dict[Link, int] = {}
    for wheel in package.get("wheels", ()):
        url = str(wheel.get("url") or wheel.get("path") or "").partition("#")[0]
        uploaded = wheel.get("upload-time")
        link = Link(
            filename=wheel.get("name") or unquote(url.rpartition("/")[2]),
            url="",  # an address is the machine's business and must not reach a file
            sha256=wheel.get("hashes", {}).get("sha256"),
            size=wheel.get("size"),
            requires_python=None,
            yanked=False,
        )
        links[link] = int(uploaded.timestamp()) if uploaded is not None else 0
    name = canonicalize_name(package["name"])
    link_or_none = best_wheel(links, target)
    if link_or_none is None:
        what = f"{name} {package.get('version', '')}"
        msg = f"{what} has no wheel for Python {target.python} and glibc {target.glibc}"
        raise InputError(
            msg, where=cell.where or cell.name, fix="choose another version, Python or base for this cell"
        )
    link = link_or_none
    if link.sha256 is None or link.size is None:
        lacks = "hash" if link.sha256 is None else "size"
        msg = f"the index does not tell the {lacks} of {link.filename}"
        raise InfrastructureError(
            msg, fix="use an index that serves the JSON form of the simple API (PEP 691, 700)"
        )
    return Resolved(
        name=name, version=str(parse_wheel_filename(link.filename)[1]), link=link, uploaded=links[link]
    )


def _environment(target: Target) -> dict[str, str]:
    """The marker environment of the image, not of this machine."""
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


def uv_program() -> Path:
    """The uv of this environment: the wheel that mtbuild depends on, whatever else is on PATH."""
    from uv import find_uv_bin

    return Path(find_uv_bin())
