"""What this card gives to a large copy and to each linear of the model: sustained, random data, with
clocks.
"""

from __future__ import annotations

from typing import Any

import torch
from setting import Scale
from watch import sustained


def ceilings(device: torch.device, size: Scale, warm_s: float = 1.5) -> dict[str, Any]:
    """copy in TB/s (bytes read plus written); linears in TFLOP/s, each kept up and as its first calls ran."""
    generator = torch.Generator(device).manual_seed(5)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

    d, f, tokens = size.config["dim"], size.config["ffn_dim"], size.tokens
    out: dict[str, Any] = {"copy": copy_rate(randn(2**28 if device.type == "cuda" else 2**16), device)}
    for inner, outer in ((d, 3 * d), (d, d), (d, f), (f, d)):
        x, w, b = randn(tokens, inner), randn(outer, inner), randn(outer)
        work = 2 * tokens * inner * outer / 1e9
        rows = {"": lambda: torch.nn.functional.linear(x, w, b)}  # noqa: B023
        if inner == f:  # the slowest: try whether it is the order of memory
            turned = w.t().contiguous().t()
            rows["_columns"] = lambda: torch.nn.functional.linear(x, turned, b)  # noqa: B023
            halves = x.chunk(2)
            rows["_half_rows"] = lambda: [torch.nn.functional.linear(p, w, b) for p in halves]  # noqa: B023
        if (inner, outer) == (d, f) and device.type == "cuda":
            rows["_gelu"] = lambda: torch._addmm_activation(b, x, w.t(), use_gelu=True)  # noqa: B023
        for name, function in rows.items():
            row = sustained(function, device, warm_s=warm_s, run_s=0.7)
            rates = {"tflops": round(work / row["ms"], 1), "first_tflops": round(work / row["first_ms"], 1)}
            out[f"linear_{inner}_{outer}{name}"] = row | rates
    return out


def copy_rate(source: torch.Tensor, device: torch.device) -> dict[str, Any]:
    target = torch.empty_like(source)
    row = sustained(lambda: target.copy_(source), device, warm_s=0.3, run_s=0.3)
    return row | {"tb_s": round(2 * source.nbytes / row["ms"] / 1e9, 3)}
