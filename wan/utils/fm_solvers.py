"""DPM-Solver++ (2M) for flow matching, and the helpers that pipelines use to choose noise levels.

DPM-Solver++, arXiv 2211.01095, algorithm 2.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .flow_scheduler import FlowScheduler, SchedulerOutput, shift_sigmas

__all__ = [
    "FlowDPMSolverMultistepScheduler",
    "SchedulerOutput",
    "get_sampling_sigmas",
    "retrieve_timesteps",
]


def get_sampling_sigmas(sampling_steps: int, shift: float) -> np.ndarray:
    """Noise levels from 1 towards 0 (not reached), shifted: [sampling_steps] fp64."""
    return shift_sigmas(np.linspace(1, 0, sampling_steps + 1)[:sampling_steps], shift)


def retrieve_timesteps(
    scheduler: Any,
    num_inference_steps: int | None = None,
    device: str | torch.device | None = None,
    timesteps: list[int] | None = None,
    sigmas: list[float] | np.ndarray | None = None,
    **kwargs: Any,
) -> tuple[Tensor, int]:
    """Set a scheduler's steps by number, by timesteps or by noise levels → its timesteps and their number.

    Raises ValueError for both at once, or for a kind that the scheduler does not take.
    """
    if timesteps is not None and sigmas is not None:
        msg = "give timesteps or sigmas, not both"
        raise ValueError(msg)
    for name, value in (("timesteps", timesteps), ("sigmas", sigmas)):
        if value is not None:
            if name not in inspect.signature(scheduler.set_timesteps).parameters:
                msg = f"{type(scheduler).__name__}.set_timesteps takes no {name}"
                raise ValueError(msg)
            scheduler.set_timesteps(device=device, **{name: value}, **kwargs)
            return scheduler.timesteps, len(scheduler.timesteps)
    scheduler.set_timesteps(num_inference_steps, device=device, **kwargs)
    return scheduler.timesteps, num_inference_steps


class FlowDPMSolverMultistepScheduler(FlowScheduler):
    """Second order from the last two predictions (midpoint); the first and the last step are first order."""

    def _advance(self, prediction: Tensor, sample: Tensor) -> Tensor:
        i = self.step_index
        here, there = self.log_snr(i), self.log_snr(i + 1)
        factor = (1 - self.sigma(i + 1)) * math.expm1(here - there)  # α·(e^(−h) − 1)
        estimate = prediction
        last = i == len(self.timesteps) - 1
        if self.predictions and self.solver_order == 2 and not last:
            previous, before = self.predictions[-1]
            ratio = (here - before) / (there - here)  # infinite after a start at σ = 1: first order then
            estimate = prediction + (prediction - previous) / (2 * ratio)
        self.predictions.append((prediction, here))
        return self.sigma(i + 1) / self.sigma(i) * sample - factor * estimate
