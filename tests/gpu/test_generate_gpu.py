"""The whole `generate` on a GPU: from the CPU's noise the golden loop, wherever the weights wait."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "wan"))

import goldens
from test_generate_loop import CASES, NAME, arguments, job, make_pipeline

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(autouse=True)
def _cpu_noise(monkeypatch: pytest.MonkeyPatch):
    """The golden numbers began with the CPU's generator; draw there and copy."""
    from wan import multitalk, pipeline_steps

    def generator(_self, seed, _parity):
        return torch.Generator("cpu").manual_seed(seed)

    def draw(shape, dtype, device, generator):
        return torch.randn(shape, dtype=dtype, generator=generator).to(device)

    monkeypatch.setattr(multitalk.MultiTalkPipeline, "_generator", generator)
    monkeypatch.setattr(pipeline_steps, "draw", draw)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def frames(video: torch.Tensor) -> torch.Tensor:
    return ((video + 1) / 2 * 255).clamp(0, 255).to(torch.uint8).int()


@pytest.mark.parametrize("name", CASES)
def test_golden_loop(name: str) -> None:
    case, want = CASES[name]["case"], goldens.load(NAME)[f"{name}_video_u8"]
    video = make_pipeline("cuda").generate(job(case), **arguments(case))
    assert video.device.type == "cpu"
    assert (frames(video)[:, : want.shape[1]] - want.int()).abs().max() <= 1


@pytest.mark.parametrize("placement", ["offload", "blocks travel"])
def test_placements_change_nothing(placement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["stream1"]["case"]
    want = make_pipeline("cuda").generate(job(case), **arguments(case))
    pipeline = make_pipeline("cuda")
    if placement == "offload":
        monkeypatch.setattr(pipeline, "_all_fits", lambda: False)
    else:
        pipeline.enable_vram_management(0)
    video = pipeline.generate(job(case), **arguments(case), offload_model=True)
    assert (frames(video) - frames(want)).abs().max() <= 1
    if placement == "offload":
        assert next(pipeline.model.parameters()).device.type == "cpu"


def test_bf16_and_fused_run() -> None:
    """bf16 has no golden video; it must run, repeat itself exactly, and stay near the fp32 one."""
    case = CASES["clip1"]["case"]
    pipeline = make_pipeline("cuda")
    pipeline.config = replace(pipeline.config, param_dtype_name="bfloat16")
    pipeline.model.bfloat16()
    video = pipeline.generate(job(case), **arguments(case))
    assert torch.equal(video, pipeline.generate(job(case), **arguments(case)))
    want = frames(make_pipeline("cuda").generate(job(case), **arguments(case)))
    assert (frames(video) - want).abs().float().mean() < 4
    pytest.importorskip("triton")
    from wan.kernels.ops import FUSED

    pipeline.model.use(ops=FUSED)
    fused = pipeline.generate(job(case), **arguments(case))
    assert (frames(fused) - want).abs().float().mean() < 4
