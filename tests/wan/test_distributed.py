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

from wan.distributed import BranchParallel, free_model, plan_rounds, shard_model
from wan.distributed.xdit_context_parallel import UlyssesParallel, column_counts
from wan.modules.multitalk_model import WanModel
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

    with init_from_environment(timeout_s=300) as launch, torch.inference_mode():
        assert (launch.rank, launch.size) == (rank, size)
        worker(rank, size, *args)


def _pieces(rank: int, size: int) -> None:
    _pieces_on(torch.device("cpu"), rank, size)


def _pieces_on(device: torch.device, rank: int, size: int) -> None:
    """Every method of UlyssesParallel against the same method of a single process."""
    alone, together = Parallel(), UlyssesParallel()
    for batch in (1, 2):
        q, k, v = (t.to(device) for t in inputs(batch))
        parts = [together.split(t, GRID) for t in (q, k, v)]
        assert parts[0].shape[1] == GRID[0] * GRID[1] * column_counts(GRID[2], size)[rank]
        assert torch.equal(together.merge(parts[0], GRID), q)
        assert torch.equal(together.first_frame(parts[1], GRID), alone.first_frame(k, GRID))
        got = together.merge(together.attention(attend, *parts), GRID)
        torch.testing.assert_close(got, alone.attention(attend, q, k, v), rtol=1e-5, atol=1e-6)
    bounds = torch.tensor([1.0 + rank, -rank]), torch.tensor([rank, 2.0])
    low, high = together.extremes(*(t.to(device) for t in bounds))
    assert low.tolist() == [1.0, -(size - 1)]
    assert high.tolist() == [size - 1, 2.0]
    with pytest.raises(ValueError, match="don't divide 3 attention heads"):
        together.attention(attend, *(t[:, :, :3] for t in parts))
    with pytest.raises(RuntimeError, match=r"call split\(\) first"):
        together.attention(attend, *(t[:, 1:] for t in parts))


def dit(seed: int = 1) -> WanModel:
    """A tiny audio DiT, with weights wide enough apart that speakers are told apart beyond rounding."""
    torch.manual_seed(seed)
    model = WanModel(
        in_dim=36,
        dim=48,
        ffn_dim=96,
        freq_dim=32,
        text_dim=24,
        text_len=16,
        num_heads=4,
        num_layers=3,
        context_tokens=4,
        intermediate_dim=8,
    )
    return model.eval().requires_grad_(False)


def call(people: int, seed: int = 0) -> dict[str, object]:
    """Arguments of one pass on a 3×4×6 token grid: six columns, so four ranks take 2, 2, 1 and 1."""
    g = torch.Generator().manual_seed(seed)
    left = torch.zeros(8, 12)
    left[:, :5] = 1
    masks = torch.stack((left, left.flip(1), 1 - left - left.flip(1)))
    return {
        "x": [torch.randn(16, 3, 8, 12, generator=g)],
        "t": torch.tensor([700.0]),
        "context": [torch.randn(9, 24, generator=g)],
        "seq_len": 72,
        "clip_fea": torch.randn(1, 257, 1280, generator=g),
        "y": torch.randn(1, 20, 3, 8, 12, generator=g),
        "audio": torch.randn(people, 9, 5, 12, 768, generator=g),
        "ref_target_masks": masks,
    }


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * float(want.abs().max()))


def _dit(rank: int, size: int) -> None:
    """One and two speakers by Ulysses, then three branches by the hybrid, then by FSDP with Ulysses."""
    model = dit()
    wants = {people: model(**call(people)) for people in (1, 2)}
    model.use(parallel=UlyssesParallel())
    for people, want in wants.items():
        close(model(**call(people)), want)

    calls = [call(people, seed) for people, seed in ((2, 5), (2, 6), (1, 7))]
    model.use(parallel=Parallel())
    wants = [model(**c) for c in calls]
    ran: list[int] = []

    def branch(i: int) -> Tensor:
        ran.append(i)
        return model(**calls[i])

    branches = BranchParallel(heads=4)
    got = branches(lambda p: model.use(parallel=p), [lambda i=i: branch(i) for i in range(3)])
    for g, w in zip(got, wants, strict=True):
        close(g, w)
    assert ran == {2: [rank, 2], 4: [rank // 2, 2]}[size], "whole branches first, the last by all ranks"

    other = dit(seed=1 + rank)  # only rank 0 has the right weights: they must reach the others
    shard_model(other, torch.device("cpu"), param_dtype=torch.float32)
    held = sum(p.numel() for b in other.blocks for p in b.parameters())
    whole = sum(p.numel() for b in model.blocks for p in b.parameters())
    assert held < whole * 1.1 / size, (held, whole)
    other.use(parallel=UlyssesParallel())
    close(other(**calls[0]), wants[0])
    free_model(other)
    flat = [b._handle.flat_param for b in other.blocks]
    assert all(f.untyped_storage().nbytes() == 0 for f in flat)


def _everything(rank: int, size: int) -> None:
    _pieces(rank, size)
    _dit(rank, size)


@pytest.mark.parametrize("size", [2, 4])
def test_processes_equal_one(size: int) -> None:
    """The pieces, then the model: in one start of the processes, which is most of the time."""
    run(_everything, size)


def test_sharding_needs_blocks() -> None:
    with pytest.raises(ValueError, match="Linear has no `blocks`"):
        shard_model(torch.nn.Linear(2, 2), torch.device("cpu"))


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
