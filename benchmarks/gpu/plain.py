"""The yardstick: our model made to do what the reference does, and that reference's tuned form.

As it is (specification §9.2, P1–P5): RoPE tables built on the CPU in complex128 for q and for k of every
block and copied over, rotation in fp64, the reference map of every block although one speaker never reads it,
eight cache flushes a block, every condition embedded anew in each pass, separate elementwise passes. Tuned:
tables on the GPU, no map, no flushes; the rest the same.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from wan.modules.ops import EAGER, Ops, rms_norm
from wan.modules.rope import axis_angles, axis_dims
from wan.modules.runtime import Attend, Grid, Parallel


def plain_ops(grid: Grid, head_dim: int, *, cpu_tables: bool) -> Ops:
    """EAGER with the rotation in complex128, its table on the CPU (built for each call) or on the GPU (built
    once).
    """
    axes = [torch.polar(torch.ones_like(a), a) for a in (axis_angles(1024, d) for d in axis_dims(head_dim))]
    kept: dict[torch.device, Tensor] = {}

    def table() -> Tensor:
        frames, height, width = grid
        parts = [
            axes[0][:frames].view(frames, 1, 1, -1).expand(*grid, -1),
            axes[1][:height].view(1, height, 1, -1).expand(*grid, -1),
            axes[2][:width].view(1, 1, width, -1).expand(*grid, -1),
        ]
        return torch.cat(parts, dim=-1).reshape(-1, 1, head_dim // 2)

    def rms_norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, *, eps: float = 1e-6) -> Tensor:
        if cpu_tables or x.device not in kept:
            kept[x.device] = table().to(x.device)
        turn = kept[x.device]
        heads = rms_norm(x, weight, eps=eps).unflatten(-1, (-1, head_dim // 2, 2))  # [B, L, N, D/2, 2]
        turned = torch.view_as_complex(heads.double()) * turn
        return torch.view_as_real(turned).flatten(2).float().to(x.dtype)

    return replace(
        EAGER, name="plain" if cpu_tables else "plain, tables on the GPU", rms_norm_rope=rms_norm_rope
    )


class WithMapAndFlushes(Parallel):
    """After each self-attention: the reference map by explicit softmax in two halves of the heads, and the
    flushes.
    """

    def attention(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(q, k, v)
        self.reference_map(q[0].transpose(0, 1), k[0].transpose(0, 1))
        return out

    def __init__(self, grid: Grid) -> None:
        self.frame = grid[1] * grid[2]

    def reference_map(self, q: Tensor, k: Tensor) -> Tensor:
        """q, k [N, L, D] → [3, L]; the three masks are ones, as the reference gives them for one speaker."""
        masks = torch.ones(3, self.frame, dtype=q.dtype, device=q.device)
        halves = []
        for part_q, part_k in zip(q.chunk(2), k[:, : self.frame].chunk(2), strict=True):
            weights = ((part_q * q.shape[-1] ** -0.5) @ part_k.transpose(-1, -2)).softmax(-1)  # [N/2, L, H·W]
            flush()
            columns = []
            for mask in masks:
                # one pass over the weights, as in the reference's compiled form; no [N/2, L, H·W] product
                columns.append(((weights @ mask) / mask.sum()).mean(0))
                flush()
            halves.append(torch.stack(columns))
        return torch.stack(halves).mean(0)


def flush() -> None:
    """Hand cached memory back to the driver, as the reference does 320 times a forward."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.ipc_collect()
