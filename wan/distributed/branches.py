"""Guidance branches over ranks: whole branches side by side while they last, the rest by sequence
parallelism.

A step of MultiTalk needs three independent passes (two with text scale 1). With two GPUs, one pass each and
the third by Ulysses over both keeps both busy to the end: 1.98 times one GPU, against 1.5 with whole passes
alone (performance.md §3.6).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from ..modules.runtime import Parallel
from .xdit_context_parallel import UlyssesParallel, landing


@dataclass(frozen=True, kw_only=True)
class Round:
    """Branches first … first + groups − 1 run at once, each on world/groups consecutive ranks."""

    first: int
    groups: int


def plan_rounds(branches: int, world: int, heads: int) -> list[Round]:
    """The fewest rounds in which every rank is busy: each round takes as many branches as groups of equal
    size allow.

    Raises ValueError when no group size divides the heads, i.e. when `world` itself doesn't.
    """
    if heads % world:
        msg = f"{world} ranks don't divide {heads} attention heads; use a divisor of {heads}"
        raise ValueError(msg)
    rounds, first = [], 0
    while first < branches:
        left = branches - first
        groups = max(g for g in range(1, min(left, world) + 1) if world % g == 0)
        rounds.append(Round(first=first, groups=groups))
        first += groups
    return rounds


class BranchParallel:
    """Runs a step's branches over all ranks. One instance lives as long as the model: it owns the process
    groups.

    Every rank must construct it, and must call it with the same number of branches.
    """

    def __init__(self, heads: int) -> None:
        self.heads, self.world, self.rank = heads, dist.get_world_size(), dist.get_rank()
        self._parallel: dict[int, Parallel] = {}
        for groups in (g for g in range(1, self.world + 1) if self.world % g == 0):
            members = self.world // groups
            for first in range(0, self.world, members):
                ranks = list(range(first, first + members))
                # new_group is collective: every rank makes every group, its own and the others'
                group = dist.new_group(ranks) if members > 1 else None
                if self.rank in ranks:
                    self._parallel[groups] = UlyssesParallel(group) if members > 1 else Parallel()

    def __call__(
        self, use: Callable[[Parallel], None], branches: Sequence[Callable[[], Tensor]]
    ) -> list[Tensor]:
        """The results of all branches, on every rank, in order.

        use(parallel): tell the model how the next pass is spread (`lambda p: model.use(parallel=p)`).
        branches: each runs one forward pass; all must return one shape and dtype.
        """
        results: list[Tensor] = []
        for step in plan_rounds(len(branches), self.world, self.heads):
            members = self.world // step.groups
            use(self._parallel[step.groups])
            own = branches[step.first + self.rank // members]().contiguous()
            results += self._share(own, step.groups, members)
        return results

    def _share(self, own: Tensor, groups: int, members: int) -> list[Tensor]:
        """Every group's result, taken from its first rank (all ranks of a group hold the same)."""
        if groups == 1:
            return [own]
        found = [landing(own, *own.shape) for _ in range(self.world)]
        dist.all_gather(found, own)
        return found[::members]
