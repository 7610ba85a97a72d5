"""A clip's decoded pieces on their way out: which frames are new, and how they reach the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .clips import Clip


def new_frames(
    pieces: Iterator[Tensor], clip: Clip, room: int, tail: list[Tensor], *, last: bool
) -> Iterator[Tensor]:
    """A clip's pieces [1, 3, f, H, W], all added to `tail` → its new frames [3, f, H, W], `room` at most. Of
    the last clip nothing is decoded beyond them.
    """
    known = clip.motion
    for piece in pieces:
        tail.append(piece)
        new = piece[0, :, known : known + room]
        known = max(known - piece.shape[2], 0)
        room -= new.shape[1]
        if new.shape[1]:
            yield new
        if last and not room:
            return


def on_host(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """Each tensor on the CPU, while a GPU already works at the next one."""
    before: Callable[[], Tensor] | None = None
    for piece in pieces:
        copy = _copied(piece)
        if before is not None:
            yield before()
        before = copy
    if before is not None:
        yield before()


def _copied(piece: Tensor) -> Callable[[], Tensor]:
    """Begin to copy `piece` to the CPU; the result waits for it."""
    if piece.device.type != "cuda":
        return piece.cpu
    host = torch.empty(piece.shape, dtype=piece.dtype, pin_memory=True)
    host.copy_(piece, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(piece.device))

    def wait() -> Tensor:
        done.synchronize()
        return host

    return wait
