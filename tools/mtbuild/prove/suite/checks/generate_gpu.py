"""The same on the GPU with the production kernels: Triton's in use, xFormers among those compared."""

from __future__ import annotations

import os
import time

from result import CheckResult, Context

from checks.generate import kernel_of, make

ID = "generate.gpu"
TIERS = ("gpu",)
LIMIT_S = 600
# distribution → module, in the order in which `wan.flash3` looks; xFormers may carry a copy beside them
FLASH_3 = {"flash-attn-3": "flash_attn_interface", "fa3-fwd": "fa3_fwd_interface"}


def run(ctx: Context) -> CheckResult:
    """A job of 81 frames and 8 steps; comparisons on 21; the fused kernels' frames beside PyTorch's."""
    # before torch and triton are imported: what is in this folder at the end was compiled and launched here
    cache = ctx.fresh("kernels")
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    os.environ.pop("TRITON_INTERPRET", None)
    must = ["math", "efficient"]
    if ctx.cell is not None and ctx.cell["xformers"] is not None and not ctx.request["allow_degraded"]:
        must.append("xformers")

    def kernels(studio, comparison) -> dict:
        import torch
        from generation import Wrong

        from wan.kernels import KERNELS
        from wan.modules.ops import EAGER

        compiled = {path.stem for path in cache.rglob("*.cubin")}
        named = {getattr(kernel.fn, "__name__", None) or kernel.fn.fn.__name__ for kernel in KERNELS}
        used = sorted(compiled & named)
        if not used:
            msg = f"no Triton kernel of wan ran; compiled: {', '.join(sorted(compiled)) or 'nothing'}"
            raise Wrong(
                msg,
                "the model runs without its fused kernels on this GPU",
            )
        unused = missing_flash3(ctx.cell, torch.cuda.get_device_capability(), kernel_of(studio.told))
        if unused:
            raise Wrong(unused, "the pinned kernel does not load on this GPU: see check versions")
        begin = time.monotonic()
        fused = comparison.again()
        seconds = time.monotonic() - begin
        eager = comparison.again(ops=EAGER)
        allowed = comparison.measured["attention_allowed"]
        comparison.same(
            "eager_to_fused", eager, "the fused kernels compute something else", fused, at_most=allowed
        )
        return {"kernels": used, "warm_run_s": round(seconds, 3)}

    return make(ctx, ID, "cuda", job=(81, 8), compared=(21, 2), must=tuple(must), more=kernels)


def missing_flash3(cell: dict | None, capability: tuple, ran: tuple) -> str:
    """What is wrong where a cell pins flash-attn 3, the GPU is a Hopper, and a job's `auto` was not that."""
    pinned = [name for name in FLASH_3 if name in (cell or {}).get("packages", {})]
    if not pinned or tuple(capability) != (9, 0) or tuple(ran) == ("flash_attn_3", FLASH_3[pinned[0]]):
        return ""
    kernel, module = ran
    took = "the runtime does not say what it took" if kernel is None else f"it took {kernel} of {module}"
    return f"the cell pins {pinned[0]}, and attention auto was to be {FLASH_3[pinned[0]]}'s: {took}"
