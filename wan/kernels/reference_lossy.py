"""What the lossy kernels compute, in plain PyTorch: fp32 (or fp64) inside, rounded once to 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..quant import eager_rows as quantize_rows
from . import reference
from .reference import wide_of

Rows = tuple[Tensor, Tensor]
FP8_MAX = 448.0


def gelu_quantize_rows(x: Tensor) -> Rows:
    """`quantize_rows` of GELU (tanh)."""
    return quantize_rows(F.gelu(wide_of(x), approximate="tanh"))


def layer_norm_modulate_quantize(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6) -> Rows:
    """`quantize_rows` of LN(x)·(1 + scale) + shift, not rounded in between."""
    wide = wide_of(x)
    return quantize_rows(reference.layer_norm_modulate(wide, scale, shift, eps=eps))


def gate_residual_norm_quantize(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *,
    modulate: bool,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x', data, scale): x' = x + y·gate in x's dtype, and its norm (of x' as stored) row by row."""
    out = reference.gate_residual(x, y, gate)
    norm = reference.layer_norm_modulate if modulate else reference.layer_norm
    return out, *quantize_rows(norm(wide_of(out), scale, shift, eps=eps))


def int8_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, fp8: bool = False, smooth: bool = True
) -> Tensor:
    """softmax(q·kᵀ·scale)·v with q and k as int8 holds them, and with `fp8` v as fp8 holds it.

    q [B, Lq, N, D], k, v [B, Lk, N, D]. The weights are not rounded. `smooth` takes the mean of k away.
    """
    factor = (q.shape[-1] ** -0.5 if scale is None else scale) * 1.4426950408889634
    wide_q, wide_k, wide_v = (wide_of(t).transpose(1, 2) for t in (q, k, v))  # [B, N, L, D]
    if smooth:
        wide_k = wide_k - wide_k.mean(2, keepdim=True)
    scores = _int8(wide_q * factor, 32) @ _int8(wide_k, 64).transpose(-1, -2)
    if fp8:
        step = wide_v.abs().amax(2, keepdim=True) / FP8_MAX
        step = torch.where(step > 0, step, 1.0)
        wide_v = (wide_v / step).to(torch.float8_e4m3fn).to(step.dtype) * step
    weights = torch.exp2(scores - scores.amax(-1, keepdim=True))
    out = weights @ wide_v / weights.sum(-1, keepdim=True)
    return out.transpose(1, 2).to(q.dtype).contiguous()


def _int8(x: Tensor, group: int) -> Tensor:
    """x [B, N, L, D] rounded to int8 with one scale for each `group` tokens of a head."""
    rows = x.shape[2]
    padded = F.pad(x, (0, 0, 0, -rows % group)).unflatten(2, (-1, group))
    step = padded.abs().amax((-1, -2), keepdim=True) / 127
    step = torch.where(step > 0, step, 1.0)
    return ((padded / step).round() * step).flatten(2, 3)[:, :, :rows]
