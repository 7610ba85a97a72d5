"""The whole `generate` on two gloo processes against the golden loop: sequence parallel, passes first,
cancellation.
"""

from __future__ import annotations

import goldens
import pytest
import torch
from test_distributed import run
from test_generate_loop import CASES, NAME, arguments, job, make_pipeline

from wan.progress import Cancelled


def _generate(rank: int, size: int, case_name: str, cfg_parallel: bool) -> None:
    case = CASES[case_name]["case"]
    pipeline = make_pipeline("cpu")
    pipeline.rank = rank
    pipeline.spread_over_processes(cfg_parallel=cfg_parallel)
    video = pipeline.generate(job(case), **arguments(case))
    if rank:
        assert video is None
        return
    want = goldens.load(NAME)[f"{case_name}_video_u8"]
    levels = ((video + 1) / 2 * 255).clamp(0, 255).to(torch.uint8).int()[:, : want.shape[1]]
    assert (levels - want.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("case", "cfg_parallel"), [("clip2", False), ("clip2", True), ("clip1_teacache", True)]
)
def test_golden_loop_on_two_processes(case: str, cfg_parallel: bool) -> None:
    run(_generate, 2, case, cfg_parallel)


def _cancel(rank: int, size: int) -> None:
    case = CASES["clip1"]["case"]
    pipeline = make_pipeline("cpu")
    pipeline.rank = rank
    pipeline.spread_over_processes(cfg_parallel=False)
    asked = []

    def stop() -> bool:
        asked.append(rank)
        return len(asked) > 3

    with pytest.raises(Cancelled):
        pipeline.generate(job(case), **{**arguments(case), "seed": -1}, cancelled=stop if rank == 0 else None)
    seeds = [None] * size
    with torch.inference_mode(False):  # torch 2.4's gloo writes into no inference tensor
        torch.distributed.all_gather_object(seeds, pipeline.last_seed)
    assert len(set(seeds)) == 1  # a random seed is the same everywhere


def test_rank_zero_cancels_all() -> None:
    run(_cancel, 2)
