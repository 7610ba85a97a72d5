"""TeaCache: skip the block stack in steps where the time embedding has hardly moved. Lossy, off by default.

The signal depends on the timestep only, so which steps are skipped is known before sampling and is the same
for every guidance pass; what differs per pass is the residual that a skipped step adds instead. One object
serves one clip of one pipeline; nothing is kept on classes.

Timestep Embedding Aware Cache, arXiv 2411.19108; coefficients: specification §3.10.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

# Polynomials that turn the relative change of the signal into an estimate of the output's; highest power
# first.
# (scale, True): signal is the 6-fold modulation e0; (scale, False): the time embedding e.
COEFFICIENTS: dict[tuple[str, bool], tuple[float, ...]] = {
    ("multitalk-480", True): (2.57151496e05, -3.54229917e04, 1.40286849e03, -1.35890334e01, 1.32517977e-01),
    ("multitalk-720", True): (8.10705460e03, 2.13393892e03, -3.72934672e02, 1.66203073e01, -4.17769401e-02),
    ("multitalk-480", False): (-3.02331670e02, 2.23948934e02, -5.25463970e01, 5.87348440e00, -2.01973289e-01),
    ("multitalk-720", False): (-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683),
}


@dataclass(frozen=True, kw_only=True)
class SkipPlan:
    """`run[i]`: step i computes the blocks. `accumulated[i]`: the estimate after it."""

    run: tuple[bool, ...]
    accumulated: tuple[float, ...]


def plan_steps(
    signal: Tensor, threshold: float, coefficients: tuple[float, ...], always: Callable[[int], bool]
) -> SkipPlan:
    """Decide every step from its time embedding: signal [steps, ...] fp32, in sampling order.

    The estimates of skipped steps add up; at `threshold` a step runs and the sum starts again. `always(i)`
    forces step i to run and clears the sum.
    """
    run, sums, total = [], [], 0.0
    for i, current in enumerate(signal):
        if always(i):
            runs = True
        else:
            previous = signal[i - 1]
            change = ((current - previous).abs().mean() / previous.abs().mean()).item()
            total += _polynomial(coefficients, change)
            runs = not total < threshold
        if runs:
            total = 0.0
        run.append(runs)
        sums.append(total)
    return SkipPlan(run=tuple(run), accumulated=tuple(sums))


def _polynomial(coefficients: tuple[float, ...], x: float) -> float:
    value = 0.0
    for c in coefficients:
        value = value * x + c
    return value


@dataclass(kw_only=True)
class TeaCache:
    """The plan of one clip and the residual of each guidance pass (`passes` is 3, or 2 without text
    guidance).
    """

    plan: SkipPlan
    passes: int = 3
    _residuals: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def create(
        cls,
        e: Tensor,
        e0: Tensor,
        *,
        threshold: float = 0.2,
        model_scale: str = "multitalk-480",
        use_ret_steps: bool = True,
        passes: int = 3,
    ) -> TeaCache:
        """From the embeddings of all timesteps: e [steps, dim], e0 [steps, 6, dim].

        With `use_ret_steps` the first five steps always run; without, the first and the last.
        Raises ValueError for a scale without coefficients.
        """
        try:
            coefficients = COEFFICIENTS[model_scale, use_ret_steps]
        except KeyError:
            known = ", ".join(sorted({name for name, _ in COEFFICIENTS}))
            msg = f"TeaCache has no coefficients for {model_scale!r}; known: {known}"
            raise ValueError(msg) from None
        steps = len(e)

        def always(i: int) -> bool:
            return i < 5 if use_ret_steps else i in (0, steps - 1)

        signal = (e0 if use_ret_steps else e).float().cpu()
        return cls(plan=plan_steps(signal, threshold, coefficients, always), passes=passes)

    def run(self, step: int, slot: int, x: Tensor, blocks: Callable[[Tensor], Tensor]) -> Tensor:
        """x through the blocks, or x plus what they added when they last ran for this pass (`slot`)."""
        if not 0 <= slot < self.passes:
            msg = f"guidance pass {slot} of {self.passes}: TeaCache was made for {self.passes} passes a step"
            raise ValueError(msg)
        if self.plan.run[step]:
            out = blocks(x)
            self._residuals[slot] = out - x
            return out
        return x + self._residuals[slot]


@dataclass(kw_only=True)
class TeaCacheCounter:
    """For callers of `forward` that do not say which step and pass they are in: counts calls, decides on the
    fly.

    `WanModel.teacache_init` makes one. Calls must come in turn (every pass of a step, then the next step) and
    start again at step 0 after `steps` steps.
    """

    threshold: float
    steps: int
    model_scale: str
    use_ret_steps: bool
    passes: int = 3
    calls: int = 0
    accumulated: float = 0.0
    ran: bool = True
    _previous: dict[int, Tensor] = field(default_factory=dict)
    _sums: dict[int, float] = field(default_factory=dict)
    _residuals: dict[int, Tensor] = field(default_factory=dict)

    def run(self, e: Tensor, e0: Tensor, x: Tensor, blocks: Callable[[Tensor], Tensor]) -> Tensor:
        """One call with its embeddings; afterwards `ran` and `accumulated` say what happened."""
        step, slot = divmod(self.calls, self.passes)
        self.calls = (self.calls + 1) % (self.steps * self.passes)
        signal = e0 if self.use_ret_steps else e
        forced = step < 5 if self.use_ret_steps else step in (0, self.steps - 1)
        total = self._sums.get(slot, 0.0)
        if not forced:
            previous = self._previous[slot]
            change = ((signal - previous).abs().mean() / previous.abs().mean()).item()
            total += _polynomial(COEFFICIENTS[self.model_scale, self.use_ret_steps], change)
        self.ran = forced or not total < self.threshold
        self.accumulated = self._sums[slot] = 0.0 if self.ran else total
        self._previous[slot] = signal.clone()
        if self.ran:
            out = blocks(x)
            self._residuals[slot] = out - x
            return out
        return x + self._residuals[slot]


__all__ = ["COEFFICIENTS", "SkipPlan", "TeaCache", "TeaCacheCounter", "plan_steps"]
