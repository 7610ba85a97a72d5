"""What the multistep samplers share: the flow-matching noise schedule and the record of past predictions.

A latent at noise level σ is x = (1 − σ)·x₀ + σ·ε, and the network predicts the velocity v = ε − x₀, hence
x₀ = x − σ·v. λ = log((1 − σ)/σ) is half the log signal-to-noise ratio, in which the solvers integrate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SchedulerOutput:
    prev_sample: Tensor


def shift_sigmas(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """Spend more steps at high noise: s·σ / (1 + (s − 1)·σ)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


class FlowScheduler(ABC):
    """Base of the two solvers; `set_timesteps`, then `step` for each of `timesteps` in order.

    `shift` given here moves the range of noise levels, the one of `set_timesteps` the levels themselves
    (callers use the second). Only flow prediction without dynamic shifting exists. State: the last
    predictions of x₀ and their λ.
    """

    order = 1

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        solver_order: int = 2,
        prediction_type: str = "flow_prediction",
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
    ) -> None:
        if prediction_type != "flow_prediction" or use_dynamic_shifting:
            msg = (
                f"prediction_type={prediction_type!r}, use_dynamic_shifting={use_dynamic_shifting}: flow only"
            )
            raise ValueError(msg)
        if solver_order not in (1, 2):
            msg = f"solver_order {solver_order}: 1 or 2"
            raise ValueError(msg)
        self.num_train_timesteps = num_train_timesteps
        self.solver_order = solver_order
        levels = shift_sigmas(1 - np.linspace(1, 1 / num_train_timesteps, num_train_timesteps), shift)
        self.sigma_min, self.sigma_max = float(levels[0]), float(levels[-1])
        self.shift = shift
        self.sigmas = torch.empty(0)
        self.timesteps = torch.empty(0, dtype=torch.int64)
        self._reset()

    def _reset(self) -> None:
        self.step_index = 0
        self.predictions: deque[tuple[Tensor, float]] = deque(
            maxlen=self.solver_order
        )  # (x₀, λ), newest last

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | np.ndarray | None = None,
        mu: float | None = None,
        shift: float | None = None,
    ) -> None:
        """Choose the noise levels: evenly spaced ones, or `sigmas`; then shifted. Clears the state."""
        if mu is not None:
            msg = "mu belongs to dynamic shifting, which these checkpoints do not use"
            raise ValueError(msg)
        if sigmas is None:
            if num_inference_steps is None or num_inference_steps < 1:
                msg = f"num_inference_steps is {num_inference_steps}; at least 1 is needed (or sigmas)"
                raise ValueError(msg)
            sigmas = np.linspace(self.sigma_max, self.sigma_min, num_inference_steps + 1)[:-1]
        levels = shift_sigmas(np.asarray(sigmas, dtype=np.float64), self.shift if shift is None else shift)
        # The network was given whole timesteps, rounded down.
        self.timesteps = torch.from_numpy((levels * self.num_train_timesteps).astype(np.int64)).to(device)
        self.sigmas = torch.from_numpy(np.append(levels, 0.0).astype(np.float32))
        self._reset()

    def sigma(self, index: int) -> float:
        return self.sigmas[index].double().item()

    def log_snr(self, index: int) -> float:
        """λ of noise level `index`; −inf at σ = 1, +inf at σ = 0."""
        sigma = self.sigmas[index].double()
        return (torch.log(1 - sigma) - torch.log(sigma)).item()

    def scale_model_input(self, sample: Tensor, *args: object, **kwargs: object) -> Tensor:
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """(1 − σ)·x₀ + σ·ε at the given members of `timesteps`: one for each sample of the batch."""
        index = [(self.timesteps.cpu() == t).nonzero()[0].item() for t in timesteps.cpu()]
        sigma = self.sigmas[index].to(original_samples)
        sigma = sigma.view(-1, *[1] * (original_samples.ndim - 1))
        return (1 - sigma) * original_samples + sigma * noise

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        return_dict: bool = True,
        generator: object = None,
    ) -> SchedulerOutput | tuple[Tensor]:
        """From the velocity at the current timestep to the sample at the next; deterministic.

        Steps must be taken in order: `timestep` is checked. Raises ValueError when it is not its turn.
        """
        if self.step_index >= len(self.timesteps) or int(timestep) != int(self.timesteps[self.step_index]):
            expected = self.timesteps[self.step_index :][:1].tolist() or "none: all steps are done"
            msg = f"timestep {int(timestep)} is not the next one ({expected}); set_timesteps starts again"
            raise ValueError(msg)
        wide = sample.float()
        prediction = wide - self.sigma(self.step_index) * model_output.float()
        following = self._advance(prediction, wide).to(model_output.dtype)
        self.step_index += 1
        return SchedulerOutput(prev_sample=following) if return_dict else (following,)

    @abstractmethod
    def _advance(self, prediction: Tensor, sample: Tensor) -> Tensor:
        """The solver's own step: each subclass has one, this class only keeps time."""

    def __len__(self) -> int:
        return self.num_train_timesteps
