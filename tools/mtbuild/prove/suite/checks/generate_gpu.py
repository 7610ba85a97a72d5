"""The same on the GPU with the production kernels: Triton's in use, xFormers among those compared."""

from __future__ import annotations

import os
import time

from result import CheckResult, Context

from checks.generate import make

ID = "generate.gpu"
TIERS = ("gpu",)
LIMIT_S = 600


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
