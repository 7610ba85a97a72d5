"""One hook for everything that takes long: a progress bar, a serverless update, a cancellation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ProgressCallback = Callable[[int, int, str], None]
"""(steps done, steps in total, stage): stages are `text`, `encode`, `denoise`, `decode`."""


class Cancelled(Exception):
    """The caller asked to stop; raised between steps, so nothing is half done."""


@dataclass(kw_only=True)
class Reporter:
    """Counts denoising steps over the whole video and asks `cancelled` before each."""

    total: int
    callback: ProgressCallback | None = None
    cancelled: Callable[[], bool] | None = None
    done: int = 0

    def stage(self, name: str, steps: int = 0) -> None:
        """Report `steps` more steps done, in stage `name`. Raises Cancelled when asked to stop."""
        if self.cancelled is not None and self.cancelled():
            msg = f"cancelled after {self.done} of {self.total} steps, in stage {name}"
            raise Cancelled(msg)
        self.done += steps
        if self.callback is not None:
            self.callback(self.done, self.total, name)


def agreed(cancelled: Callable[[], bool] | None, device: torch.device) -> Callable[[], bool] | None:
    """`cancelled` of rank 0, asked by all processes of the default group at the same points.

    A process that stopped alone would leave the others waiting in their next exchange. One process: as it is.
    """
    import torch
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return cancelled

    def ask() -> bool:
        stop = dist.get_rank() == 0 and cancelled is not None and cancelled()
        flag = torch.tensor([int(stop)], device=device)
        dist.broadcast(flag, 0)
        return bool(flag.item())

    return ask


class TqdmBar:
    """A progress bar on the terminal: `generate(on_progress=TqdmBar())`."""

    def __init__(self) -> None:
        self._bar = None

    def __call__(self, step: int, total: int, stage: str) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="step")
        self._bar.set_description(stage)
        self._bar.update(step - self._bar.n)
        if step >= total and stage == "decode":
            self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
