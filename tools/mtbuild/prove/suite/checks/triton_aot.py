"""Every kernel compiles ahead of time, cold, to a cubin for every capability of the cell; no GPU needed."""

from __future__ import annotations

import os
import re
import time
from importlib.util import find_spec

from result import CheckResult, Context, failed, passed

ID = "triton.aot"
TIERS = ("cpu", "gpu")
LIMIT_S = 600

_EM_CUDA = 190  # e_machine of a cubin (ELF)


def run(ctx: Context) -> CheckResult:
    """Compile into a cache that is asserted empty, and read the cubins as ELF."""
    if find_spec("triton") is None:
        return failed(
            "triton is not installed",
            diagnosis="torch's wheel asks for it, but with --no-deps or on a Python that "
            "its marker skips it is missing",
            fix="lock triton at the version that torch's metadata pins",
        )
    cache = ctx.fresh("aot")
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    os.environ.pop("TRITON_INTERPRET", None)
    before = sum(1 for _ in cache.rglob("*"))
    from kernels import all_kernels, compile_for, runs_on

    kernels = all_kernels()
    sizes, started, first = {}, time.monotonic(), None
    for kernel in kernels:
        for target in ctx.targets:
            capability = int(target.replace(".", ""))
            if not runs_on(kernel, capability):
                continue
            try:
                compiled = compile_for(kernel, capability)
                cubin, ptx = compiled.asm["cubin"], compiled.asm["ptx"]
            except Exception as error:
                return failed(
                    f"{kernel.name} does not compile for {target}: {type(error).__name__}",
                    detail=str(error)[-3000:],
                    diagnosis=_diagnosis(error),
                    fix="take a Triton whose ptxas knows this capability, or take the target out of the cell",
                )
            first = first or time.monotonic() - started
            wrong = _cubin_problem(cubin, ptx, capability)
            if wrong:
                return failed(
                    f"{kernel.name} for {target}: {wrong}",
                    diagnosis="what came out of ptxas is no machine code for this GPU",
                    fix="install triton from its wheel, with its own ptxas (unset TRITON_PTXAS_PATH)",
                )
            sizes[f"{kernel.name}@{target}"] = len(cubin)
    seconds = time.monotonic() - started
    written = len({path.parent.name for path in cache.rglob("*.cubin")})
    if before or not written:
        return failed(
            f"not a cold compile: {before} files in the cache before, {written} kernels after",
            diagnosis="TRITON_CACHE_DIR is not where Triton writes (a cache manager or an override is set)",
            fix="unset TRITON_CACHE_MANAGER, TRITON_OVERRIDE_DIR and TRITON_KERNEL_OVERRIDE in the image",
        )
    return passed(
        f"{len(kernels)} kernels × {len(ctx.targets)} capabilities compiled cold to cubins "
        f"in {seconds:.1f} s",
        triton_aot__kernels=[kernel.name for kernel in kernels],
        triton_aot__targets=ctx.targets,
        triton_aot__cubin_bytes=sizes,
        triton_aot__first_s=round(first, 3),
        triton_aot__seconds=round(seconds, 3),
        triton_aot__cache_was_empty=True,
    )


def _cubin_problem(cubin: bytes, ptx: str, capability: int) -> str:
    if cubin[:4] != b"\x7fELF" or cubin[4] != 2:
        return "the cubin is no 64-bit ELF file"
    if int.from_bytes(cubin[18:20], "little") != _EM_CUDA:
        return "the cubin's ELF machine is not CUDA"
    target = re.search(r"\.target\s+sm_(\d+)", ptx)
    if target is None or int(target.group(1)) != capability:
        return f"the PTX is for {target.group(0) if target else 'no target'}"
    return ""


def _diagnosis(error: Exception) -> str:
    text = str(error)
    if "Cannot find ptxas" in text or "Permission denied" in text:
        return "Triton's bundled ptxas is missing or not executable"
    if "is not defined for option 'gpu-name'" in text or "gpu-name" in text:
        return "this Triton's ptxas does not know the capability"
    return "Triton's compiler stops on this kernel or this capability"
