"""What the lossy kernels compute, in plain PyTorch: fp32 (or fp64) inside, rounded once to 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import reference

Rows = tuple[Tensor, Tensor]
FP8_MAX = 448.0


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def quantize_rows(x: Tensor) -> Rows:
    """x [..., C] → (data float8_e4m3fn, scale [..., 1] fp32) with scale = max|row| / 448 (1 for zeros)."""
    wide = _wide(x)
    scale = wide.abs().amax(-1, keepdim=True) / FP8_MAX
    scale = torch.where(scale > 0, scale, 1.0)
    return (wide / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale.float()


def gelu_quantize_rows(x: Tensor) -> Rows:
    """`quantize_rows` of GELU (tanh)."""
    return quantize_rows(F.gelu(_wide(x), approximate="tanh"))


def layer_norm_modulate_quantize(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6) -> Rows:
    """`quantize_rows` of LN(x)·(1 + scale) + shift, not rounded in between."""
    wide = _wide(x)
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
    return out, *quantize_rows(norm(_wide(out), scale, shift, eps=eps))
