"""Source videos and masks for VACE: which frames, which size, cut to fit. Needs ffmpeg to read files."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

__all__ = ["VaceImageProcessor", "VaceVideoProcessor"]

PathLike = str | os.PathLike[str]


class VaceImageProcessor:
    """Pictures for a model that takes sides of multiples of `downsample` (height, width) and `seq_len`
    tokens.
    """

    def __init__(self, downsample: Sequence[int] = (16, 16), seq_len: int = 1024) -> None:
        self.downsample, self.seq_len = tuple(downsample)[-2:], seq_len

    def size(self, height: int, width: int) -> tuple[int, int]:
        """The largest size within `seq_len` tokens and the picture's own, with its aspect ratio."""
        tokens = min(self.seq_len, (height // self.downsample[0]) * (width // self.downsample[1]))
        return grid_size(tokens, height / width, self.downsample)

    def load_image(self, path: PathLike) -> Tensor:
        """A picture file → [3,H,W] in [−1,1] of a size that fits."""
        from PIL import Image

        from wan.stock import image_to_tensor

        with Image.open(path) as image:
            picture = image_to_tensor(image)
        return resize_crop(picture[None], *self.size(*picture.shape[1:]))[0]


class VaceVideoProcessor:
    """Videos for a model that takes `seq_len` tokens, each of `downsample` (frames, height, width) pixels.

    Areas are pixels of a frame, rates frames a second. `zero_start` takes frames from the beginning (else
    from the middle), `keep_last` makes sure that the last frame of a short video is among them.
    """

    def __init__(
        self,
        downsample: Sequence[int] = (4, 16, 16),
        min_area: int = 480 * 832,
        max_area: int = 480 * 832,
        min_fps: float = 16,
        max_fps: float = 16,
        zero_start: bool = True,
        seq_len: int = 32760,
        keep_last: bool = True,
    ) -> None:
        if min_area > max_area or min_fps > max_fps or seq_len < 1:
            msg = f"empty range: area {min_area}…{max_area}, fps {min_fps}…{max_fps}, seq_len {seq_len}"
            raise ValueError(msg)
        self.downsample = tuple(downsample)
        self.min_area, self.max_area, self.min_fps, self.max_fps = min_area, max_area, min_fps, max_fps
        self.zero_start, self.seq_len, self.keep_last = zero_start, seq_len, keep_last

    def set_area(self, area: int) -> None:
        """Use exactly this many pixels a frame."""
        self.min_area = self.max_area = area

    def set_seq_len(self, seq_len: int) -> None:
        """Use at most this many tokens."""
        self.seq_len = seq_len

    def plan(self, frames: int, fps: float, height: int, width: int) -> tuple[list[int], tuple[int, int]]:
        """Which frames of a video to take (4n+1 of them) and the size (height, width) to bring them to."""
        step, *spatial = self.downsample
        rate = min(max(fps, self.min_fps), self.max_fps)
        taken = max(1, min(frames, math.floor(frames / fps * rate + 1e-6)))
        latents = 1 + (taken - 1) // step
        cell = spatial[0] * spatial[1]
        tokens = min(max(height * width, self.min_area), self.max_area) // cell  # of one latent frame
        latents = max(1, min(latents, self.seq_len // max(tokens, 1)))
        tokens = min(tokens, self.seq_len // latents)
        count = 1 + (latents - 1) * step
        size = grid_size(tokens, height / width, spatial)
        stride = max(1.0, fps / rate)  # a slow video is not stretched: no frame is taken twice
        return self._choose(frames, count, stride), size

    def _choose(self, frames: int, count: int, stride: float) -> list[int]:
        """`count` frame numbers, `stride` apart (closer if the video is too short for that)."""
        if count == 1:
            return [0 if self.zero_start else (frames - 1) // 2]
        span = min((count - 1) * stride, frames - 1)
        if self.keep_last and frames - 1 - span < self.downsample[0] * stride:
            span = frames - 1  # the few frames beyond would be lost: stretch to the end instead
        start = 0.0 if self.zero_start else (frames - 1 - span) / 2
        even = (start + i * span / (count - 1) for i in range(count))
        return [min(math.floor(x + 0.5), frames - 1) for x in even]  # not round(): it would pair halves up

    def load_video(self, path: PathLike) -> Tensor:
        """A video file → [3,T,H,W] in [−1,1]. Raises `wan.utils.media.MediaError`."""
        return self.load_video_batch(path)[0]

    def load_video_pair(self, path: PathLike, mask: PathLike | None) -> tuple[Tensor, Tensor | None]:
        """A video and its mask video → [3,T,H,W] in [−1,1] and [1,T,H,W] in [0,1] (None without one)."""
        if mask is None:
            return self.load_video(path), None
        video, masked = self.load_video_batch(path, mask)
        return video, (masked.mean(dim=0, keepdim=True) + 1) / 2

    def load_video_batch(self, *paths: PathLike) -> tuple[Tensor, ...]:
        """Videos that belong together → the same frames and size of each, by the first one's measures."""
        from .media import read_video

        sources = [read_video(path) for path in paths]
        (first, fps), shortest = sources[0], min(len(frames) for frames, _ in sources)
        numbers, size = self.plan(shortest, fps, *first.shape[1:3])
        chosen = [frames[numbers].permute(0, 3, 1, 2).float().div(127.5).sub(1) for frames, _ in sources]
        return tuple(resize_crop(frames, *size).transpose(0, 1) for frames in chosen)


def grid_size(tokens: int, ratio: float, cell: Sequence[int]) -> tuple[int, int]:
    """Height and width in pixels: whole cells, at most `tokens` of them, as near to height/width = `ratio` as
    can be.
    """
    rows = max(1, min(round(math.sqrt(tokens * ratio * cell[1] / cell[0])), tokens))
    return rows * cell[0], max(1, tokens // rows) * cell[1]


def resize_crop(frames: Tensor, height: int, width: int) -> Tensor:
    """Frames [T,3,H,W]: scaled until they cover the size, the centre cut out."""
    scale = max(height / frames.shape[2], width / frames.shape[3])
    scaled = max(round(frames.shape[2] * scale), height), max(round(frames.shape[3] * scale), width)
    if scaled != tuple(frames.shape[2:]):
        frames = F.interpolate(frames, size=scaled, mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
    return frames[:, :, top : top + height, left : left + width].contiguous()
