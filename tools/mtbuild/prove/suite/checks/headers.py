"""The headers that a launcher includes: Python.h of this very Python, libc's, and Triton's own cuda.h."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from result import CheckResult, Context, failed, passed
from toolchain import build, c_compiler, python_include

ID = "headers"
TIERS = ("cpu", "gpu")
LIMIT_S = 60


def run(ctx: Context) -> CheckResult:
    """Look for each, then compile a file that includes all of them."""
    include = python_include()
    if not (include / "Python.h").is_file():
        return failed(
            f"Python.h is not in {include}",
            diagnosis="Triton compiles against this Python's headers: main.c: fatal error: "
            "Python.h: No such file or directory",
            fix=f"install the headers of this Python (Debian: "
            f"python{include.name.removeprefix('python')}-dev)",
        )
    flags = [f"-I{include}"]
    lines = ["#include <Python.h>", "#include <stdlib.h>", "#include <stdio.h>", "#include <dlfcn.h>"]
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        cuda = Path(triton.origin).parent / "backends/nvidia/include"
        if not (cuda / "cuda.h").is_file():
            return failed(
                f"Triton's own cuda.h is not in {cuda}",
                diagnosis="the installed triton is not whole: its backends/nvidia/include "
                "is part of the wheel",
                fix="install triton from its wheel, unchanged",
            )
        flags.append(f"-I{cuda}")
        lines.append('#include "cuda.h"')
    compiler = c_compiler()
    if compiler is None:
        return failed(
            "the headers of Python are there, but nothing can be compiled against them",
            diagnosis="no C compiler (see the check `compiler`)",
            fix="add gcc and libc6-dev to the image",
        )
    source = ctx.fresh("headers") / "headers.c"
    source.write_text("\n".join(lines) + "\nlong version(void) { return PY_VERSION_HEX; }\n")
    library, output = build(compiler, source, *flags)
    if library is None:
        return failed(
            "a file that includes Python.h, libc's headers and cuda.h does not compile",
            detail=output,
            diagnosis="libc6-dev is only recommended by Debian's gcc: --no-install-recommends drops it",
            fix="install libc6-dev beside gcc",
        )
    return passed(f"Python.h ({include}), libc and cuda.h compile")
