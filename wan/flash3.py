"""flash-attn 3 (arXiv 2407.08608), from whichever package here carries it: Hopper's fastest exact attention.

| module | distribution |
|---|---|
| `flash_attn_interface` | flash-attn 3 itself, built from its sources |
| `fa3_fwd_interface` | fa3-fwd: its forward alone, for bf16 and fp8; 0.0.2 for CUDA 12, 0.0.3 for CUDA 13 |
| `xformers.ops.fmha.flash3` | xFormers 0.0.29.post3 to 0.0.34 carry a copy |

Layout: q [B, Lq, N, D], k, v [B, Lk, N, D], bf16, D 64, 128 or 256 → [B, Lq, N, D].
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

PACKAGES = ("flash_attn_interface", "fa3_fwd_interface")
XFORMERS = "xformers.ops.fmha.flash3"
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True, kw_only=True)
class Flash3:
    """The forward that was found. source: the module it comes from. descales: whether it takes fp8 with its
    scales.
    """

    source: str
    call: Callable[..., Any]
    descales: bool

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, causal: bool) -> Tensor:
        """softmax(q·kᵀ·scale)·v in bf16."""
        return _first(self.call(q, k, v, softmax_scale=scale, causal=causal))

    def fp8(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, causal: bool) -> Tensor:
        """The same with q, k, v and the weights rounded to e4m3, one scale a head: lossy. Returns bf16."""
        (q8, q_step), (v8, v_step) = by_heads(q), by_heads(v)
        k8, k_step = by_heads(k, centre=True)
        steps = {"q_descale": q_step, "k_descale": k_step, "v_descale": v_step}
        return _first(self.call(q8, k8, v8, softmax_scale=scale, causal=causal, **steps))


def by_heads(x: Tensor, *, centre: bool = False) -> tuple[Tensor, Tensor]:
    """[B, L, N, D] → the same in e4m3 and its step [B, N] in fp32: each head's largest value becomes 448.

    centre: less its mean over tokens. Of keys softmax doesn't see that, and they have channels far from zero
    (SageAttention, arXiv 2410.02367).

    Cost: q, k and v of 40 blocks at L = 33,600 are read twice and written once, 25 ms at 4.1 TB/s.
    Measured on an H200: 31 ms of a forward's 1,850; in PyTorch's own operations it was 117.
    """
    kernels = _kernels(x.device.type)
    low, high, mean = kernels.head_extremes(x)  # [B, N, D] each
    if not centre:
        mean = torch.zeros_like(mean)
    # so small only where a head is zero; 448 / top stays finite
    top = torch.maximum(high - mean, mean - low).amax(-1).clamp(min=1e-30)
    largest = torch.finfo(FP8).max
    return kernels.quantize_heads(x, mean, largest / top), top / largest


@cache
def _kernels(device: str) -> Any:
    """One pass each where Triton can run, the same in PyTorch elsewhere. Loaded when first used: lossy."""
    from .kernels import available

    name = "fp8" if device == "cuda" and available() else "reference_lossy"
    return importlib.import_module(f"{__package__}.kernels.{name}")


@cache
def find() -> tuple[Flash3 | None, dict[str, str]]:
    """(the first that imports or None, module → why it is absent)."""
    absent: dict[str, str] = {}
    for module in PACKAGES:
        try:
            call = importlib.import_module(module).flash_attn_func
        except Exception as error:  # noqa: BLE001  (a library for another CUDA or torch raises what it likes)
            absent[module] = f"{type(error).__name__}: {error}"[:200]
        else:
            return Flash3(source=module, call=call, descales=True), absent
    try:
        fmha = importlib.import_module(XFORMERS.rpartition(".")[0])
        operator = importlib.import_module(XFORMERS).FwOp
        if operator.is_available():
            return Flash3(source=XFORMERS, call=_of_xformers(fmha, operator), descales=False), absent
        absent[XFORMERS] = "this xFormers carries no flash-attn 3"
    except Exception as error:  # noqa: BLE001  (as above)
        absent[XFORMERS] = f"{type(error).__name__}: {error}"[:200]
    return None, absent


def _of_xformers(fmha: Any, operator: Any) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None, causal: bool) -> Tensor:
        bias = fmha.attn_bias.LowerTriangularMask() if causal else None
        out: Tensor = fmha.memory_efficient_attention_forward(
            q, k, v, attn_bias=bias, scale=softmax_scale, op=operator
        )
        return out

    return call


def _first(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Some versions return the log-sum-exp beside the output."""
    return out[0] if isinstance(out, tuple) else out
