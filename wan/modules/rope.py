"""Rotary position embeddings: three axes for video tokens, one for the speaker labels of L-RoPE.

Pairs are interleaved: channel 2i is the real part, 2i + 1 the imaginary part. Tables are made in fp64 and
kept in fp32: against an fp64 rotation the model's output moves by 2e-7 (specification §8.4). RoFormer, arXiv
2104.09864; L-RoPE: MultiTalk, arXiv 2505.22647; specification §4.2 and §4.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

THETA = 10000.0


@dataclass(frozen=True, kw_only=True)
class RopeTable:
    """cos and sin of every token's angles: each [L, D/2] fp32, on the device where they are used."""

    cos: Tensor
    sin: Tensor


def axis_angles(length: int, dim: int, theta: float = THETA) -> Tensor:
    """Angles of positions 0…length−1 on one axis of `dim` channels: [length, dim/2] fp64."""
    inverse = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return torch.outer(torch.arange(length, dtype=torch.float64), inverse)


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that encode time, height and width: 44, 42, 42 of 128."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def video_table(grid: tuple[int, int, int], head_dim: int, device: torch.device | str) -> RopeTable:
    """The table for tokens of a (T, H, W) grid in that order. Cosines are taken per axis, then spread over
    the grid.
    """
    tables = [axis_angles(n, d) for n, d in zip(grid, axis_dims(head_dim), strict=True)]
    views = [(grid[0], 1, 1, -1), (1, grid[1], 1, -1), (1, 1, grid[2], -1)]

    def spread(function) -> Tensor:
        parts = [
            function(angles).float().to(device).view(view).expand(*grid, -1)
            for angles, view in zip(tables, views, strict=True)
        ]
        return torch.cat(parts, dim=-1).flatten(0, 2)  # [L, D/2]

    return RopeTable(cos=spread(torch.cos), sin=spread(torch.sin))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs of x [..., D] by angles broadcast from [..., D/2]; computed and returned in
    fp32.
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class RotaryPositionalEmbedding1D(nn.Module):
    """1-D RoPE at arbitrary (fractional) positions; holds no parameters.

    Angles and rotation are fp32, the result has the input's dtype. Nothing is cached: positions change with
    every call, and the table of one call is small beside its input.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.base = THETA

    def table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [L] → cos and sin of the angles, [L, D/2] fp32."""
        exponent = torch.arange(0, self.head_dim, 2, device=positions.device).float() / self.head_dim
        angles = positions.float()[:, None] * (1.0 / self.base**exponent)
        return angles.cos(), angles.sin()

    def forward(self, x: Tensor, pos_indices: Tensor) -> Tensor:
        """x [B, N, L, D], pos_indices [L] → [B, N, L, D]."""
        return rotate(x, *self.table(pos_indices)).to(x.dtype)
