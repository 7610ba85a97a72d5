"""Encode a still part of a video once.

MultiTalk encodes the frames it knows (one, or 25) and grey ones up to the clip's end, so most pieces of that
video are equal. A layer that gets the same input with the same frames before it gives the same output, bit
for bit: once the known frames have left a layer's memory, it need not run again. The layers close to the
pixels, which cost most, are reached by the fewest frames, so they are the first to rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from wan.modules.vae_layers import CausalCache, same_bits

__all__ = ["SteadyEncoder", "same_bits"]

Step = Callable[[Any, CausalCache], Any]
"""One step of a network: what the step before it gave, and the cache → what the next one takes."""


class SteadyEncoder:
    """The steps of a causal network, applied to the pieces of one video in turn.

    While a piece equals the one before it, the first steps are left out: as many as were settled then, which
    means that the piece left each layer's memory as it found it. What they gave is the only thing kept, and
    only if the next piece is equal too. In a 4-frame piece a layer of three frames in time settles at the
    latest one piece after those before it, in a 1-frame piece two; at once where frames of a piece come out
    equal. A video without equal pieces costs one comparison of its pixels and keeps nothing.
    """

    def __init__(self, steps: Sequence[Step], cache: CausalCache) -> None:
        self.steps, self.cache = steps, cache
        self._kept: tuple[int, Any] | None = None

    def __call__(self, x: Tensor, *, repeats: bool) -> Any:
        """The network's output for piece x. `repeats`: the next piece, if there is one, is equal to x."""
        done, state = kept = self._kept or (0, x)
        self._kept = None
        settled = repeats
        for number, step in enumerate(self.steps[done:], done + 1):
            self.cache.watch(settled)
            state = step(state, self.cache)
            settled = settled and self.cache.settled
            if settled:
                kept = (number, state)
        self.cache.watch(False)
        if repeats:
            self._kept = kept
        return state
