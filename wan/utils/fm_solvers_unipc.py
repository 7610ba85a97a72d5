"""UniPC of order 2 (variant B₂) for flow matching: a predictor, and a corrector that costs no extra
evaluation.

UniPC, arXiv 2302.04867, algorithms 5 to 8 with data prediction.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from .flow_scheduler import FlowScheduler, SchedulerOutput

__all__ = ["FlowUniPCMultistepScheduler", "SchedulerOutput"]


class FlowUniPCMultistepScheduler(FlowScheduler):
    """Each step first corrects the sample it is given with the new prediction, then predicts the next one."""

    def _reset(self) -> None:
        super()._reset()
        self._last: tuple[Tensor, int] | None = None  # the sample before the last step and that step's order

    def _advance(self, prediction: Tensor, sample: Tensor) -> Tensor:
        i = self.step_index
        if self._last is not None:
            start, order = self._last
            sample = self._update(start, i, order, corrected=prediction)
        self.predictions.append((prediction, self.log_snr(i)))
        # Few past predictions at the start, a safe first-order step at the end.
        order = min(self.solver_order, len(self.predictions), len(self.timesteps) - i)
        self._last = (sample, order)
        return self._update(sample, i + 1, order)

    def _update(self, start: Tensor, to: int, order: int, corrected: Tensor | None = None) -> Tensor:
        """The sample at level `to` from that at `to − 1`, with past predictions and, correcting, the one at
        `to`.
        """
        (base, here), past = self.predictions[-1], list(self.predictions)[-order:-1]
        step = self.log_snr(to) - here
        ratios = [(before - here) / step for _, before in past]
        slopes = [(previous - base) / ratio for (previous, _), ratio in zip(past, ratios, strict=True)]
        if corrected is not None:
            ratios.append(1.0)
            slopes.append(corrected - base)
        alpha, sigma = 1 - self.sigma(to), self.sigma(to)
        factor = alpha * math.expm1(-step)
        out = sigma / self.sigma(to - 1) * start - factor * base
        for weight, slope in zip(_weights(ratios, -step), slopes, strict=True):
            out = out - factor * weight * slope
        return out


def _weights(ratios: list[float], h: float) -> list[float]:
    """The ρ of the paper's linear system Rρ = b; 1/2 where there is one unknown, as the paper advises."""
    if len(ratios) < 2:
        return [0.5] * len(ratios)
    scale = math.expm1(h)
    phi, factorial = scale / h - 1, 1
    rows, right = [], []
    for power in range(len(ratios)):
        rows.append([ratio**power for ratio in ratios])
        factorial *= power + 1
        right.append(phi * factorial / scale)
        phi = phi / h - 1 / (factorial * (power + 2))
    return np.linalg.solve(np.array(rows), np.array(right)).tolist()
