"""What every launcher checks before it hands pointers to a kernel."""

from __future__ import annotations

from torch import Tensor


def next_power_of_2(n: int) -> int:
    """The smallest power of two ≥ n: Triton's blocks must be powers of two."""
    return 1 << (n - 1).bit_length()


def check_rows(name: str, x: Tensor) -> int:
    """The distance in elements between rows of x [B, L, C]: evenly spaced, with unit channel stride."""
    batch, rows, _ = x.shape
    if x.stride(2) != 1 or (batch > 1 and x.stride(0) != rows * x.stride(1)):
        msg = f"{name}: rows must be evenly spaced, got {tuple(x.shape)} with strides {x.stride()}"
        raise ValueError(msg)
    return x.stride(1)


def per_batch(name: str, t: Tensor, batch: int, channels: int) -> int:
    """The distance between two samples of a vector [C], [1, 1, C] or [B, 1, C]: 0 where all share it."""
    if t.shape[-1] != channels or t.stride(-1) != 1 or t.numel() not in (channels, batch * channels):
        shape = tuple(t.shape)
        msg = f"{name}: expected {channels} contiguous channels for each of {batch} samples, got {shape}"
        raise ValueError(msg)
    return 0 if t.numel() == channels else t.stride(0)
