"""Triton's driver module and a launcher are compiled by the image's own compiler and load, without a GPU.

This is where V72 died ("Failed to find C compiler"). A stand-in libcuda, made here in the cache, exports the
driver functions that the modules link against; nothing in it is called.
"""

from __future__ import annotations

import ctypes
import os
import re
import time
from importlib.util import find_spec
from pathlib import Path

from result import CheckResult, Context, failed, passed
from toolchain import NO_COMPILER, build, c_compiler

ID = "triton.stub"
TIERS = ("cpu", "gpu")
LIMIT_S = 180


def run(ctx: Context) -> CheckResult:
    """Build the stand-in, then let Triton build and load what it needs to launch a kernel."""
    found = find_spec("triton")
    if found is None or found.origin is None:
        return failed(
            "triton is not installed",
            diagnosis="nothing to launch kernels with",
            fix="lock triton beside torch",
        )
    folder = ctx.fresh("stub")
    os.environ.update(TRITON_CACHE_DIR=str(folder / "cache"), TRITON_LIBCUDA_PATH=str(folder))
    os.environ.pop("TRITON_INTERPRET", None)
    nvidia = Path(found.origin).parent / "backends/nvidia"
    problem = _stand_in(folder, nvidia)
    if problem:
        return failed(
            "a stand-in libcuda can't be compiled",
            detail=problem,
            diagnosis="the image's compiler does not work (see the check `compiler`)",
            fix="install gcc and libc6-dev from the distribution",
        )
    started = time.monotonic()
    try:
        modules = _build_modules(ctx)
    except Exception as error:
        detail = f"{type(error).__name__}: {error}"
        if "Failed to find C compiler" in detail or isinstance(error, FileNotFoundError):
            return failed(str(error).splitlines()[0], detail=detail, **NO_COMPILER)
        return failed(
            f"Triton can't build its launcher: {detail.splitlines()[0]}",
            detail=detail,
            diagnosis="the compiler, Python.h, libc's headers or the linker are not whole "
            "(the output says which)",
            fix="see the checks compiler, headers and ldconfig; `mtbuild diagnose` reads the output",
        )
    seconds = time.monotonic() - started
    return passed(
        f"Triton built and loaded {' and '.join(modules)} in {seconds:.1f} s",
        triton_stub__seconds=round(seconds, 3),
    )


def _stand_in(folder: Path, nvidia: Path) -> str:
    """libcuda.so.1 with every cu* name that Triton's sources mention, loaded. The problem, or nothing."""
    compiler = c_compiler()
    if compiler is None:
        return ""  # go on: Triton's own words for it are the better message
    texts = [
        path.read_text(encoding="utf-8", errors="replace")
        for path in (nvidia / "driver.c", nvidia / "driver.py")
    ]
    names = sorted(set(re.findall(r"\bcu[A-Z]\w+", "\n".join(texts))))
    source = folder / "libcuda.c"
    source.write_text("".join(f"int {name}() {{ return 0; }}\n" for name in names))
    library, output = build(compiler, source, "-Wl,-soname,libcuda.so.1", "-w")
    if library is None:
        return output
    library.rename(folder / "libcuda.so.1")
    (folder / "libcuda.so").symlink_to("libcuda.so.1")  # Triton up to 3.5 links -lcuda
    ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)  # so that what is built resolves to it
    return ""


def _build_modules(ctx: Context) -> list:
    """Let Triton compile and load its driver module, and a launcher for a compiled kernel."""
    from kernels import compile_for, source
    from own_kernels import KERNELS
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher
    from triton.runtime import driver

    driver.set_active(
        CudaDriver()
    )  # from 3.7 on, a launcher asks the active driver; without a GPU there is none
    kernel = KERNELS[0]
    compiled = compile_for(kernel, int(ctx.targets[0].replace(".", "")))
    CudaLauncher(source(kernel), compiled.metadata)
    return ["its driver module", "a launcher"]
