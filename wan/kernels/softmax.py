"""Softmax over each head's few keys with a bias, as absorbed audio attention has it, in one pass."""

# No postponed annotations: the interpreter of triton 3.0 and 3.1 knows a constexpr by its annotation alone.

import triton
import triton.language as tl
from torch import Tensor, empty_like

from ._launch import next_power_of_2

_ROWS = 128  # of a program


@triton.jit
def bias_softmax_kernel(
    scores, bias, out, rows, heads,
    M: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program ROWS of the `rows` = tokens·heads of one frame, each with its M keys."""
    frame = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK)
    key = (lane < M)[None, :]
    mask = (row < rows)[:, None] & key
    offset = (frame * rows + row)[:, None] * M + lane[None, :]
    added = (frame * heads + row % heads)[:, None] * M + lane[None, :]
    value = tl.load(scores + offset, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(bias + added, mask=mask, other=0.0).to(tl.float32)
    value = tl.where(key, value, float("-inf"))
    value = tl.exp(value - tl.max(value, axis=1)[:, None])
    value = value / tl.sum(value, axis=1)[:, None]
    tl.store(out + offset, value.to(out.dtype.element_ty), mask=mask)


def bias_softmax(scores: Tensor, bias: Tensor, heads: int, *, inplace: bool = False) -> Tensor:
    """softmax of scores [T, S, heads·M] + bias [T, 1, heads·M] over each head's M keys, in fp32.

    Rounded once. Both contiguous; `inplace` writes over the scores. Raises ValueError where shapes don't fit.
    Reference: `wan.kernels.reference.bias_softmax`.
    """
    frames, tokens, width = scores.shape
    if bias.shape != (frames, 1, width) or width % heads:
        shapes = f"{tuple(scores.shape)} and {tuple(bias.shape)}"
        msg = f"bias_softmax: [T, S, heads·M] and [T, 1, heads·M] of {heads} heads wanted, got {shapes}"
        raise ValueError(msg)
    if not (scores.is_contiguous() and bias.is_contiguous()):
        msg = f"bias_softmax: contiguous inputs only, got strides {scores.stride()} and {bias.stride()}"
        raise ValueError(msg)
    keys, rows = width // heads, tokens * heads
    out = scores if inplace else empty_like(scores)
    bias_softmax_kernel[(-(-rows // _ROWS), frames)](
        scores, bias, out, rows, heads, M=keys, BLOCK=next_power_of_2(keys), ROWS=_ROWS, num_warps=4
    )
    return out
