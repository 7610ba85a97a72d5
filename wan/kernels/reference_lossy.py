"""What the lossy kernels compute, in plain PyTorch: fp32 (or fp64) inside, rounded once to 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..quant import eager_rows as quantize_rows
from . import reference
from .reference import wide_of

Rows = tuple[Tensor, Tensor]


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


def head_extremes(x: Tensor) -> Tensor:
    """Least, greatest and mean over the tokens of x [B, L, N, D] → [3, B, N, D]."""
    wide = wide_of(x)
    return torch.stack((wide.amin(1), wide.amax(1), wide.mean(1)))


def quantize_heads(x: Tensor, centre: Tensor, inverse: Tensor) -> Tensor:
    """(x - centre)·inverse within ±448 in e4m3: x [B, L, N, D], centre [B, N, D], inverse [B, N]."""
    dtype = torch.float8_e4m3fn
    top = torch.finfo(dtype).max
    value = (wide_of(x) - centre[:, None]) * inverse[:, None, :, None]
    return value.clamp(-top, top).to(dtype, memory_format=torch.contiguous_format)
