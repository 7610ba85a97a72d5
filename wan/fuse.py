"""Joined weights: the q, k and v linears of self-attention as one product, x read once instead of three
times.

Joining only lays the weights behind each other in one piece of memory. The parameters keep their names, so
loading, saving and merging a LoRA work as before, and nothing else holds the memory: where a `.to()` or an
offload has moved the parameters apart, `joined` finds that and the three products run on their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def join(linears: Sequence[nn.Linear]) -> None:
    """Lay the weights, and the biases, of linears with one input behind each other in one piece of memory."""
    for name in ("weight", "bias"):
        join_tensors([getattr(linear, name) for linear in linears])


def join_tensors(parts: Sequence[Tensor]) -> None:
    """Lay tensors of one dtype behind each other in one piece of memory, in place."""
    raw = [part.data.contiguous().view(torch.uint8) for part in parts]  # torch can't cat fp8 everywhere
    together = torch.cat(raw).view(parts[0].dtype)
    start = 0
    for part in parts:
        stop = start + part.shape[0]
        part.data = together[start:stop]
        start = stop


def joined(linears: Sequence[nn.Module]) -> tuple[Tensor, Tensor] | None:
    """(weight [sum of outputs, in], bias) over linears that lie behind each other, or None if they don't."""
    if any(type(linear) is not nn.Linear or linear.bias is None for linear in linears):
        return None
    weights = whole([linear.weight for linear in linears])
    biases = whole([linear.bias for linear in linears])
    return None if weights is None or biases is None else (weights, biases)


def join_qkv(model: nn.Module) -> int:
    """Join q, k, v of every block's self-attention, block by block, where the weights lie; returns how many.

    Call it after loading, on the device where the model will run. Blocks with other layers than plain linears
    (quantised ones) stay as they are.
    """
    count = 0
    for block in model.blocks:
        attention = block.self_attn
        linears = [attention.q, attention.k, attention.v]
        if all(type(linear) is nn.Linear and linear.bias is not None for linear in linears):
            join(linears)
            count += 1
    return count


def whole(parts: Sequence[Tensor]) -> Tensor | None:
    """One view over tensors that follow each other without a gap in one storage."""
    first = parts[0]
    storage, offset = first.untyped_storage().data_ptr(), first.storage_offset()
    rows = 0
    for part in parts:
        same = part.untyped_storage().data_ptr() == storage and part.dtype == first.dtype
        if not same or part.storage_offset() != offset or not part.is_contiguous():
            return None
        offset += part.numel()
        rows += part.shape[0]
    return first.as_strided((rows, *first.shape[1:]), first.stride())
