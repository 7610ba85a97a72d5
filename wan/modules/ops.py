"""The memory-bound steps of a block, as named functions that fused kernels can take the place of, explicitly.

`EAGER` rounds where the reference implementation rounds (norm → dtype → modulation → dtype). `wan.kernels`
offers the same functions fused, with one rounding at the end; `model.use(ops=…)` chooses. There is no
fallback: kernels that can't run raise.

Shapes: x, y [B, L, C] in the model's dtype; scale, shift, gate [B, 1, C] fp32; weight, bias [C]; cos, sin [L,
D/2] fp32. Source: specification §4.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..fuse import joined
from .rope import rotate


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6) -> Tensor:
    """x / rms(x) over all channels in fp32, rounded to x's dtype, then times weight."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rms_norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, *, eps: float = 1e-6) -> Tensor:
    """RMSNorm over all heads together, then RoPE within each head: [B, L, C] → [B, L, C]."""
    return rope(rms_norm(x, weight, eps=eps), cos, sin)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE within each head of x [B, L, C] by the angles of cos and sin [L, D/2]."""
    heads = x.unflatten(-1, (-1, 2 * cos.shape[-1]))
    return rotate(heads, cos[:, None], sin[:, None]).flatten(-2).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float = 1e-6) -> Tensor:
    """LayerNorm with statistics and affine in fp32, the result in x's dtype."""
    weight, bias = (None if t is None else t.float() for t in (weight, bias))
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(x.dtype)


def layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6) -> Tensor:
    """LN(x)·(1 + scale) + shift, modulated in fp32."""
    return (layer_norm(x, None, None, eps=eps).float() * (1 + scale) + shift).to(x.dtype)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    """x + y·gate in fp32; without a gate a plain sum in x's dtype."""
    return x + y if gate is None else (x.float() + y.float() * gate).to(x.dtype)


def gate_residual_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *,
    modulate: bool,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """(x', n): x' = x + y·gate, n = LayerNorm of x', modulated by scale and shift, or with them as its
    affine.
    """
    x = gate_residual(x, y, gate)
    norm = layer_norm_modulate if modulate else layer_norm
    return x, norm(x, scale, shift, eps=eps)


def qkv(attention: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three linears of self-attention: q, k, v [B, L, C], by one product if `wan.fuse` joined them."""
    whole = joined((attention.q, attention.k, attention.v))
    if whole is not None:
        return F.linear(x, *whole).chunk(3, dim=-1)
    return attention.q(x), attention.k(x), attention.v(x)


def ffn(layers: nn.Sequential, x: Tensor) -> Tensor:
    """Linear, GELU (tanh), Linear."""
    return layers(x)


def absorbed_weights(x: Tensor, keys: Tensor, bias: Tensor, heads: int) -> Tensor:
    """softmax(x·keys + bias) over each head's M keys: x [T, S, C], keys [T, C, heads·M], bias [T, 1, heads·M]
    → [T, S, heads·M].
    """
    scores = torch.baddbmm(bias, x, keys)
    return scores.unflatten(-1, (heads, -1)).softmax(-1).flatten(2)


@dataclass(frozen=True, kw_only=True)
class Ops:
    """The set of functions a model runs; `name` appears in reports. wide: the set to take where no linear
    reads the result, if this one's norms come out in fp8.
    """

    name: str
    rms_norm_rope: Callable[..., Tensor]
    layer_norm_modulate: Callable[..., Tensor]
    gate_residual: Callable[..., Tensor]
    gate_residual_norm: Callable[..., tuple[Tensor, Tensor]]
    rms_norm: Callable[..., Tensor] = rms_norm
    rope: Callable[..., Tensor] = rope
    qkv: Callable[..., tuple[Tensor, Tensor, Tensor]] = qkv
    ffn: Callable[..., Tensor] = ffn
    absorbed_weights: Callable[..., Tensor] = absorbed_weights
    wide: Ops | None = None


EAGER = Ops(
    name="eager",
    rms_norm_rope=rms_norm_rope,
    layer_norm_modulate=layer_norm_modulate,
    gate_residual=gate_residual,
    gate_residual_norm=gate_residual_norm,
)
