"""Activations in fp8 e4m3: linears' inputs with one scale a row, written by the pass that makes them (quality
`fast`), and attention's q, k and v with one scale a head (`wan.flash3`). Lossy.

A linear in fp8 needs its input as (data, scale) with data·scale ≈ x and scale = max|row| / 448. Made apart
that costs a read and a write of every input; here LayerNorm with its modulation or affine, the residual
before it, and GELU write fp8 at once, and q, k and v share one result.

Budget on an H200 at L = 33,600 (performance.md: 26.8·L·C² of products in linears a block, 944 TFLOP in 40):
at the measured 1,349 TFLOP/s 0.70 s instead of 1.13 s in bf16; the hidden layer's GELU with its quantisation
moves 1.4 GB a block, attention's outputs 0.5 GB each. q, k and v [1, L, 40, 128] of attention in fp8 are read
twice and written once, 0.34 + 0.34 + 0.17 GB each: 25 ms in 40 blocks. All but `head_extremes` move their
bytes at 0.9 to 1.0 of a copy's rate there (docs/performance.md).

Each launcher has its namesake in `wan.kernels.reference_lossy`.
"""

# No postponed annotations: the interpreter of triton 3.0 and 3.1 knows a constexpr by its annotation alone.

import torch
import triton
import triton.language as tl
from torch import Tensor, contiguous_format, empty_like

from ._launch import check_rows, next_power_of_2, per_batch
from .norm import add_row, load_row, norm_row

Rows = tuple[Tensor, Tensor]
"""(data [..., C] float8_e4m3fn, scale [..., 1] fp32)."""
_EXTREMES_TOKENS = 512  # of a program
_EXTREMES_STEP = 32  # of them at once
_QUANTIZE_TOKENS = 32


@triton.jit
def _store_row(value, data, scale, row, lane, mask, C: tl.constexpr):
    # One division a row instead of one a value; 1 / step stays finite.
    top = tl.max(tl.abs(value), axis=0)
    step = tl.where(top > 1e-30, top / 448.0, 1.0)
    tl.store(data + row * C + lane, (value * (1.0 / step)).to(data.dtype.element_ty), mask=mask)
    tl.store(scale + row, step)


@triton.jit
def quantize_kernel(x, data, scale, x_stride, C: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr):
    """One program a row; with GELU of gelu(x) = x / (1 + exp(-2y)), y = √(2/π)·(x + 0.044715·x³)."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    mask = lane < C
    value = load_row(x + row * x_stride, lane, mask)
    if GELU:
        # exp(-2y) = 2^(x·(a + b·x²)), a = -2·√(2/π)·log2 e, b = 0.044715·a; x / ∞ is the 0 that it tends to
        power = value * (-2.302208198144325 - 0.1029432395800235 * value * value)
        value = value / (1.0 + tl.exp2(power))
    _store_row(value, data, scale, row, lane, mask, C)


@triton.jit
def norm_quantize_kernel(
    x, y, gate, a, b, out, data, scale,
    rows, x_stride, y_stride, gate_stride, a_stride, b_stride, eps,
    C: tl.constexpr, BLOCK: tl.constexpr, RESIDUAL: tl.constexpr, GATE: tl.constexpr, MODULATE: tl.constexpr,
):  # fmt: skip
    """(data, scale) = LN(x)·(a or 1 + a) + b; with RESIDUAL of out = x + y·gate, which is stored too."""
    row = tl.program_id(0).to(tl.int64)
    sample = row // rows
    # Triton gives a thread as many neighbours as the narrowest dtype fills 16 bytes with, 16 of fp8. The fp32
    # vectors are then read in pieces 64 bytes apart: 1.5 to 1.8 times the time on an H200. Four lie whole.
    lane = tl.max_contiguous(tl.arange(0, BLOCK), 4)
    mask = lane < C
    x_row = x + row * x_stride
    if RESIDUAL:
        total = add_row(x_row, y + row * y_stride, gate + sample * gate_stride, lane, mask, GATE)
        stored = total.to(out.dtype.element_ty)
        tl.store(out + row * C + lane, stored, mask=mask)
        value = stored.to(tl.float32)
    else:
        value = load_row(x_row, lane, mask)
    normed = norm_row(value, a + sample * a_stride, b + sample * b_stride, lane, mask, eps, C, MODULATE)
    _store_row(normed, data, scale, row, lane, mask, C)


@triton.jit
def head_extremes_kernel(
    x, out, tokens, heads, sample_stride, token_stride, head_stride,
    D: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One program TOKENS tokens of one head → a channel's least, greatest and sum, [3, D]. STEP tokens at a
    time go into tiles of their own, [STEP, D], so that only the end exchanges values between threads.
    """
    head = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    sample = tl.program_id(2).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    base = x + sample * sample_stride + head * head_stride + lane[None, :]
    low = tl.full((STEP, BLOCK), float("inf"), tl.float32)
    high = tl.full((STEP, BLOCK), float("-inf"), tl.float32)
    total = tl.zeros((STEP, BLOCK), tl.float32)
    for start in range(0, TOKENS, STEP):
        token = block * TOKENS + start + tl.arange(0, STEP)
        inside = (token < tokens)[:, None]
        mask = inside & (lane < D)[None, :]
        value = tl.load(base + token[:, None] * token_stride, mask=mask, other=0.0).to(tl.float32)
        low = tl.minimum(low, tl.where(inside, value, float("inf")))
        high = tl.maximum(high, tl.where(inside, value, float("-inf")))
        total += value
    to = out + (((sample * tl.num_programs(1) + block) * 3) * heads + head) * D + lane
    tl.store(to, tl.min(low, axis=0), mask=lane < D)
    tl.store(to + heads * D, tl.max(high, axis=0), mask=lane < D)
    tl.store(to + 2 * heads * D, tl.sum(total, axis=0), mask=lane < D)


