"""Block-wise offload: the same numbers, the promised memory, the rules of the plan. Streams: tests/gpu."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from wan.offload import offload, plan_residency


class Stack(nn.Module):
    """Blocks of unequal sizes and dtypes with a buffer, between two root layers."""

    def __init__(self, blocks: int = 5) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8 + i), nn.Linear(8 + i, 8)) for i in range(blocks)
        )
        for block in self.blocks:
            block.register_buffer("steps", torch.arange(3))
        self.blocks[1].to(torch.float64)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, order: list[int] | None = None) -> torch.Tensor:
        x = self.embed(x)
        for i in order or range(len(self.blocks)):
            block = self.blocks[i]
            x = block(x.to(block[0].weight.dtype)).float()
        return self.head(x)


def storages(model: nn.Module) -> set[int]:
    return {p.untyped_storage().data_ptr() for p in model.blocks.parameters()}


@pytest.mark.parametrize("persistent", [0, 160, 10**9])
@pytest.mark.parametrize("ahead", [1, 2])
def test_same_output_whatever_stays(persistent: int, ahead: int) -> None:
    torch.manual_seed(0)
    model = Stack()
    x = torch.randn(3, 8)
    want, state = model(x), copy.deepcopy(model.state_dict())
    offloader = offload(model, "cpu", persistent_parameters=persistent, ahead=ahead)
    for _ in range(3):  # the last block of a pass asks for the first of the next
        assert torch.equal(model(x), want)
    assert offloader.fetched_late == (1 if offloader.blocks else 0), "only the very first block comes late"
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    offloader.close()
    assert torch.equal(model(x), want)


def test_blocks_out_of_order_are_late_not_wrong() -> None:
    torch.manual_seed(0)
    model = Stack()
    x, order = torch.randn(3, 8), [3, 0, 0, 4, 1]
    want = model(x, order)
    offloader = offload(model, "cpu", persistent_parameters=0)
    assert torch.equal(model(x, order), want)
    assert offloader.fetched_late > 1


def test_weights_run_from_the_slots() -> None:
    """The kernel of the matter: a running block reads slot memory, an idle one lies in its host arena."""
    model = Stack()
    offloader = offload(model, "cpu", persistent_parameters=0)
    slots = {slot.buffer.untyped_storage().data_ptr() for slot in offloader._slots}
    seen: list[int] = []
    for block in model.blocks:
        block[0].register_forward_hook(lambda m, *_: seen.append(m.weight.untyped_storage().data_ptr()))
    model(torch.randn(2, 8))
    assert set(seen) == slots and len(slots) == 2
    assert not storages(model) & slots
    assert len(storages(model)) == len(model.blocks), "one arena a block, nothing held twice"


def test_a_failing_block_leaves_the_model_whole() -> None:
    model = Stack()
    offloader = offload(model, "cpu", persistent_parameters=0)
    with pytest.raises(RuntimeError):
        model.blocks[2](torch.randn(2, 3))
    assert not storages(model) & {s.buffer.untyped_storage().data_ptr() for s in offloader._slots}
    x = torch.randn(2, 8)
    want = model(x)
    assert torch.equal(model(x), want)


def test_wants_one_limit() -> None:
    for limits in ({}, {"budget": 1, "persistent_parameters": 1}):
        with pytest.raises(ValueError, match="either budget"):
            offload(Stack(), "cpu", **limits)


class TestPlan:
    """`plan_residency` keeps its budget and uses it."""

    @given(
        sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=50),
        root=st.integers(0, 1000),
        budget=st.integers(0, 60_000),
        ahead=st.integers(1, 3),
    )
    def test_within_budget(self, sizes: list[int], root: int, budget: int, ahead: int) -> None:
        need = root + (ahead + 1) * max(sizes)
        if budget < min(need, root + sum(sizes)):
            with pytest.raises(ValueError, match="can't hold"):
                plan_residency(sizes, root, budget, ahead=ahead)
            return
        plan = plan_residency(sizes, root, budget, ahead=ahead)
        assert plan.device_bytes <= budget
        away = [n for i, n in enumerate(sizes) if i not in plan.resident]
        assert plan.host_bytes == sum(away)
        assert not away or plan.device_bytes + 2 * max(sizes) > budget - max(sizes), (
            "no block left out for nothing"
        )

    @given(count=st.integers(1, 40), budget=st.integers(0, 40))
    def test_evenly_spread(self, count: int, budget: int) -> None:
        resident = (
            plan_residency([1] * count, 0, min(budget + 2, count), ahead=1).resident if count > 2 else ()
        )
        gaps = [b - a for a, b in itertools.pairwise(resident)]
        assert not gaps or max(gaps) - min(gaps) <= 1
