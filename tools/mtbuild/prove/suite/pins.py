"""What a cell pins beside torch, triton and xformers: is it that release, and does it import?

Whoever pins flash-attn 3 wants it, and the model would take cuDNN without a word if it did not load. Each
distribution is imported in a process of its own, without the suite's folder on the path: its modules may be
called like ours, print, end the process, or crash.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

LIMIT_S = 60
SUITE = Path(__file__).resolve().parent
NOT_FOR_USE = {"setup", "conftest", "test", "tests", "docs", "examples", "benchmarks", "scripts"}
SAYS = "mtbuild-pin:"
IMPORT = f"""
import importlib, sys
sys.path[:] = [place for place in sys.path if place not in ("", {str(SUITE)!r})]
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except BaseException as error:
        kind = "loader" if isinstance(error, (ImportError, OSError)) else "other"
        said = name + ": " + type(error).__name__ + ": " + " ".join(str(error).split())
        print("\\n{SAYS}" + kind + ":" + said[:300])
        sys.exit(1)
print("\\n{SAYS}")
"""


@dataclass(frozen=True)
class Pin:
    """What there is of one pinned distribution. `wrong`: why the image is not as the cell says; `note`: what
    could not be tried here."""

    name: str
    version: str | None
    wrong: str = ""
    note: str = ""


def look(name: str, wanted: str, *, tier: str) -> Pin:
    """Version by metadata, then an import. On tier cpu an error that is not the loader's proves nothing: the
    package may look for a GPU; tier gpu decides."""
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return Pin(name, None, wrong=f"the cell has {name} {wanted}, the image none")
    have = found.version
    if not same_release(have, wanted):
        return Pin(name, have, wrong=f"the cell has {name} {wanted}, the image {have}")
    if found.files is None:
        return Pin(name, have, wrong=f"{name} {have} has no list of its files (RECORD): it was not installed")
    names = modules(found.files)
    if not names:
        return Pin(name, have, note="not imported: it holds no module")
    kind, said = import_apart(names)
    if not said:
        return Pin(name, have)
    # "loader": a module or library is absent, or is for another torch. The driver's own comes with a GPU.
    if tier == "cpu" and (kind != "loader" or "libcuda.so" in said):
        return Pin(name, have, note=f"does not import without a GPU: {said}")
    return Pin(name, have, wrong=f"{name} {have} is installed and does not import: {said}")


def modules(files) -> list:
    """The modules and packages at a distribution's top: Python files, native ones, folders with either."""
    tops = set()
    for file in files:
        first, last = file.parts[0], file.parts[-1]
        if len(file.parts) == 1 and (first.endswith(".py") or re.search(r"\.(so|abi3\.so)$", first)):
            tops.add(first.partition(".")[0])
        elif len(file.parts) == 2 and last == "__init__.py":
            tops.add(first)
    return sorted(top for top in tops if top.isidentifier() and top not in NOT_FOR_USE)


def import_apart(names: list) -> tuple:
    """(kind of error, what it says), both empty if all of them import."""
    command = [sys.executable, "-c", IMPORT, *names]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=LIMIT_S,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        )
    except subprocess.TimeoutExpired:
        return "loader", f"{', '.join(names)}: not imported within {LIMIT_S} s"
    text = done.stdout.decode("utf-8", "replace")
    said = [line[len(SAYS) :] for line in text.splitlines() if line.startswith(SAYS)]
    if not said:
        end = f"signal {-done.returncode}" if done.returncode < 0 else f"status {done.returncode}"
        return "loader", f"{', '.join(names)}: importing ended the process with {end}"
    kind, _, words = said[-1].partition(":")
    return kind, words


def same_release(one: str, other: str) -> bool:
    """Whether two versions are the same but for local parts and trailing zeros: 2.2 and 2.2.0+cu126."""
    return _key(one) == _key(other)


def _key(version: str) -> tuple:
    public = str(version).partition("+")[0].lower()
    release = re.match(r"\d+(\.\d+)*", public)
    if release is None:
        return (public,)
    numbers = [int(number) for number in release[0].split(".")]
    while numbers[-1:] == [0]:
        numbers.pop()
    return (tuple(numbers), public[release.end() :])
