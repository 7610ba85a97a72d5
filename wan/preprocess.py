"""From what users give to what the model sees: size buckets, resize and crop, speaker masks. Specification
§3.1, §3.6.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from PIL.Image import Image

Buckets = Mapping[str, Sequence[int]]
"""Aspect ratio H/W as a string → (height, width)."""

# About 640 × 640 pixels; all sides are multiples of 64.
ASPECT_RATIO_627: Buckets = {
    "0.26": (320, 1216),
    "0.38": (384, 1024),
    "0.50": (448, 896),
    "0.67": (512, 768),
    "0.82": (576, 704),
    "1.00": (640, 640),
    "1.22": (704, 576),
    "1.50": (768, 512),
    "1.86": (832, 448),
    "2.00": (896, 448),
    "2.50": (960, 384),
    "2.83": (1088, 384),
    "3.60": (1152, 320),
    "3.80": (1216, 320),
    "4.00": (1280, 320),
}
# About 960 × 960 pixels.
ASPECT_RATIO_960: Buckets = {
    "0.22": (448, 2048),
    "0.29": (512, 1792),
    "0.36": (576, 1600),
    "0.45": (640, 1408),
    "0.55": (704, 1280),
    "0.63": (768, 1216),
    "0.76": (832, 1088),
    "0.88": (896, 1024),
    "1.00": (960, 960),
    "1.14": (1024, 896),
    "1.31": (1088, 832),
    "1.50": (1152, 768),
    "1.58": (1216, 768),
    "1.82": (1280, 704),
    "1.91": (1344, 704),
    "2.20": (1408, 640),
    "2.30": (1472, 640),
    "2.67": (1536, 576),
    "2.89": (1664, 576),
    "3.62": (1856, 512),
    "3.75": (1920, 512),
}
BUCKETS: Mapping[str, Buckets] = {"multitalk-480": ASPECT_RATIO_627, "multitalk-720": ASPECT_RATIO_960}

BBox = Sequence[float]


def choose_bucket(height: int, width: int, table: Buckets) -> tuple[int, int]:
    """The (height, width) whose ratio is nearest to the image's; the first of the table wins a tie."""
    ratio = height / width
    key = min(table, key=lambda k: abs(float(k) - ratio))
    return tuple(table[key])


def resize_and_centercrop(cond_image: Image | Tensor | np.ndarray, target_size: tuple[int, int]) -> Tensor:
    """Scale until both sides cover `target_size` (height, width), then cut the centre out.

    A PIL image or an array [H, W, 3] of uint8 → uint8 [1, 3, 1, height, width], bilinear with antialiasing.
    A tensor of masks [N, H, W] → [N, height, width], nearest.
    """
    if isinstance(cond_image, Tensor):
        return _center_crop(_resize_masks(cond_image, target_size), target_size)
    from PIL import Image as PILImage

    image = PILImage.fromarray(cond_image) if isinstance(cond_image, np.ndarray) else cond_image
    height, width = _covering(image.height, image.width, target_size)
    resized = image.convert("RGB").resize((width, height), resample=PILImage.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)  # [3, H, W]
    return _center_crop(pixels, target_size).contiguous()[None, :, None]


def _covering(height: int, width: int, target: tuple[int, int]) -> tuple[int, int]:
    scale = max(target[0] / height, target[1] / width)
    return math.ceil(scale * height), math.ceil(scale * width)


def _resize_masks(masks: Tensor, target: tuple[int, int]) -> Tensor:
    size = _covering(masks.shape[-2], masks.shape[-1], target)
    return F.interpolate(masks[None], size=size, mode="nearest")[0]


def _center_crop(x: Tensor, target: tuple[int, int]) -> Tensor:
    top, left = (round((size - want) / 2) for size, want in zip(x.shape[-2:], target, strict=True))
    return x[..., top : top + target[0], left : left + target[1]]


def speaker_masks(
    height: int,
    width: int,
    people: int,
    bbox: Mapping[str, BBox] | None = None,
    *,
    order: str = "rows_first",
    face_scale: float = 0.05,
) -> Tensor:
    """Masks [3, H, W] fp32 in the image's own pixels: person 1, person 2, background (what neither covers).

    One person: all ones. Two without boxes: the left and the right half, each shrunk by `face_scale`. With
    boxes: `order` "rows_first" is the original's [row_min, column_min, row_max, column_max], "xyxy" is [left,
    top, right, bottom]. Raises ValueError for boxes that are empty, outside the image, or not one per person.
    """
    if people == 1:
        if bbox:
            msg = "bbox is given, but there is one speaker; boxes tell two speakers apart. Remove bbox"
            raise ValueError(msg)
        return torch.ones(3, height, width)
    if bbox:
        boxes = [_checked_box(bbox, f"person{i + 1}", height, width, order) for i in range(people)]
    else:
        boxes = [_half(i, height, width, face_scale) for i in range(people)]
    masks = torch.zeros(3, height, width)
    for mask, (top, left, bottom, right) in zip(masks, boxes, strict=False):
        mask[top:bottom, left:right] = 1
    masks[2] = 1 - masks[:2].amax(0)
    return masks


def _half(index: int, height: int, width: int, face_scale: float) -> tuple[int, int, int, int]:
    half = width // 2
    left, right = int(half * face_scale), int(half * (1 - face_scale))
    return int(height * face_scale), left + index * half, int(height * (1 - face_scale)), right + index * half


def _checked_box(
    bbox: Mapping[str, BBox], person: str, height: int, width: int, order: str
) -> tuple[int, int, int, int]:
    if set(bbox) != {"person1", "person2"}:
        msg = f"bbox names {', '.join(sorted(bbox))}; it needs exactly person1 and person2"
        raise ValueError(msg)
    box = [int(v) for v in bbox[person]]
    if len(box) != 4:
        msg = f"bbox of {person} has {len(box)} numbers, not 4: {list(bbox[person])}"
        raise ValueError(msg)
    if order == "rows_first":
        top, left, bottom, right = box
    elif order == "xyxy":
        left, top, right, bottom = box
    else:
        msg = f"bbox order {order!r} is neither 'rows_first' nor 'xyxy'"
        raise ValueError(msg)
    if not (0 <= top < bottom <= height and 0 <= left < right <= width):
        msg = (
            f"bbox of {person} {list(bbox[person])}, read {order!r} as rows {top}…{bottom} and columns "
            f"{left}…{right}, does not lie in the image of {height} rows × {width} columns (source pixels)"
        )
        raise ValueError(msg)
    return top, left, bottom, right


def to_latent_masks(masks: Tensor, size: tuple[int, int], latent: tuple[int, int]) -> Tensor:
    """Masks [3, H, W] of the source image → [3, h, w] of the latent, through the image's own resize and crop.

    Raises ValueError when a speaker's mask is empty afterwards (the crop cut it off).
    """
    cropped = resize_and_centercrop(masks, size)
    small = (F.interpolate(cropped[None], size=latent, mode="nearest")[0] > 0).float()
    for i in range(2):
        if not small[i].any():
            msg = f"person{i + 1} is outside the picture cropped to {size[0]}×{size[1]}; move the bbox"
            raise ValueError(msg)
    return small
