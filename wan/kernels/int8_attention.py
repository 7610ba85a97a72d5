"""Attention with q·kᵀ in int8 and, as a second variant, the weights times v in fp8. Lossy: opt-in by name.

Written from SageAttention (arXiv 2410.02367) and, for the fp8 part, SageAttention2 (arXiv 2411.10958): q
and k are rounded to int8 with one scale a group of tokens; before that the mean of k over all tokens is
taken away, which softmax does not see, and which is what makes int8 enough, since k has channels far from
zero. The softmax runs in fp32 on powers of two. `fp8`: weights are rounded as 448·p, v with one scale a
channel, stored transposed because the tensor cores of sm90 read 8-bit operands along the keys only.

Products: int8 and fp8 run at twice the rate of bf16, so at equal efficiency a forward's 925 TFLOP of
self-attention take 0.75 (int8) or 0.5 (int8_fp8) of bf16's time. Not measured yet; never chosen by itself.

Layout: q [B, Lq, N, D], k, v [B, Lk, N, D] with any strides but unit ones of D; D is 64 or 128.
"""

# No postponed annotations: the interpreter of triton 3.0 and 3.1 knows a constexpr by its annotation alone.

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

Q_GROUP, K_GROUP = 32, 64  # tokens that share a scale
PAD = 128  # transposed v is padded to whole blocks
CONFIGS = [
    triton.Config({"BLOCK_M": 128, "BLOCK_N": n}, num_warps=8, num_stages=stages)
    for n in (64, 128)
    for stages in (2, 3, 4)
]


