"""Every kernel compiles cold by the JIT, runs on the GPU and gives the reference's numbers."""

from __future__ import annotations

import os
import time
from importlib.util import find_spec

from result import CheckResult, Context, failed, passed

ID = "triton.jit"
TIERS = ("gpu",)
LIMIT_S = 300

_HELD = 512 << 20  # bytes of GPU memory that the host must see this container hold


def run(ctx: Context) -> CheckResult:
    """Launch each in a cache asserted empty; hold memory until the host has seen it."""
    if find_spec("triton") is None:
        return failed(
            "triton is not installed", diagnosis="the image is incomplete", fix="lock triton beside torch"
        )
    cache = ctx.fresh("jit")
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    os.environ.pop("TRITON_INTERPRET", None)
    import torch
    from kernels import all_kernels, error_of, runs_on

    before = sum(1 for _ in cache.rglob("*"))
    held = torch.ones(_HELD, dtype=torch.uint8, device="cuda")
    errors, first, started = {}, None, time.monotonic()
    major, minor = torch.cuda.get_device_capability()
    for kernel in all_kernels():
        if not runs_on(kernel, 10 * major + minor):
            continue
        try:
            error, allowed = error_of(kernel, "cuda")
        except Exception as problem:
            text = f"{type(problem).__name__}: {problem}"
            return failed(
                f"{kernel.name} does not run: {text.splitlines()[0]}"[:500],
                detail=text[-3000:],
                **_cause(text),
            )
        first = first or time.monotonic() - started
        if error > allowed:
            return failed(
                f"{kernel.name} is off by {error:.3g} of the largest value; {allowed:.3g} is allowed",
                diagnosis="the kernel is compiled wrongly for this GPU, or is wrong",
                fix="compare triton.interpret; try the triton that torch pins",
            )
        errors[kernel.name] = error
    torch.cuda.synchronize()
    seconds = time.monotonic() - started
    written = sum(1 for _ in cache.rglob("*.cubin"))
    if before or not written:
        return failed(
            f"not a cold compile: {before} files in the cache before, {written} cubins after",
            diagnosis="TRITON_CACHE_DIR is not where Triton writes",
            fix="unset TRITON_CACHE_MANAGER and TRITON_OVERRIDE_DIR in the image",
        )
    seen = _wait_for_host(ctx)
    del held
    return passed(
        f"{len(errors)} kernels compiled cold and ran in {seconds:.1f} s (first {first:.1f} s); all agree",
        triton_jit__error=errors,
        triton_jit__first_s=round(first, 3),
        triton_jit__seconds=round(seconds, 3),
        triton_jit__cubins=written,
        triton_jit__cache_was_empty=True,
        triton_jit__host_saw_memory=seen,
    )


def _wait_for_host(ctx: Context) -> bool:
    """Until the host has put its mark into the out folder: it has then read this process's GPU memory."""
    mark, end = ctx.out / "gpu-seen", time.monotonic() + ctx.request["hold_s"]
    while not mark.exists() and time.monotonic() < end:
        time.sleep(0.05)
    return mark.exists()


def _cause(text: str) -> dict:
    """Diagnosis and fix of the failures that are known here (each was met on a real host)."""
    known = (
        (
            "Failed to find C compiler",
            "the image has no C compiler for Triton's launcher",
            "add gcc and libc6-dev to the image (compiler: true)",
        ),
        (
            "0 active drivers",
            "Triton found no backend: triton-*.dist-info (entry points) is missing, or torch sees no GPU",
            "install triton from its wheel, with its metadata",
        ),
        (
            "ldconfig",
            "the image has no /etc/ld.so.cache",
            "RUN ldconfig in the image, or set TRITON_LIBCUDA_PATH",
        ),
        (
            "failed to map segment",
            "the cache is mounted noexec",
            "--tmpfs /cache:rw,exec,mode=1777",
        ),
        (
            "no kernel image is available",
            "no machine code for this GPU in the image",
            "take a cell whose targets name it",
        ),
        (
            "device kernel image is invalid",
            "the driver is older than the ptxas that made the cubin",
            "a newer driver, or a cell with an older triton",
        ),
        (
            "returned non-zero exit status",
            "the image's compiler does not work",
            "see the checks compiler and headers",
        ),
    )
    for signature, diagnosis, fix in known:
        if signature in text:
            return {"diagnosis": diagnosis, "fix": fix}
    return {
        "diagnosis": "Triton can't run a kernel on this GPU",
        "fix": "`mtbuild diagnose` may know the text under detail",
    }
