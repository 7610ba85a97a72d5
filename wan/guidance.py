"""Guidance: which passes a step needs, and how their velocities become one.

Classifier-free guidance over text and audio (MultiTalk, arXiv 2505.22647), and its adaptive projected form,
which damps the oversaturation of high scales (APG, arXiv 2410.02416). Specification §3.8 and §3.9.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


class MomentumBuffer:
    """A running sum: average ← value + momentum·average. One per guidance direction and clip."""

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self.running_average: Tensor | float = 0.0

    def update(self, update_value: Tensor) -> None:
        self.running_average = update_value + self.momentum * self.running_average


def project(v: Tensor, onto: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of v [C, T, h, w] parallel and orthogonal to `onto`, taken as single vectors; fp64 inside."""
    wide, unit = v.double(), torch.nn.functional.normalize(onto.double().flatten(), dim=0).view_as(onto)
    parallel = (wide * unit).sum() * unit
    return parallel.to(v.dtype), (wide - parallel).to(v.dtype)


def adaptive_projected_guidance(
    diff: Tensor,
    pred_cond: Tensor,
    momentum_buffer: MomentumBuffer | None = None,
    eta: float = 0.0,
    norm_threshold: float = 55,
) -> Tensor:
    """A guidance direction, smoothed over steps, bounded, and freed (eta 0) of its part along `pred_cond`.

    diff, pred_cond [C, T, h, w]; `norm_threshold` 0 means unbounded.
    """
    if momentum_buffer is not None:
        momentum_buffer.update(diff)
        diff = momentum_buffer.running_average
    if norm_threshold > 0:
        diff = diff * torch.clamp(norm_threshold / diff.norm(), max=1)
    parallel, orthogonal = project(diff, pred_cond)
    return orthogonal + eta * parallel


@dataclass(frozen=True, kw_only=True)
class ApgOptions:
    momentum: float = -0.75
    norm_threshold: float = 55


@dataclass(kw_only=True)
class Guidance:
    """The guidance of one clip (it holds APG's momentum, so make a new one for each).

    Passes: `cond` (prompt, speech), `drop_text` (negative prompt, speech), `uncond` (negative prompt,
    silence); with a text scale of 1 only `cond` and `drop_audio` (prompt, silence).
    """

    text_scale: float = 5.0
    audio_scale: float = 4.0
    apg: ApgOptions | None = None
    _text: MomentumBuffer | None = field(init=False, default=None)
    _audio: MomentumBuffer | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.apg is not None:
            self._text, self._audio = (MomentumBuffer(self.apg.momentum) for _ in range(2))

    @property
    def passes(self) -> tuple[str, ...]:
        if math.isclose(self.text_scale, 1.0):
            return "cond", "drop_audio"
        return "cond", "drop_text", "uncond"

    def __call__(self, velocities: Sequence[Tensor]) -> Tensor:
        """Velocities [16, T, h, w] in the order of `passes` → the one to follow."""
        cond, base = velocities[0], velocities[1]
        if len(velocities) == 2:
            if self.apg is None:
                return base + self.audio_scale * (cond - base)
            return cond + (self.audio_scale - 1) * self._projected(cond - base, cond, self._audio)
        uncond = velocities[2]
        if self.apg is None:
            return uncond + self.text_scale * (cond - base) + self.audio_scale * (base - uncond)
        text = self._projected(cond - base, cond, self._text)
        audio = self._projected(base - uncond, cond, self._audio)
        return cond + (self.text_scale - 1) * text + (self.audio_scale - 1) * audio

    def _projected(self, diff: Tensor, cond: Tensor, buffer: MomentumBuffer | None) -> Tensor:
        threshold = self.apg.norm_threshold
        return adaptive_projected_guidance(diff, cond, momentum_buffer=buffer, norm_threshold=threshold)
