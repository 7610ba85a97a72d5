"""The samplers against the reference: noise levels, traces on a toy model, MultiTalk's timesteps."""

from __future__ import annotations

import goldens
import pytest
import torch

from wan.utils import (
    FlowDPMSolverMultistepScheduler,
    FlowUniPCMultistepScheduler,
    get_sampling_sigmas,
    retrieve_timesteps,
)

GATE = 1e-5
SETTINGS = [(10, 3.0), (20, 5.0), (4, 8.0)]


def toy(x: torch.Tensor, t: float) -> torch.Tensor:
    return torch.tanh(0.7 * x + t / 1000) - 0.1 * x


def make(kind: str, steps: int, shift: float):
    if kind == "unipc":
        scheduler = FlowUniPCMultistepScheduler(shift=1, use_dynamic_shifting=False)
        scheduler.set_timesteps(steps, device="cpu", shift=shift)
    else:
        scheduler = FlowDPMSolverMultistepScheduler(shift=1, use_dynamic_shifting=False)
        retrieve_timesteps(scheduler, device="cpu", sigmas=get_sampling_sigmas(steps, shift))
    return scheduler


@pytest.mark.parametrize("kind", ["unipc", "dpm"])
@pytest.mark.parametrize(("steps", "shift"), SETTINGS)
def test_trace(kind: str, steps: int, shift: float, measured) -> None:
    z, name = goldens.load("schedulers"), f"{kind}_{steps}_{shift}"
    scheduler = make(kind, steps, shift)
    assert torch.equal(scheduler.timesteps, z[f"{name}_timesteps"])
    measured("schedulers", f"{name} sigmas", goldens.error(scheduler.sigmas, z[f"{name}_sigmas"]), GATE)
    x, worst = z["x0"], 0.0
    for t, want in zip(scheduler.timesteps, z[f"{name}_trace"], strict=True):
        (x,) = scheduler.step(toy(x, t), t, x, return_dict=False)
        worst = max(worst, goldens.error(x, want))
    measured("schedulers", f"{name} trace", worst, GATE)


@pytest.mark.parametrize("kind", ["unipc", "dpm"])
def test_a_second_run_starts_afresh(kind: str) -> None:
    scheduler, results = make(kind, 6, 5.0), []
    for _ in range(2):
        scheduler.set_timesteps(6, shift=5.0)
        x = goldens.load("schedulers")["x0"]
        for t in scheduler.timesteps:
            x = scheduler.step(toy(x, t), t, x).prev_sample
        results.append(x)
    assert torch.equal(*results)
    with pytest.raises(ValueError, match="all steps are done"):
        scheduler.step(x, 0, x)


@pytest.mark.parametrize("kind", ["unipc", "dpm"])
def test_a_straight_flow_is_solved_exactly(kind: str) -> None:
    """With the true x₀ predicted at every level the sampler must land on it, from any noise."""
    scheduler, target = make(kind, 7, 3.0), torch.tensor([0.3, -1.2])
    x = torch.tensor([5.0, 2.0])
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step((x - target) / scheduler.sigmas[i], t, x).prev_sample
    assert goldens.error(x, target) < 1e-5


def test_wrong_use_is_named() -> None:
    scheduler = make("unipc", 4, 8.0)
    with pytest.raises(ValueError, match="not the next one"):
        scheduler.step(torch.zeros(1), 1, torch.zeros(1))
    with pytest.raises(ValueError, match="at least 1"):
        scheduler.set_timesteps(0)
    with pytest.raises(ValueError, match="not both"):
        retrieve_timesteps(scheduler, timesteps=[1], sigmas=[1.0])
    with pytest.raises(ValueError, match="takes no timesteps"):
        retrieve_timesteps(scheduler, timesteps=[1])


def test_add_noise() -> None:
    scheduler, x, noise = make("dpm", 4, 8.0), torch.ones(2, 3), torch.full((2, 3), 2.0)
    got = scheduler.add_noise(x, noise, scheduler.timesteps[[0, 2]])
    assert torch.allclose(got[0], torch.full((3,), 2.0))
    assert torch.allclose(got[1], 1 + scheduler.sigmas[2].expand(3))
