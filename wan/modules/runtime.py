"""What a model runs on, kept apart from what it computes: attention backend, fused ops, other processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from ..attention_backends import AttentionBackend
from .ops import EAGER, Ops

Grid = tuple[int, int, int]
Attend = Callable[..., Tensor]


class Parallel:
    """How the tokens of one forward pass are spread over processes. This one is: not at all.

    `wan.distributed` subclasses it. Tokens are split along the width of the grid, so that every rank keeps
    all latent frames and audio stays aligned with its frame; only self-attention, the reference keys and the
    range of the reference map need other ranks.
    """

    size = 1
    rank = 0

    def split(self, tokens: Tensor, grid: Grid) -> Tensor:
        """[B, L, C] of the whole (T, H, W) grid → this rank's columns, still in (t, h, w) order."""
        return tokens

    def merge(self, tokens: Tensor, grid: Grid) -> Tensor:
        """The inverse of `split`, on every rank."""
        return tokens

    def attention(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Self-attention over all ranks' tokens: q, k, v [B, L_local, N, D] → [B, L_local, N, D]."""
        return attend(q, k, v)

    def first_frame(self, k: Tensor, grid: Grid) -> Tensor:
        """Keys [B, L_local, N, D] → those of the first latent frame of the whole grid, in (h, w) order: [B,
        H·W, N, D].
        """
        return k[:, : grid[1] * grid[2]]

    def extremes(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Elementwise minimum of `low` and maximum of `high` over all ranks."""
        return low, high


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Chosen explicitly with `model.use(...)`.

    official_map: see `attention.reference_map`. absorb_audio: with one speaker the projections around audio
    attention are multiplied into its keys and values (`attention.SingleStreamAttention.absorb`): 6 % fewer
    operations for 22 GB. absorb_silence: only for the guidance pass without speech, where two frames stand
    for all, so that 2 GB are enough.
    """

    attention: AttentionBackend = field(default_factory=AttentionBackend)
    ops: Ops = EAGER
    parallel: Parallel = field(default_factory=Parallel)
    official_map: bool = False
    absorb_audio: bool = False
    absorb_silence: bool = False
