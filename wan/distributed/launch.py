"""Joining the other processes that `torchrun` started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Where this process stands: its rank of `size`, and the device that is its own."""

    rank: int
    size: int
    device: torch.device


@contextmanager
def init_from_environment(*, timeout_s: float = 1800) -> Iterator[Launch]:
    """Join the process group that RANK, WORLD_SIZE, LOCAL_RANK describe (one process if they are absent),
    leave at exit.

    NCCL where there are GPUs, gloo on the CPU. Raises RuntimeError when the environment names more local
    processes than there are GPUs.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local, found = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= found:
            msg = (
                f"LOCAL_RANK {local} has no GPU: {found} found; start at most {found} processes on this host"
            )
            raise RuntimeError(msg)
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    try:
        yield Launch(rank=rank, size=size, device=device)
    finally:
        if size > 1:
            dist.destroy_process_group()
