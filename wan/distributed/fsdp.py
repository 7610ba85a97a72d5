"""FSDP: a model's blocks spread over ranks and gathered one at a time, for cards too small for them."""

from __future__ import annotations

import gc
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy


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
    """Replace each member of `model.blocks` by its sharded form, in place; returns `model`.

    device_id: this rank's GPU, or torch.device("cpu"). Floating parameters are cast to `param_dtype` first.
    What lies outside the blocks (2 % of the 14 B model) stays whole on every rank, so that every method of
    the model works, not only `forward`. reduce_dtype and buffer_dtype belong to training and change nothing.
    sync_module_states: rank 0's weights win. Raises ValueError without `blocks`.
    """
    blocks = getattr(model, "blocks", None)
    if blocks is None:
        msg = f"{type(model).__name__} has no `blocks` to shard by"
        raise ValueError(msg)
    del reduce_dtype, buffer_dtype
    device = torch.device("cuda", device_id) if isinstance(device_id, int) else device_id
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(param_dtype)
    for i, block in enumerate(blocks):
        _place(block, device, process_group, sync_module_states)
        blocks[i] = FullyShardedDataParallel(
            block,
            process_group=process_group,
            sharding_strategy=sharding_strategy,
            device_id=device,
            use_orig_params=True,  # a block's parameters keep their names and shapes
        )
    inside = {id(p) for p in blocks.parameters()}
    rest = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in inside]
    _place(rest, device, process_group, sync_module_states)
    return model


def _place(tensors: nn.Module | list[Tensor], device: torch.device, group: Any, sync: bool) -> None:
    """Bring tensors to `device` and, with `sync`, give every rank the values of the group's first."""
    if isinstance(tensors, nn.Module):
        tensors = [*tensors.parameters(), *tensors.buffers()]
    first = dist.get_global_rank(group, 0) if group is not None else 0
    for tensor in tensors:
        tensor.data = tensor.data.to(device)
        if sync:
            dist.broadcast(tensor.data, src=first, group=group)


def free_model(model: nn.Module) -> None:
    """Let go of a sharded model's weights now: their storage, the references, the GPU's cache."""
    for module in FullyShardedDataParallel.fsdp_modules(model):
        if module._handle is not None:
            module._handle.flat_param.untyped_storage().resize_(0)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
