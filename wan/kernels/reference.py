"""What each kernel computes, in plain PyTorch: fp32 (or fp64) inside, one rounding at the end.

The reference model rounds to bf16 between the steps (norm → bf16 → weight → bf16 → rotation); one rounding at
the end stays closer to the fp32 model. Shapes: rows L, channels C = heads·D.
Source: specification §4.2 (WanRMSNorm, WanLayerNorm, RoPE on interleaved pairs), §4.5 (VAE RMS norm).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu


def wide_of(x: Tensor) -> Tensor:
    """fp64 stays fp64 (so the same code is the fp64 reference); all else computes in fp32."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, *, eps: float = 1e-6) -> Tensor:
    """RMSNorm over all C channels, then rotation of interleaved pairs head by head.

    x [B, L, C], weight [C], cos and sin [L, D/2] → [B, L, C] in x's dtype.
    """
    wide = wide_of(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)
    return rope(normed, cos, sin).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotation of interleaved pairs head by head: x [B, L, C], cos and sin [L, D/2]."""
    wide = wide_of(x)
    batch, rows, channels = x.shape
    pairs = wide.view(batch, rows, -1, cos.shape[-1], 2)  # [B, L, heads, D/2, 2]
    cos, sin = (t.to(wide.dtype)[None, :, None, :] for t in (cos, sin))
    even, odd = pairs.unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.view(batch, rows, channels).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6) -> Tensor:
    """x / rms(x) · weight over all channels: x [B, L, C], weight [C]."""
    wide = wide_of(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)).to(
        x.dtype
    )


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6) -> Tensor:
    """LayerNorm with fp32 statistics and affine: x [B, L, C], weight and bias [C]."""
    return _affine(wide_of(x), weight, bias, eps).to(x.dtype)


def layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6) -> Tensor:
    """LN(x)·(1 + scale) + shift: x [B, L, C], scale and shift [B, 1, C] fp32."""
    wide = wide_of(x)
    return _affine(wide, 1 + scale.to(wide.dtype), shift, eps).to(x.dtype)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    """x + y·gate (gate [B, 1, C] fp32; None adds y as it is), rounded once."""
    wide = wide_of(x)
    return (wide + (wide_of(y) if gate is None else wide_of(y) * gate.to(wide.dtype))).to(x.dtype)


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
    """(x', n): x' = x + y·gate; n = norm of x' as stored, by `modulate` ·(1 + scale) or ·scale, + shift."""
    out = gate_residual(x, y, gate)
    norm = (
        layer_norm_modulate(out, scale, shift, eps=eps)
        if modulate
        else layer_norm(out, scale, shift, eps=eps)
    )
    return out, norm


def bias_softmax(scores: Tensor, bias: Tensor, heads: int) -> Tensor:
    """softmax over each head's keys: scores [T, S, heads·M], bias [T, 1, heads·M]."""
    weights = (wide_of(scores) + wide_of(bias)).unflatten(-1, (heads, -1)).softmax(-1)
    return weights.flatten(-2).to(scores.dtype)


def rms_norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """SiLU(x / max(‖x‖₂, 1e-12) · √C · gamma) over the channels: x [B, C, T, H, W], gamma [C, 1, 1, 1]."""
    wide = wide_of(x)
    channels = x.shape[1]
    scale = channels**0.5 / wide.square().sum(1, keepdim=True).sqrt().clamp_min(1e-12)
    return silu(wide * scale * gamma.to(wide.dtype).view(1, channels, 1, 1, 1)).to(x.dtype)


def _affine(wide: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return normed * weight.to(wide.dtype) + bias.to(wide.dtype)
