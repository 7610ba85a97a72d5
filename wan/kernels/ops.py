"""`FUSED`: the Triton kernels as the set of operations that `model.use(ops=FUSED)` runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..modules import ops
from .norm import gate_residual, gate_residual_norm, layer_norm_modulate, rms_norm
from .rotary import rms_norm_rope, rope
from .softmax import bias_softmax


def ffn(layers: nn.Sequential, x: Tensor) -> Tensor:
    """The first linear with bias and GELU in its epilogue (cuBLASLt): the hidden layer is written once.

    Quantised linears, and a CPU, which has no such epilogue, run the layers one by one.
    """
    first, _, last = layers
    if type(first) is not nn.Linear or not x.is_cuda:
        return layers(x)
    hidden = torch._addmm_activation(first.bias, x.flatten(0, -2), first.weight.t(), use_gelu=True)
    return last(hidden.unflatten(0, x.shape[:-1]))


def absorbed_weights(x: Tensor, keys: Tensor, bias: Tensor, heads: int) -> Tensor:
    """The bias is added where the softmax reads it: a product that adds one copies it to all rows before."""
    return bias_softmax(torch.bmm(x, keys), bias, heads, inplace=True)


FUSED = ops.Ops(
    name="triton",
    rms_norm=rms_norm,
    rms_norm_rope=rms_norm_rope,
    rope=rope,
    layer_norm_modulate=layer_norm_modulate,
    gate_residual=gate_residual,
    gate_residual_norm=gate_residual_norm,
    ffn=ffn,
    absorbed_weights=absorbed_weights,
)
