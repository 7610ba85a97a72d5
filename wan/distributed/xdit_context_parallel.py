"""Ulysses sequence parallelism for the DiT, split along the width of the token grid.

Each rank keeps some columns of every latent frame. So audio cross-attention, whose keys belong to one frame,
and text cross-attention need no other rank; self-attention trades tokens for heads before and after (two
all-to-all), and its result does not depend on the order in which the tokens arrive. DeepSpeed-Ulysses, arXiv
2309.14509; performance.md §3.6 for the split along the width.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..modules.runtime import Attend, Grid, Parallel


def landing(like: Tensor, *shape: int) -> Tensor:
    """An empty tensor for a collective to write into, of the dtype and on the device of `like`.

    Never an inference tensor: gloo writes from a thread of its own, where torch 2.4 refuses one.
    """
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=like.dtype, device=like.device)


def column_counts(width: int, size: int) -> list[int]:
    """How many of `width` token columns each of `size` ranks takes: as even as can be, the larger shares
    first.

    Raises ValueError when a rank would be left without a column.
    """
    if not 1 <= size <= width:
        msg = f"{size} ranks can't share {width} token columns; use at most {width} ranks"
        raise ValueError(msg)
    return [width // size + (rank < width % size) for rank in range(size)]


class UlyssesParallel(Parallel):
    """Spreads the tokens of a forward pass over the ranks of `group` (None: all), any number that divides
    the heads.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self._grid: Grid | None = None

    def split(self, tokens: Tensor, grid: Grid) -> Tensor:
        """[B, T·H·W, …] → this rank's columns [B, T·H·w, …], still in (t, h, w) order."""
        self._grid = grid
        counts = column_counts(grid[2], self.size)
        start = sum(counts[: self.rank])
        columns = tokens.unflatten(1, grid)[:, :, :, start : start + counts[self.rank]]
        return columns.flatten(1, 3)

    def merge(self, tokens: Tensor, grid: Grid) -> Tensor:
        """This rank's columns [B, T·H·w, …] → [B, T·H·W, …] on every rank."""
        columns = tokens.unflatten(1, (grid[0], grid[1], -1)).contiguous()
        return torch.cat(self._gather(columns, 3, column_counts(grid[2], self.size)), dim=3).flatten(1, 3)

    def attention(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Self-attention over all ranks' tokens, each rank computing heads/size heads: [B, L_local, N, D]
        → the same.
        """
        heads = q.shape[2]
        if heads % self.size:
            msg = f"{self.size} ranks don't divide {heads} attention heads; use a divisor of {heads}"
            raise ValueError(msg)
        lengths = self._lengths(q.shape[1])
        out = attend(*self._to_heads([q, k, v], lengths))
        return self._to_tokens(out, lengths)

    def first_frame(self, k: Tensor, grid: Grid) -> Tensor:
        """Keys [B, L_local, N, D] → the whole first latent frame's, in (h, w) order: [B, H·W, N, D]."""
        counts = column_counts(grid[2], self.size)
        own = k[:, : grid[1] * counts[self.rank]].unflatten(1, (grid[1], -1)).contiguous()  # [B, H, w, N, D]
        return torch.cat(self._gather(own, 2, counts), dim=2).flatten(1, 2)

    def extremes(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Elementwise minimum of `low` and maximum of `high` over all ranks, in one reduction."""
        both = landing(low.float(), 2, *low.shape)  # not every backend reduces bf16; fp32 holds it exactly
        both[0], both[1] = low.neg(), high
        dist.all_reduce(both, dist.ReduceOp.MAX, group=self.group)
        return both[0].neg().to(low.dtype), both[1].to(high.dtype)

    def _lengths(self, local: int) -> list[int]:
        """Every rank's token count; `split` has told the grid of the pass under way."""
        counts = [] if self._grid is None else column_counts(self._grid[2], self.size)
        lengths = [self._grid[0] * self._grid[1] * n for n in counts]
        if not lengths or lengths[self.rank] != local:
            told = lengths or "none"
            msg = f"rank {self.rank} holds {local} tokens, split() gave {told}; call split() first"
            raise RuntimeError(msg)
        return lengths

    def _to_heads(self, tensors: list[Tensor], lengths: list[int]) -> list[Tensor]:
        """[B, L_local, N, D] of every tensor → [B, L, N/size, D], tokens in rank order."""
        pending = []
        for t in tensors:
            batch, local, heads, dim = t.shape
            send = (
                t.view(batch, local, self.size, heads // self.size, dim).permute(2, 0, 1, 3, 4).contiguous()
            )
            each = batch * (heads // self.size) * dim
            receive = landing(t, each * sum(lengths))
            work = dist.all_to_all_single(
                receive,
                send.view(-1),
                [each * n for n in lengths],
                [each * local] * self.size,
                group=self.group,
                async_op=True,
            )
            pending.append((work, receive, send, (batch, heads // self.size, dim)))
        return [self._receive(*item, lengths) for item in pending]

    def _receive(
        self,
        work: dist.Work,
        flat: Tensor,
        sent: Tensor,  # kept alive until the transfer is done
        shape: tuple[int, int, int],
        lengths: list[int],
    ) -> Tensor:
        work.wait()
        batch, heads, dim = shape
        if batch == 1:
            return flat.view(1, -1, heads, dim)
        parts = flat.split([batch * heads * dim * n for n in lengths])
        return torch.cat([p.view(batch, -1, heads, dim) for p in parts], dim=1)

    def _to_tokens(self, out: Tensor, lengths: list[int]) -> Tensor:
        """[B, L, N/size, D] → [B, L_local, N, D]."""
        batch, _, heads, dim = out.shape
        local = lengths[self.rank]
        send = torch.cat([part.reshape(-1) for part in out.split(lengths, dim=1)])
        receive = landing(out, self.size * batch * local * heads * dim)
        each = batch * heads * dim
        dist.all_to_all_single(
            receive, send, [each * local] * self.size, [each * n for n in lengths], group=self.group
        )
        return receive.view(self.size, batch, local, heads, dim).permute(1, 2, 0, 3, 4).flatten(2, 3)

    def _gather(self, own: Tensor, dim: int, counts: list[int]) -> list[Tensor]:
        """Every rank's `own`, which differ in size along `dim` by at most one: padded, gathered, cut."""
        widest = max(counts)
        if own.shape[dim] < widest:
            pad = list(own.shape)
            pad[dim] = widest - own.shape[dim]
            own = torch.cat([own, own.new_zeros(pad)], dim=dim)
        found = [landing(own, *own.shape) for _ in counts]
        dist.all_gather(found, own.contiguous(), group=self.group)
        return [part.narrow(dim, 0, n) for part, n in zip(found, counts, strict=True)]
