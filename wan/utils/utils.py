"""Saving samples as video and picture files, and a boolean for command lines."""

from __future__ import annotations

import argparse
import math
import os
import secrets
import tempfile
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["cache_image", "cache_video", "rand_name", "str2bool"]

GAP = 2  # black pixels between the pictures of a grid
TRUE, FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


def rand_name(length: int = 8, suffix: str = "") -> str:
    """A random file name of 2·length hex digits, and a suffix."""
    name = secrets.token_hex(length)
    return name + (f".{suffix.removeprefix('.')}" if suffix else "")


def cache_video(
    tensor: Tensor,
    save_file: str | os.PathLike[str] | None = None,
    fps: float = 30,
    suffix: str = ".mp4",
    nrow: int = 8,
    normalize: bool = True,
    value_range: tuple[float, float] = (-1, 1),
    retry: int = 5,
) -> str:
    """Videos [B,3,T,H,W] → one file with the B videos in a grid, `nrow` a row; returns its path.

    `normalize` maps `value_range` to black … white (else values are 0…1 already). Without `save_file` a new
    file in the temporary folder is written. `retry` is accepted and not used: writing doesn't fail by chance.
    Raises ValueError, or `wan.utils.media.MediaError` if ffmpeg is missing or fails.
    """
    from .media import write_video

    if tensor.ndim != 5 or tensor.shape[1] != 3:
        msg = f"videos must be [B, 3, T, H, W], got {list(tensor.shape)}"
        raise ValueError(msg)
    path = (
        Path(save_file) if save_file is not None else Path(tempfile.gettempdir()) / rand_name(suffix=suffix)
    )
    videos = unit_range(tensor, value_range) if normalize else tensor.clamp(0, 1)
    frames = torch.stack([grid(pictures, nrow) for pictures in videos.unbind(2)])  # [T, 3, H', W']
    write_video((frames * 255).to(torch.uint8).permute(0, 2, 3, 1), path, fps)
    return str(path)


def cache_image(
    tensor: Tensor,
    save_file: str | os.PathLike[str],
    nrow: int = 8,
    normalize: bool = True,
    value_range: tuple[float, float] = (-1, 1),
    retry: int = 5,
) -> str:
    """Pictures [B,3,H,W] → one file with the B pictures in a grid; returns its path. Parameters as
    `cache_video`.
    """
    from PIL import Image

    if tensor.ndim != 4 or tensor.shape[1] != 3:
        msg = f"pictures must be [B, 3, H, W], got {list(tensor.shape)}"
        raise ValueError(msg)
    path = Path(save_file)
    if not path.suffix:
        path = path.with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = grid(unit_range(tensor, value_range) if normalize else tensor.clamp(0, 1), nrow)
    pixels = (picture * 255 + 0.5).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels).save(path)
    return str(path)


def unit_range(x: Tensor, value_range: tuple[float, float]) -> Tensor:
    """Values of `value_range` → 0…1, those outside cut."""
    low, high = value_range
    return (x.float().clamp(low, high) - low) / (high - low)


def grid(pictures: Tensor, nrow: int = 8) -> Tensor:
    """Pictures [B,3,H,W] → one [3,H',W'], row by row with a black gap around each; one picture stays as it
    is.
    """
    count, channels, height, width = pictures.shape
    if count == 1:
        return pictures[0]
    columns = min(nrow, count)
    rows = math.ceil(count / columns)
    canvas = pictures.new_zeros(channels, rows * (height + GAP) + GAP, columns * (width + GAP) + GAP)
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        top, left = GAP + row * (height + GAP), GAP + column * (width + GAP)
        canvas[:, top : top + height, left : left + width] = picture
    return canvas


def str2bool(v: str | bool) -> bool:
    """'yes', 'true', 't', 'y', '1' and their opposites, in any case. Raises argparse.ArgumentTypeError."""
    if isinstance(v, bool):
        return v
    word = v.strip().lower()
    if word in TRUE:
        return True
    if word in FALSE:
        return False
    msg = f"{v!r} is neither true nor false: use one of {', '.join(TRUE + FALSE)}"
    raise argparse.ArgumentTypeError(msg)