@triton.jit
def quantize_heads_kernel(
    x, mean, out, scale, rows, groups, heads, x_batch, x_row, x_head, factor,
    D: tl.constexpr, GROUP: tl.constexpr, CENTRE: tl.constexpr,
):  # fmt: skip
    """One program a group of tokens of one head: out [B, N, L, D] int8, scale [B, N, groups]."""
    group = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    row = group * GROUP + tl.arange(0, GROUP)
    lane = tl.arange(0, D)
    mask = (row < rows)[:, None]
    start = x + (head // heads) * x_batch + (head % heads) * x_head
    value = tl.load(start + row.to(tl.int64)[:, None] * x_row + lane[None, :], mask=mask, other=0.0)
    value = value.to(tl.float32)
    if CENTRE:
        value = value - tl.load(mean + head * D + lane)[None, :]
    value = tl.where(mask, value * factor, 0.0)
    top = tl.max(tl.max(tl.abs(value), axis=1), axis=0)
    step = tl.where(top > 0.0, top / 127.0, 1.0)
    value = value / step
    value = tl.where(value >= 0.0, value + 0.5, value - 0.5)
    tl.store(out + (head * rows + row)[:, None] * D + lane[None, :], value.to(tl.int8), mask=mask)
    tl.store(scale + head * groups + group, step)


@triton.jit
def _step(
    acc, top, total, q, q_step, k, k_scale, v, v_row, start, k_rows,
    D: tl.constexpr, BLOCK_N: tl.constexpr, K_GROUP: tl.constexpr, FP8: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One block of keys: the running maximum, sum and weighted values with it."""
    column = start + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, D)
    inside = column < k_rows
    keys = k + column[None, :] * D + lane[:, None]  # [D, BLOCK_N]
    values = v + (column if FP8 else column * v_row)[:, None]
    values = values + (lane * v_row if FP8 else lane)[None, :]
    if TAIL:
        k_tile = tl.load(keys, mask=inside[None, :], other=0)
        k_step = tl.load(k_scale + column // K_GROUP, mask=inside, other=0.0)
        v_tile = tl.load(values, mask=inside[:, None], other=0.0)
    else:
        k_tile = tl.load(keys)
        k_step = tl.load(k_scale + column // K_GROUP)
        v_tile = tl.load(values)
    score = tl.dot(q, k_tile).to(tl.float32) * q_step[:, None] * k_step[None, :]
    if TAIL:
        score = tl.where(inside[None, :], score, -float("inf"))
    new_top = tl.maximum(top, tl.max(score, axis=1))
    weight = tl.exp2(score - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weight, axis=1)
    if FP8:
        weight = weight * 448.0
    acc = acc * shrink[:, None] + tl.dot(weight.to(v_tile.dtype), v_tile)
    return acc, new_top, total


@triton.jit
def int8_attention_kernel(
    q, k, v, q_scale, k_scale, v_scale, out,
    q_rows, k_rows, q_groups, k_groups, heads, v_batch, v_row, v_head, out_batch, out_row, out_head,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    Q_GROUP: tl.constexpr, K_GROUP: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """One program BLOCK_M queries of one head. FP8: v is [B, N, D, padded], v_row its stride of a channel."""
    head = tl.program_id(1).to(tl.int64)
    batch, inner = head // heads, head % heads
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, D)
    inside = row < q_rows
    q_tile = tl.load(q + (head * q_rows + row)[:, None] * D + lane[None, :], mask=inside[:, None], other=0)
    q_step = tl.load(q_scale + head * q_groups + row // Q_GROUP, mask=inside, other=0.0)
    k, k_scale = k + head * k_rows * D, k_scale + head * k_groups
    v = v + batch * v_batch + inner * v_head
    acc = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    top = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    whole = k_rows // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        acc, top, total = _step(
            acc, top, total, q_tile, q_step, k, k_scale, v, v_row, start, k_rows,
            D, BLOCK_N, K_GROUP, FP8, False,
        )  # fmt: skip
    if whole < k_rows:
        acc, top, total = _step(
            acc, top, total, q_tile, q_step, k, k_scale, v, v_row, whole, k_rows,
            D, BLOCK_N, K_GROUP, FP8, True,
        )  # fmt: skip
    acc = acc / total[:, None]
    if FP8:
        acc = acc * (tl.load(v_scale + head * D + lane) / 448.0)[None, :]
    place = out + batch * out_batch + inner * out_head + row.to(tl.int64)[:, None] * out_row + lane[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=inside[:, None])


_tuned = None


def int8_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, fp8: bool = False
) -> Tensor:
    """softmax(q·kᵀ·scale)·v → [B, Lq, N, D] in q's dtype. Raises ValueError for shapes without tiles."""
    batch, q_rows, heads, dim = q.shape
    k_rows = k.shape[1]
    if dim not in (64, 128) or v.shape != k.shape or k.shape != (batch, k_rows, heads, dim):
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        msg = f"int8 attention: q, k, v {shapes}; heads must be 64 or 128 wide and alike"
        raise ValueError(msg)
    factor = (dim**-0.5 if scale is None else scale) * math.log2(math.e)
    q8, q_scale = _quantize(q, None, factor, Q_GROUP)
    k8, k_scale = _quantize(k, k.float().mean(1), 1.0, K_GROUP)
    values, v_scale, strides = _values(v, fp8=fp8)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    arguments = (
        q8, k8, values, q_scale, k_scale, v_scale, out,
        q_rows, k_rows, q_scale.shape[-1], k_scale.shape[-1], heads, *strides, *out.stride()[:1],
        out.stride(1), out.stride(2),
    )  # fmt: skip
    fixed = {"D": dim, "Q_GROUP": Q_GROUP, "K_GROUP": K_GROUP, "FP8": fp8}
    if q.is_cuda:
        _autotuned()[lambda m: (triton.cdiv(q_rows, m["BLOCK_M"]), batch * heads)](*arguments, **fixed)
    else:  # the interpreter, which has nothing to tune
        grid = (triton.cdiv(q_rows, 64), batch * heads)
        int8_attention_kernel[grid](*arguments, **fixed, BLOCK_M=64, BLOCK_N=64)
    return out


def _autotuned():
    """The kernel with its configurations, made at first use: the registry compiles the plain kernel."""
    global _tuned
    if _tuned is None:
        _tuned = triton.autotune(configs=CONFIGS, key=["q_rows", "k_rows", "FP8"])(int8_attention_kernel)
    return _tuned


def _quantize(x: Tensor, mean: Tensor | None, factor: float, group: int) -> tuple[Tensor, Tensor]:
    """[B, L, N, D] → int8 [B, N, L, D] and scale [B, N, groups] of factor·(x − mean)."""
    batch, rows, heads, dim = x.shape
    if x.stride(3) != 1:
        msg = f"int8 attention: channels must lie side by side, got strides {x.stride()}"
        raise ValueError(msg)
    groups = triton.cdiv(rows, group)
    out = torch.empty(batch, heads, rows, dim, dtype=torch.int8, device=x.device)
    scale = torch.empty(batch, heads, groups, dtype=torch.float32, device=x.device)
    centre = scale if mean is None else mean.contiguous()
    quantize_heads_kernel[(groups, batch * heads)](
        x, centre, out, scale, rows, groups, heads, x.stride(0), x.stride(1), x.stride(2), factor,
        D=dim, GROUP=group, CENTRE=mean is not None, num_warps=4,
    )  # fmt: skip
    return out, scale


def _values(v: Tensor, *, fp8: bool) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
    """v as the kernel reads it, its scales, and strides (batch, row or channel, head)."""
    if not v.is_cuda:
        v = v.float()  # the interpreter multiplies bf16 as if it were integers
    if not fp8:
        return v, v, (v.stride(0), v.stride(1), v.stride(2))
    batch, rows, heads, dim = v.shape
    scale = v.abs().amax(1).float() / 448.0  # [B, N, D]
    scale = torch.where(scale > 0, scale, 1.0)
    # In the interpreter fp32, since that rounds to fp8 wrongly (see `fp8`).
    dtype = torch.float8_e4m3fn if v.is_cuda else torch.float32
    out = torch.zeros(batch, heads, dim, -(-rows // PAD) * PAD, dtype=dtype, device=v.device)
    out[..., :rows] = (v.float() / scale[:, None]).permute(0, 2, 3, 1).to(torch.float8_e4m3fn).to(dtype)
    return out, scale.contiguous(), (out.stride(0), out.stride(2), out.stride(1))
