"""FSDP: the parameters of a model spread over ranks, gathered block by block, for cards that can't hold it
whole.
"""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy


def shard_model(
    model: nn.Module,
    device_id: int | torch.device,
    param_dtype: torch.dtype = torch.bfloat16,
    reduce_dtype: torch.dtype = torch.float32,
    buffer_dtype: torch.dtype = torch.float32,
    process_group: Any = None,
    sharding_strategy: ShardingStrategy = ShardingStrategy.FULL_SHARD,
    sync_module_states: bool = True,
) -> nn.Module:
    """`model` wrapped so that each member of `model.blocks` is gathered when it runs and freed after it.

    device_id: the rank's GPU, or torch.device("cpu"). Floating parameters are cast to `param_dtype` first;
    the dtypes of reduction and buffers exist for callers of the original interface and stay as they are, for
    nothing is trained here and mixed precision would cast the inputs too. Raises ValueError without `blocks`.
    """
    blocks = getattr(model, "blocks", None)
    if blocks is None:
        msg = f"{type(model).__name__} has no `blocks` to shard by"
        raise ValueError(msg)
    del reduce_dtype, buffer_dtype
    units = set(blocks)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(param_dtype)
    return FullyShardedDataParallel(
        model,
        process_group=process_group,
        sharding_strategy=sharding_strategy,
        auto_wrap_policy=partial(lambda_auto_wrap_policy, lambda_fn=lambda module: module in units),
        device_id=device_id,
        sync_module_states=sync_module_states,
        use_orig_params=True,  # blocks mix parameter shapes and dtypes; names stay those of the model
    )


def free_model(model: nn.Module) -> None:
    """Let go of a sharded model's memory now: drop the flat parameters, collect, empty the GPU cache."""
    for module in FullyShardedDataParallel.fsdp_modules(model):
        handle = getattr(module, "_handle", None)
        if handle is not None:
            handle.flat_param.data = handle.flat_param.new_empty(0)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
