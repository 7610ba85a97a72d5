"""The image's C compiler, found and called the way Triton does it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

NO_COMPILER = {
    "diagnosis": "Triton builds its driver module and launchers with a C compiler when the program runs; "
    "this image has none (V72's failure)",
    "fix": "add gcc and libc6-dev to the image (compiler: true), or layer the flavour `minimal` on it",
}


def c_compiler() -> list[str] | None:
    """`CC` if it is set, else gcc, else clang: the order of triton/runtime/build.py. None if none runs."""
    chosen = os.environ.get("CC")
    words = shlex.split(chosen) if chosen else [shutil.which("gcc") or shutil.which("clang") or ""]
    return words if words and words[0] and shutil.which(words[0]) else None


def cxx_compiler() -> list[str] | None:
    """`CXX` if it is set, else g++, else clang++: what torch inductor calls for CPU code."""
    chosen = os.environ.get("CXX")
    words = shlex.split(chosen) if chosen else [shutil.which("g++") or shutil.which("clang++") or ""]
    return words if words and words[0] and shutil.which(words[0]) else None


def build(compiler: list[str], source: Path, *flags: str) -> tuple[Path | None, str]:
    """`source` as a shared object beside it. (path, output), path None if the compiler said no."""
    target = source.with_suffix(".so")
    done = subprocess.run(
        [*compiler, str(source), "-O3", "-shared", "-fPIC", "-Wno-psabi", "-o", str(target), *flags],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=100,
    )
    return (target if done.returncode == 0 else None), done.stdout + done.stderr


def python_include() -> Path:
    """Where Python.h should be, as Triton asks for it: Debian patches the default scheme."""
    scheme = sysconfig.get_default_scheme()
    return Path(sysconfig.get_paths(scheme="posix_prefix" if scheme == "posix_local" else scheme)["include"])
