"""Pictures and videos as Qwen2-VL takes them: sides of whole patches, within a budget of pixels.

Source: Qwen2-VL, arXiv 2409.12191 §2.1 (naive dynamic resolution, two frames a temporal patch, 2 frames a
second).
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "extract_vision_info",
    "fetch_image",
    "fetch_video",
    "process_vision_info",
    "smart_nframes",
    "smart_resize",
]

IMAGE_FACTOR = 28  # 14-pixel patches, merged 2x2
MIN_PIXELS = 4 * 28 * 28
MAX_PIXELS = 16384 * 28 * 28
MAX_RATIO = 200
VIDEO_MIN_PIXELS = 128 * 28 * 28
VIDEO_MAX_PIXELS = 768 * 28 * 28
VIDEO_TOTAL_PIXELS = 24576 * 28 * 28
FRAME_FACTOR = 2
FPS = 2.0
FPS_MIN_FRAMES = 4
FPS_MAX_FRAMES = 768


def round_by_factor(number: float, factor: int) -> int:
    """The multiple of `factor` nearest to `number`."""
    return round(number / factor) * factor


def ceil_by_factor(number: float, factor: int) -> int:
    """The smallest multiple of `factor` that is not below `number`."""
    return math.ceil(number / factor) * factor


def floor_by_factor(number: float, factor: int) -> int:
    """The largest multiple of `factor` that is not above `number`."""
    return math.floor(number / factor) * factor


def smart_resize(
    height: int,
    width: int,
    factor: int = IMAGE_FACTOR,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
) -> tuple[int, int]:
    """Height and width in multiples of `factor`, between min_pixels and max_pixels, the aspect ratio nearly
    kept.

    Raises ValueError for a side more than 200 times the other.
    """
    if max(height, width) > MAX_RATIO * min(height, width):
        msg = f"the sides must not differ by more than {MAX_RATIO} times, got {height}x{width}"
        raise ValueError(msg)
    h, w = (max(factor, round_by_factor(side, factor)) for side in (height, width))
    if h * w > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        h, w = (max(factor, floor_by_factor(side / scale, factor)) for side in (height, width))
    elif h * w < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        h, w = (ceil_by_factor(side * scale, factor) for side in (height, width))
    return h, w


def fetch_image(ele: Mapping[str, Any], size_factor: int = IMAGE_FACTOR) -> Any:
    """`{"image": PIL image | path | file:// | data:image…}` → RGB PIL image of a fitting size.

    `resized_height` and `resized_width`, or `min_pixels` and `max_pixels`, may stand beside it. Addresses on
    the network are refused: this package fetches nothing. Raises ValueError.
    """
    from PIL import Image

    source = ele["image"] if "image" in ele else ele.get("image_url")
    if isinstance(source, Image.Image):
        image = source
    elif isinstance(source, str) and source.startswith("data:image"):
        _, mark, data = source.partition(";base64,")
        if not mark:
            msg = "a data: picture must be base64"
            raise ValueError(msg)
        image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    else:
        image = Image.open(local_path(source))
    image = image.convert("RGB")
    return image.resize(_target_size(ele, image.height, image.width, size_factor)[::-1])


def local_path(source: object) -> Path:
    """A path or file:// address → the path. Raises ValueError for anything else."""
    if isinstance(source, Path):
        return source
    if not isinstance(source, str):
        msg = f"expected a path, a file:// address or a picture, got {type(source).__name__}"
        raise ValueError(msg)
    if source.startswith("file://"):
        return Path(unquote(urlparse(source).path))
    if "://" in source:
        msg = f"{source}: nothing is fetched from the network here. Download it and give the path"
        raise ValueError(msg)
    return Path(source)


def _target_size(
    ele: Mapping[str, Any], height: int, width: int, factor: int, **limits: int
) -> tuple[int, int]:
    if "resized_height" in ele and "resized_width" in ele:
        return smart_resize(ele["resized_height"], ele["resized_width"], factor)
    limits = {
        k: ele.get(k, limits.get(k, d)) for k, d in (("min_pixels", MIN_PIXELS), ("max_pixels", MAX_PIXELS))
    }
    return smart_resize(height, width, factor, **limits)


def smart_nframes(ele: Mapping[str, Any], total_frames: int, video_fps: float) -> int:
    """How many frames to take: `nframes`, or `fps` (default 2) within min_frames…max_frames; an even number.

    Raises ValueError if both are given, or the video is too short.
    """
    if "fps" in ele and "nframes" in ele:
        msg = "give either fps or nframes"
        raise ValueError(msg)
    if "nframes" in ele:
        count = round_by_factor(ele["nframes"], FRAME_FACTOR)
    else:
        low = ceil_by_factor(ele.get("min_frames", FPS_MIN_FRAMES), FRAME_FACTOR)
        high = floor_by_factor(ele.get("max_frames", min(FPS_MAX_FRAMES, total_frames)), FRAME_FACTOR)
        wanted = total_frames / video_fps * ele.get("fps", FPS)
        count = floor_by_factor(min(max(wanted, low), high, total_frames), FRAME_FACTOR)
    if not FRAME_FACTOR <= count <= total_frames:
        msg = f"{count} frames can't be taken from a video of {total_frames} (at least {FRAME_FACTOR})"
        raise ValueError(msg)
    return count


def fetch_video(ele: Mapping[str, Any], image_factor: int = IMAGE_FACTOR) -> Tensor | list[Any]:
    """`{"video": path | list of pictures}` → frames [T,3,H,W] fp32 (0…255) of a fitting size; lists stay
    lists.

    Reading a file needs ffmpeg. Raises ValueError or `wan.utils.media.MediaError`.
    """
    source = ele["video"]
    if isinstance(source, list | tuple):
        options = {k: v for k, v in ele.items() if k != "video"}
        images = [fetch_image({"image": picture, **options}, image_factor) for picture in source]
        return images + images[-1:] * (-len(images) % FRAME_FACTOR)
    from .media import read_video

    frames, fps = read_video(local_path(source))
    count = smart_nframes(ele, len(frames), fps)
    chosen = frames[torch.linspace(0, len(frames) - 1, count).round().long()].permute(0, 3, 1, 2)
    limit = max(
        min(VIDEO_MAX_PIXELS, ele.get("total_pixels", VIDEO_TOTAL_PIXELS) // count * FRAME_FACTOR),
        round(VIDEO_MIN_PIXELS * 1.05),
    )
    limits = {"min_pixels": VIDEO_MIN_PIXELS, "max_pixels": limit}
    size = _target_size(ele, *chosen.shape[2:], image_factor, **limits)
    return F.interpolate(chosen.float(), size=size, mode="bicubic", antialias=True).clamp_(0, 255)


def extract_vision_info(conversations: Sequence[Any]) -> list[Mapping[str, Any]]:
    """The picture and video parts of one conversation (a list of messages) or of several, in order."""
    several = conversations if conversations and isinstance(conversations[0], list) else [conversations]
    contents: Iterable[Any] = (message["content"] for talk in several for message in talk)
    parts = (part for content in contents if isinstance(content, list) for part in content)
    return [part for part in parts if {"image", "image_url", "video"} & part.keys()]


def process_vision_info(conversations: Sequence[Any]) -> tuple[list[Any] | None, list[Any] | None]:
    """The loaded pictures and videos of a conversation (or None where there are none)."""
    images, videos = [], []
    for part in extract_vision_info(conversations):
        if "video" in part:
            videos.append(fetch_video(part))
        else:
            images.append(fetch_image(part))
    return images or None, videos or None
