"""What a cell pins beside torch, triton and xformers: is it that release, and does it import?

Whoever pins flash-attn 3 wants it, and the model would take cuDNN without a word if it did not load. Each
distribution is imported in a process of its own, after torch and without the suite's folder on the path: its
modules may be called like ours, print, start threads or processes, end theirs, or crash.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from processes import ending, finish

LIMIT_S = 60
SUITE = Path(__file__).resolve().parent
NOT_FOR_USE = {"setup", "conftest", "test", "tests", "docs", "examples", "benchmarks", "scripts"}
DRIVERS = re.compile(r"lib(cuda|nvcuvid|nvoptix|nvidia-[\w-]+)\.so")  # come with a GPU, not with an image
IMPORT = """
import importlib, os, sys
answer, suite, *names = sys.argv[1:]
sys.path[:] = [place for place in sys.path if place not in ("", suite)]
kind = said = ""
try:
    import torch  # whose libraries a native module may need, as in any program that uses it
except BaseException:
    pass
for name in names:
    try:
        importlib.import_module(name)
    except BaseException as error:
        # dlopen's errors have no errno; a file or program that is absent has one
        unloaded = isinstance(error, OSError) and error.errno is None
        kind = "loader" if isinstance(error, ImportError) or unloaded else "other"
        said = f"{name}: {type(error).__name__}: " + " ".join(str(error).split())
        break
with open(answer, "w") as file:
    file.write(f"{kind}\\n{said[:300]}")
os._exit(0)  # whatever it started
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
    """Version by metadata, then an import. On tier cpu only what the loader says proves anything, and not of
    the driver's libraries: a package may look for a GPU. Tier gpu decides."""
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
    if tier == "cpu" and (kind == "other" or DRIVERS.search(said)):
        return Pin(name, have, note=f"does not import without a GPU: {said}")
    return Pin(name, have, wrong=f"{name} {have} is installed and does not import: {said}")


def modules(files) -> list:
    """The modules at a distribution's top: packages and Python files, then native ones, which may need the
    former."""
    python, native = set(), set()
    for file in files:
        first, last = file.parts[0], file.parts[-1]
        if len(file.parts) == 2 and last == "__init__.py":
            python.add(first)
        elif len(file.parts) == 1 and first.endswith(".py"):
            python.add(first[:-3])
        elif len(file.parts) == 1 and first.endswith(tuple(EXTENSION_SUFFIXES)):
            native.add(first.partition(".")[0])
    native = {name for name in native - python if not name.startswith("lib")}
    found = [*sorted(python), *sorted(native)]
    return [name for name in found if name.isidentifier() and name not in NOT_FOR_USE]


def import_apart(names: list) -> tuple:
    """(kind of error, what it says), both empty if all of them import. Kinds: "loader" (a module or library
    is absent, or for another torch), "crash", "other"."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer")
        process = subprocess.Popen(
            [sys.executable, "-c", IMPORT, str(answer), str(SUITE), *names],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
            start_new_session=True,
        )
        late = finish(process, LIMIT_S)
        if answer.exists():
            kind, _, said = answer.read_text().partition("\n")
            return kind, said
    if late:
        return "other", f"{', '.join(names)}: not imported within {LIMIT_S} s"
    return "crash", f"{', '.join(names)}: importing ended the process with {ending(process)}"


def same_release(one: str, other: str) -> bool:
    """Whether two versions are the same but for local parts: 2.2 and 2.2.0+cu126. In an image without
    `packaging` (a foreign one, under `minimal`) they must be spelled alike."""
    try:
        from packaging.version import Version
    except ImportError:
        return one.partition("+")[0] == other.partition("+")[0]
    return Version(Version(one).public) == Version(Version(other).public)
