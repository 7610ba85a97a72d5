"""LayerNorm with affine or modulation, and the gated residual with the next norm, in one pass over x.

Each launcher has its namesake in `wan.kernels.reference`.
"""

# No postponed annotations: the interpreter of triton 3.0 and 3.1 knows a constexpr by its annotation alone.

import triton
import triton.language as tl
from torch import Tensor, contiguous_format, empty_like

from ._launch import check_rows, next_power_of_2, per_batch


@triton.jit
def load_row(start, lane, mask):
    """A row in fp32."""
    return tl.load(start + lane, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def add_row(x, y, gate, lane, mask, GATE: tl.constexpr):
    """x + y·gate in fp32, of three rows; without GATE of two."""
    step = load_row(y, lane, mask)
    if GATE:
        step = step * load_row(gate, lane, mask)
    return load_row(x, lane, mask) + step


@triton.jit
def norm_row(value, scale, shift, lane, mask, eps, C: tl.constexpr, MODULATE: tl.constexpr):
    """LN(value)·scale + shift in fp32; MODULATE multiplies by 1 + scale."""
    mean = tl.sum(value, axis=0) / C
    centred = tl.where(mask, value - mean, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / C + eps)
    a = load_row(scale, lane, mask)
    if MODULATE:
        a = a + 1.0
    return normed * a + load_row(shift, lane, mask)


@triton.jit
def layer_norm_kernel(
    x, scale, shift, out, rows, x_stride, scale_stride, shift_stride, eps,
    C: tl.constexpr, BLOCK: tl.constexpr, MODULATE: tl.constexpr,
):  # fmt: skip
    """One program a row; MODULATE multiplies by 1 + scale, else by scale. `rows` = rows of one sample."""
    row = tl.program_id(0).to(tl.int64)
    sample = row // rows
    lane = tl.arange(0, BLOCK)
    mask = lane < C
    value = load_row(x + row * x_stride, lane, mask)
    a, b = scale + sample * scale_stride, shift + sample * shift_stride
    normed = norm_row(value, a, b, lane, mask, eps, C, MODULATE)
    tl.store(out + row * C + lane, normed.to(out.dtype.element_ty), mask=mask)


@triton.jit
def gate_residual_norm_kernel(
    x, y, gate, scale, shift, out, normed_out,
    rows, x_stride, y_stride, gate_stride, scale_stride, shift_stride, eps,
    C: tl.constexpr, BLOCK: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr, MODULATE: tl.constexpr,
):  # fmt: skip
    """out = x + y·gate; with NORM also normed_out = LN(out as stored)·(scale or 1 + scale) + shift."""
    row = tl.program_id(0).to(tl.int64)
    sample = row // rows
    lane = tl.arange(0, BLOCK)
    mask = lane < C
    x_row, y_row = x + row * x_stride, y + row * y_stride
    stored = add_row(x_row, y_row, gate + sample * gate_stride, lane, mask, GATE).to(out.dtype.element_ty)
    tl.store(out + row * C + lane, stored, mask=mask)
    if NORM:
        a, b = scale + sample * scale_stride, shift + sample * shift_stride
        normed = norm_row(stored.to(tl.float32), a, b, lane, mask, eps, C, MODULATE)
        tl.store(normed_out + row * C + lane, normed.to(normed_out.dtype.element_ty), mask=mask)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Affine LayerNorm of x [B, L, C] with fp32 statistics; weight and bias [C]."""
    return _layer_norm(x, weight, bias, eps, modulate=False)


def layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6) -> Tensor:
    """LN(x)·(1 + scale) + shift for x [B, L, C], scale and shift [B, 1, C]."""
    return _layer_norm(x, scale, shift, eps, modulate=True)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor | None = None, *, inplace: bool = False) -> Tensor:
    """x + y·gate for x, y [B, L, C], gate [B, 1, C] or None; rounded once."""
    return _gate_residual(x, y, gate, None, None, 0.0, modulate=False, inplace=inplace)[0]


def gate_residual_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *,
    modulate: bool,
    eps: float = 1e-6,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """(x + y·gate, its LayerNorm with affine or modulation); `inplace` writes the sum over x.

    Four passes over [L, C] (read x and y, write both) instead of nine or more.
    """
    return _gate_residual(x, y, gate, scale, shift, eps, modulate=modulate, inplace=inplace)


def _layer_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float, *, modulate: bool) -> Tensor:
    batch, rows, channels = x.shape
    out = empty_like(x, memory_format=contiguous_format)
    layer_norm_kernel[(batch * rows,)](
        x, scale, shift, out, rows, check_rows("x", x),
        per_batch("scale", scale, batch, channels), per_batch("shift", shift, batch, channels), eps,
        C=channels, BLOCK=next_power_of_2(channels), MODULATE=modulate, num_warps=4,
    )  # fmt: skip
    return out


def _gate_residual(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    *,
    modulate: bool,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    if x.shape != y.shape:
        msg = f"gate_residual: x {tuple(x.shape)} and y {tuple(y.shape)} differ"
        raise ValueError(msg)
    if inplace and not x.is_contiguous():
        msg = f"gate_residual: only a contiguous x can be written in place, got strides {x.stride()}"
        raise ValueError(msg)
    batch, rows, channels = x.shape
    norm = scale is not None
    out = x if inplace else empty_like(x, memory_format=contiguous_format)
    normed = empty_like(out) if norm else out
    vectors = [x if t is None else t for t in (gate, scale, shift)]  # never read where the flag is off
    strides = [
        0 if t is None else per_batch(name, t, batch, channels)
        for name, t in (("gate", gate), ("scale", scale), ("shift", shift))
    ]
    gate_residual_norm_kernel[(batch * rows,)](
        x, y, *vectors, out, normed, rows, check_rows("x", x), check_rows("y", y), *strides, eps,
        C=channels, BLOCK=next_power_of_2(channels), GATE=gate is not None, NORM=norm, MODULATE=modulate,
        num_warps=4,
    )  # fmt: skip
    return out, normed


@triton.jit
def rms_norm_kernel(x, weight, out, x_stride, eps, C: tl.constexpr, BLOCK: tl.constexpr):
    """One program a row: x / rms(x) · weight."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    mask = lane < C
    value = tl.load(x + row * x_stride + lane, mask=mask, other=0.0).to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value, axis=0) / C + eps)
    w = tl.load(weight + lane, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * C + lane, (value * w).to(out.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6) -> Tensor:
    """x / rms(x) · weight over all channels: x [B, L, C] (rows may be strided), weight [C]."""
    batch, rows, channels = x.shape
    per_batch("weight", weight, batch, channels)
    out = empty_like(x, memory_format=contiguous_format)
    rms_norm_kernel[(batch * rows,)](
        x, weight, out, check_rows("x", x), eps,
        C=channels, BLOCK=next_power_of_2(channels), num_warps=4,
    )  # fmt: skip
    return out
