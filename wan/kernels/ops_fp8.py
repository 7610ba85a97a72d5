"""`FUSED_FP8`: the fused operations whose results go into fp8 linears, in fp8 at once (`wan.kernels.fp8`)."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from ..quant import Fp8Rows, fp8_product, joined
from . import fp8
from .ops import FUSED


def layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6) -> Fp8Rows:
    """LN(x)·(1 + scale) + shift in fp8."""
    return Fp8Rows(*fp8.layer_norm_modulate_quantize(x, scale, shift, eps=eps), dtype=x.dtype)


def gate_residual_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *,
    modulate: bool,
    eps: float = 1e-6,
) -> tuple[Tensor, Fp8Rows]:
    """(x + y·gate, its norm in fp8)."""
    out, data, step = fp8.gate_residual_norm_quantize(x, y, gate, scale, shift, modulate=modulate, eps=eps)
    return out, Fp8Rows(data, step, dtype=x.dtype)


def qkv(attention: nn.Module, x: Fp8Rows) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of one quantised input, by one product if `wan.quant.speed_up` joined them."""
    whole = joined((attention.q, attention.k, attention.v))
    if whole is not None:
        return fp8_product(x, *whole).chunk(3, dim=-1)
    return attention.q(x), attention.k(x), attention.v(x)


def ffn(layers: nn.Sequential, x: Fp8Rows) -> Tensor:
    """Linear, then GELU and rounding to fp8 in one pass over the hidden layer, then the second linear."""
    first, _, last = layers
    hidden = first(x)
    return last(Fp8Rows(*fp8.gelu_quantize_rows(hidden), dtype=x.dtype))


FUSED_FP8 = replace(
    FUSED,
    name="triton, fp8",
    layer_norm_modulate=layer_norm_modulate,
    gate_residual_norm=gate_residual_norm,
    qkv=qkv,
    ffn=ffn,
    wide=FUSED,
)
