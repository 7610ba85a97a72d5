"""The most memory used: of the GPU since the last reset, without one of the process since it began."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["peak_bytes", "reset_peak"]


def reset_peak(device: torch.device) -> None:
    """Count anew from here (on a GPU; a process's own peak can't be reset)."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Bytes allocated on the GPU at most, or the process's resident peak."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
