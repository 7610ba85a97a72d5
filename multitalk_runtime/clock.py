"""How long each stage of a run takes, and how much is left."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["Clock", "Progress"]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands. Stages: image, audio, text, encode, denoise, decode, video.

    `step` of `total` counts denoising steps over the whole video (total 0: not known yet); `seconds_left`
    is an estimate from the steps so far, None before the first.
    """

    stage: str
    step: int = 0
    total: int = 0
    elapsed_s: float = 0.0
    seconds_left: float | None = None
    peak_bytes: int = 0

    def to_json(self) -> dict[str, object]:
        left = None if self.seconds_left is None else round(self.seconds_left, 1)
        return {
            "stage": self.stage,
            "step": self.step,
            "total": self.total,
            "elapsed_s": round(self.elapsed_s, 1),
            "seconds_left": left,
            "peak_bytes": self.peak_bytes,
        }


@dataclass(kw_only=True)
class Clock:
    """Adds up seconds by stage: the time between two reports belongs to the first one's stage."""

    callback: Callable[[Progress], None] | None = None
    peak: Callable[[], int] = lambda: 0
    now: Callable[[], float] = time.monotonic
    phases: dict[str, float] = field(default_factory=dict)
    _stage: str = ""
    _first: tuple[float, int] | None = None  # when denoising began, and the steps done by then

    def __post_init__(self) -> None:
        self._begin = self._last = self.now()

    @property
    def elapsed(self) -> float:
        return self.now() - self._begin

    def stage(self, name: str) -> None:
        """A stage without steps begins."""
        self.report(0, 0, name)

    def report(self, step: int, total: int, stage: str) -> None:
        """As `wan.progress.ProgressCallback`."""
        now = self.now()
        if self._stage:
            self.phases[self._stage] = self.phases.get(self._stage, 0.0) + now - self._last
        self._stage, self._last = stage, now
        if self._first is None and stage == "denoise":
            self._first = (now, step)
        if self.callback is None:
            return
        left = None
        if self._first is not None and step > self._first[1]:
            left = (now - self._first[0]) / (step - self._first[1]) * (total - step)
        self.callback(
            Progress(
                stage=stage,
                step=step,
                total=total,
                elapsed_s=now - self._begin,
                seconds_left=left,
                peak_bytes=self.peak(),
            )
        )

    def end(self) -> dict[str, float]:
        """Close the last stage; seconds by stage."""
        if self._stage:
            now = self.now()
            self.phases[self._stage] = self.phases.get(self._stage, 0.0) + now - self._last
            self._stage = ""
        return dict(self.phases)
