"""RMSNorm over all heads' channels and the 3-D rotary embedding, in one pass over q (or k)."""

# No postponed annotations: the interpreter of triton 3.0 and 3.1 knows a constexpr by its annotation alone.

import triton
import triton.language as tl
from torch import Tensor, contiguous_format, empty_like

from ._launch import check_rows, next_power_of_2


@triton.jit
def rms_norm_rope_kernel(
    x, weight, cos, sin, out, rows, x_stride, out_stride, eps,
    HEADS: tl.constexpr, HALF: tl.constexpr, HEADS_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """One program a row of [HEADS, 2·HALF] channels; cos and sin [rows, HALF] repeat for every sample."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS_BLOCK)[:, None]
    lane = tl.arange(0, 2 * HALF_BLOCK)[None, :]
    mask = (head < HEADS) & (lane < 2 * HALF)
    offset = head * (2 * HALF) + lane
    value = tl.load(x + row * x_stride + offset, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        mean = tl.sum(tl.sum(value * value, axis=1), axis=0) / (HEADS * 2 * HALF)
        w = tl.load(weight + offset, mask=mask, other=0.0).to(tl.float32)
        value = value * tl.rsqrt(mean + eps) * w
    even, odd = tl.split(tl.reshape(value, (HEADS_BLOCK, HALF_BLOCK, 2)))
    freq = tl.arange(0, HALF_BLOCK)
    base = (row % rows) * HALF + freq
    c = tl.load(cos + base, mask=freq < HALF, other=0.0)[None, :]
    s = tl.load(sin + base, mask=freq < HALF, other=0.0)[None, :]
    rotated = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (HEADS_BLOCK, 2 * HALF_BLOCK))
    tl.store(out + row * out_stride + offset, rotated.to(out.dtype.element_ty), mask=mask)


def rms_norm_rope(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, *, eps: float = 1e-6, out: Tensor | None = None
) -> Tensor:
    """RMSNorm + RoPE of x [B, L, C] (rows may be strided, as in a fused qkv); cos and sin [L, D/2] fp32.

    `out` may be `x` itself. Returns [B, L, C] in x's dtype. Reference: `wan.kernels.reference.rms_norm_rope`.
    """
    return _rope(x, weight, cos, sin, eps, out)


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The rotation alone, as L-RoPE needs it: x [B, L, C], cos and sin [L, D/2] fp32."""
    return _rope(x, None, cos, sin, 0.0, out)


def _rope(
    x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float, out: Tensor | None
) -> Tensor:
    x_stride = check_rows("x", x)
    out = empty_like(x, memory_format=contiguous_format) if out is None else out
    out_stride = check_rows("out", out)
    batch, rows, channels = x.shape
    half = cos.shape[-1]
    if cos.shape != (rows, half) or sin.shape != cos.shape or channels % (2 * half):
        msg = f"rope: x {tuple(x.shape)} wants cos and sin [{rows}, D/2], got {tuple(cos.shape)}"
        raise ValueError(msg)
    heads = channels // (2 * half)
    rms_norm_rope_kernel[(batch * rows,)](
        x, x if weight is None else weight, cos, sin, out, rows, x_stride, out_stride, eps,
        HEADS=heads, HALF=half, HEADS_BLOCK=next_power_of_2(heads), HALF_BLOCK=next_power_of_2(half),
        NORM=weight is not None, num_warps=4,
    )  # fmt: skip
    return out
