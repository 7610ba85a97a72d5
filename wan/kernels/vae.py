"""The VAE's channel RMS norm and SiLU in one pass, for both memory layouts of [B, C, T, H, W]."""

# No postponed annotations: the interpreter of triton 3.0 and 3.1 knows a constexpr by its annotation alone.

import triton
import triton.language as tl
from torch import Tensor, channels_last_3d, contiguous_format, empty_like

from ._launch import next_power_of_2


@triton.jit
def rms_norm_silu_kernel(
    x, gamma, out, positions, total, root,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """One program BLOCK_P of the `total` = B·positions, each with all its channels; root = √C."""
    position = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.arange(0, BLOCK_C)
    if CHANNELS_LAST:
        offset = position[:, None] * C + channel[None, :]
    else:
        sample = position // positions
        offset = (sample * C * positions + position % positions)[:, None] + channel[None, :] * positions
    mask = (position < total)[:, None] & (channel < C)[None, :]
    value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    norm = tl.maximum(tl.sqrt(tl.sum(value * value, axis=1)), 1e-12)
    g = tl.load(gamma + channel, mask=channel < C, other=0.0).to(tl.float32)
    value = value * (root / norm)[:, None] * g[None, :]
    value = value / (1.0 + tl.exp(-value))
    tl.store(out + offset, value.to(out.dtype.element_ty), mask=mask)


def rms_norm_silu(x: Tensor, gamma: Tensor, out: Tensor | None = None) -> Tensor:
    """SiLU of the VAE's RMS norm: x [B, C, T, H, W], contiguous or channels_last_3d (kept); gamma [C].

    `out`, of x's shape, dtype and layout, is written and returned.

    Reference: `wan.kernels.reference.rms_norm_silu`.
    """
    batch, channels, *spatial = x.shape
    last = x.is_contiguous(memory_format=channels_last_3d) and not x.is_contiguous()
    if not last and not x.is_contiguous():
        msg = f"rms_norm_silu: x must be contiguous or channels_last_3d, got strides {x.stride()}"
        raise ValueError(msg)
    out = empty_like(x) if out is None else _like(out, x, last=last)
    positions = spatial[0] * spatial[1] * spatial[2]
    block_c = next_power_of_2(channels)
    block_p = max(1, 4096 // block_c)
    total = batch * positions
    rms_norm_silu_kernel[(-(-total // block_p),)](
        x, gamma.reshape(-1), out, positions, total, channels**0.5,
        C=channels, BLOCK_C=block_c, BLOCK_P=block_p, CHANNELS_LAST=last, num_warps=4,
    )  # fmt: skip
    return out


def _like(out: Tensor, x: Tensor, *, last: bool) -> Tensor:
    layout = channels_last_3d if last else contiguous_format
    same = out.shape == x.shape and out.dtype == x.dtype and out.is_contiguous(memory_format=layout)
    if not same:
        got = f"{tuple(out.shape)} {out.dtype} with strides {out.stride()}"
        msg = f"rms_norm_silu: out must be like x, {tuple(x.shape)} {x.dtype}, got {got}"
        raise ValueError(msg)
    return out
