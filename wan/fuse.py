"""Joined weights: the q, k and v linears of self-attention as one product, x read once instead of three
times.

The checkpoint's names stay: `q.weight`, `k.weight` and `v.weight` become views of the joined matrix, so
loading, saving and merging a LoRA work as before.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class JoinedLinear:
    """The weights of several linears behind each other; no module, so it adds nothing to a state dict."""

    def __init__(self, linears: list[nn.Linear]) -> None:
        self.weight = torch.cat([linear.weight.data for linear in linears])
        self.bias = torch.cat([linear.bias.data for linear in linears])
        start = 0
        for linear in linears:
            linear.weight.data = self.weight[start : start + linear.out_features]
            linear.bias.data = self.bias[start : start + linear.out_features]
            start += linear.out_features

    def holds(self, attention: nn.Module) -> bool:
        """Whether the module's weights still are views of this (a `.to()` or an offload moves them
        elsewhere).
        """
        weight = attention.q.weight
        return isinstance(weight, Tensor) and weight.data_ptr() == self.weight.data_ptr()

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def join_qkv(model: nn.Module) -> int:
    """Join q, k, v of every block's self-attention, block by block, where the weights lie; returns how many.

    Call it after loading and moving. Blocks whose linears are quantised stay as they are.
    """
    count = 0
    for block in model.blocks:
        attention = block.self_attn
        linears = [attention.q, attention.k, attention.v]
        if all(type(linear) is nn.Linear for linear in linears):
            attention.joined = JoinedLinear(linears)
            count += 1
    return count