@triton.jit
def head_quantize_kernel(
    x, centre, inverse, data, tokens, heads, sample_stride, token_stride, head_stride,
    D: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One program TOKENS tokens of one head: data = (x - centre)·inverse, within ±448; a NaN stays one."""
    head = tl.program_id(0).to(tl.int64)
    sample = tl.program_id(2).to(tl.int64)
    token = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    lane = tl.arange(0, BLOCK)
    mask = (token < tokens)[:, None] & (lane < D)[None, :]
    base = x + sample * sample_stride + head * head_stride
    value = tl.load(base + token[:, None] * token_stride + lane[None, :], mask=mask, other=0.0).to(tl.float32)
    middle = tl.load(centre + (sample * heads + head) * D + lane, mask=lane < D, other=0.0)
    value = (value - middle[None, :]) * tl.load(inverse + sample * heads + head)
    value = tl.where(value > 448.0, 448.0, tl.where(value < -448.0, -448.0, value))
    to = data + ((sample * tokens + token) * heads + head)[:, None] * D + lane[None, :]
    tl.store(to, value.to(data.dtype.element_ty), mask=mask)


def quantize_rows(x: Tensor) -> Rows:
    """x [B, L, C] row by row."""
    return _quantize(x, gelu=False)


def gelu_quantize_rows(x: Tensor) -> Rows:
    """GELU (tanh) of x [B, L, C], row by row."""
    return _quantize(x, gelu=True)


def layer_norm_modulate_quantize(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6) -> Rows:
    """LN(x)·(1 + scale) + shift for x [B, L, C], scale and shift [B, 1, C]."""
    return _norm(x, None, None, scale, shift, eps, modulate=True)[1]


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
    """x' = x + y·gate in x's dtype, and data, scale of its LayerNorm with affine or modulation."""
    if x.shape != y.shape:
        msg = f"gate_residual: x {tuple(x.shape)} and y {tuple(y.shape)} differ"
        raise ValueError(msg)
    out, rows = _norm(x, y, gate, scale, shift, eps, modulate=modulate)
    return out, *rows


def head_extremes(x: Tensor) -> Tensor:
    """Least, greatest and mean over the tokens of x [B, L, N, D] → [3, B, N, D] fp32, in one read of x."""
    batch, tokens, heads, channels = x.shape
    blocks = -(-tokens // _EXTREMES_TOKENS)
    parts = torch.empty(batch, blocks, 3, heads, channels, dtype=torch.float32, device=x.device)
    head_extremes_kernel[(heads, blocks, batch)](
        x, parts, tokens, heads, *_head_strides(x),
        D=channels, BLOCK=next_power_of_2(channels), TOKENS=_EXTREMES_TOKENS, STEP=_EXTREMES_STEP,
        num_warps=2,
    )  # fmt: skip
    low, high, total = parts.unbind(2)
    return torch.stack((low.amin(1), high.amax(1), total.sum(1) / tokens))


def quantize_heads(x: Tensor, centre: Tensor, inverse: Tensor) -> Tensor:
    """(x - centre)·inverse within ±448, rounded once from fp32: x [B, L, N, D] with any strides but the last,
    centre [B, N, D] and inverse [B, N] fp32 → [B, L, N, D] float8_e4m3fn, contiguous.
    """
    batch, tokens, heads, channels = x.shape
    wanted = ("centre", centre, (batch, heads, channels)), ("inverse", inverse, (batch, heads))
    for name, t, shape in wanted:
        if t.shape != shape or t.dtype != torch.float32:
            msg = f"quantize_heads: {name} must be fp32 {shape}, got {t.dtype} {tuple(t.shape)}"
            raise ValueError(msg)
    data = _empty_fp8(x)
    head_quantize_kernel[(heads, -(-tokens // _QUANTIZE_TOKENS), batch)](
        x, centre.contiguous(), inverse.contiguous(), data, tokens, heads, *_head_strides(x),
        D=channels, BLOCK=next_power_of_2(channels), TOKENS=_QUANTIZE_TOKENS, num_warps=2,
    )  # fmt: skip
    return data.to(torch.float8_e4m3fn)


def _head_strides(x: Tensor) -> tuple[int, int, int]:
    if x.stride(3) != 1:
        msg = f"heads: a head's channels must be side by side, got {tuple(x.shape)} with strides {x.stride()}"
        raise ValueError(msg)
    return x.stride(0), x.stride(1), x.stride(2)


def _empty_fp8(x: Tensor) -> Tensor:
    # Triton's interpreter, which is all that a CPU has, loses the carry when a fraction rounds up to fp8's
    # next power of two; so there the kernel writes fp32, and torch rounds.
    dtype = torch.float8_e4m3fn if x.is_cuda else torch.float32
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _empty_rows(x: Tensor) -> Rows:
    data = _empty_fp8(x)
    return data, torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)


def _quantize(x: Tensor, *, gelu: bool) -> Rows:
    batch, rows, channels = x.shape
    data, scale = _empty_rows(x)
    quantize_kernel[(batch * rows,)](
        x, data, scale, check_rows("x", x), C=channels, BLOCK=next_power_of_2(channels), GELU=gelu,
        num_warps=4,
    )  # fmt: skip
    return data.to(torch.float8_e4m3fn), scale


def _norm(
    x: Tensor, y: Tensor | None, gate: Tensor | None, a: Tensor, b: Tensor, eps: float, *, modulate: bool
) -> tuple[Tensor, Rows]:
    batch, rows, channels = x.shape
    out = x if y is None else empty_like(x, memory_format=contiguous_format)
    data, scale = _empty_rows(x)
    inputs = [x if t is None else t for t in (y, gate)]  # never read where the flag is off
    strides = [
        0 if t is None else per_batch(name, t, batch, channels)
        for name, t in (("gate", gate), ("scale", a), ("shift", b))
    ]
    norm_quantize_kernel[(batch * rows,)](
        x, *inputs, a, b, out, data, scale, rows,
        check_rows("x", x), 0 if y is None else check_rows("y", y), *strides, eps,
        C=channels, BLOCK=next_power_of_2(channels), RESIDUAL=y is not None, GATE=gate is not None,
        MODULATE=modulate, num_warps=4,
    )  # fmt: skip
    return out, (data.to(torch.float8_e4m3fn), scale)
