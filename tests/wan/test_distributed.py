"""Ulysses, branch parallel and FSDP on 2 and 4 gloo processes against one process, and the rules of their
plans.
"""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from wan.distributed import plan_rounds
from wan.distributed.xdit_context_parallel import UlyssesParallel, column_counts
from wan.modules.runtime import Parallel

GRID = (2, 3, 5)  # five columns: not divisible by 2 or 4
HEADS, DIM = 4, 6


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def inputs(batch: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    rows = GRID[0] * GRID[1] * GRID[2]
    return [torch.randn(batch, rows, HEADS, DIM, generator=generator) for _ in range(3)]


def run(worker, size: int, *args) -> None:
    """`worker(rank, size, *args)` in `size` gloo processes; a failure in any is raised here with its
    traceback.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_enter, args=(worker, size, port, *args), nprocs=size)


def _enter(rank: int, worker, size: int, port: int, *args) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    from wan.distributed import init_from_environment

    with init_from_environment(timeout_s=60) as launch, torch.inference_mode():
        assert (launch.rank, launch.size) == (rank, size)
        worker(rank, size, *args)


def _pieces(rank: int, size: int) -> None:
    """Every method of UlyssesParallel against the same method of a single process."""
    alone, together = Parallel(), UlyssesParallel()
    for batch in (1, 2):
        q, k, v = inputs(batch)
        parts = [together.split(t, GRID) for t in (q, k, v)]
        assert parts[0].shape[1] == GRID[0] * GRID[1] * column_counts(GRID[2], size)[rank]
        assert torch.equal(together.merge(parts[0], GRID), q)
        assert torch.equal(together.first_frame(parts[1], GRID), alone.first_frame(k, GRID))
        got = together.merge(together.attention(attend, *parts), GRID)
        torch.testing.assert_close(got, alone.attention(attend, q, k, v), rtol=1e-5, atol=1e-6)
    low, high = together.extremes(torch.tensor([1.0 + rank, -rank]), torch.tensor([rank, 2.0]))
    assert low.tolist() == [1.0, -(size - 1)]
    assert high.tolist() == [size - 1, 2.0]
    with pytest.raises(ValueError, match="don't divide 3 attention heads"):
        together.attention(attend, *(t[:, :, :3] for t in parts))
    with pytest.raises(RuntimeError, match=r"call split\(\) first"):
        together.attention(attend, *(t[:, 1:] for t in parts))


@pytest.mark.parametrize("size", [2, 4])
def test_pieces_equal_one_process(size: int) -> None:
    run(_pieces, size)


class TestRules:
    """What must hold for any size."""

    @given(width=st.integers(1, 200), size=st.integers(1, 64))
    def test_columns(self, width: int, size: int) -> None:
        if size > width:
            with pytest.raises(ValueError, match="can't share"):
                column_counts(width, size)
            return
        counts = column_counts(width, size)
        assert sum(counts) == width
        assert max(counts) - min(counts) <= 1
        assert counts == sorted(counts, reverse=True)

    @given(branches=st.integers(1, 5), world=st.sampled_from([1, 2, 3, 4, 5, 6, 8, 10, 20, 40]))
    def test_rounds(self, branches: int, world: int) -> None:
        heads = 120
        rounds = plan_rounds(branches, world, heads)
        taken = [r.first + g for r in rounds for g in range(r.groups)]
        assert taken == list(range(branches)), "every branch once, in order"
        assert all(world % r.groups == 0 and heads % (world // r.groups) == 0 for r in rounds)
        # every rank works through the whole of every round, so the work of one rank is branches/world
        assert sum(r.groups / world for r in rounds) == pytest.approx(branches / world)

    def test_two_gpus_three_branches(self) -> None:
        assert [(r.first, r.groups) for r in plan_rounds(3, 2, 40)] == [(0, 2), (2, 1)]

    def test_ranks_that_do_not_divide_the_heads(self) -> None:
        with pytest.raises(ValueError, match="3 ranks don't divide 40"):
            plan_rounds(3, 3, 40)
