"""Colour matching: give generated frames the colour statistics of the reference image, against drift in long
videos.

CIE L*a*b* (D65, 2°) as scikit-image defines it, in torch so that it runs where the frames are. Specification
§3.12.
"""

from __future__ import annotations

import torch
from torch import Tensor

_XYZ_FROM_RGB = (
    (0.412453, 0.357580, 0.180423),
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)
_WHITE = (0.95047, 1.0, 1.08883)
_EPSILON = 0.008856  # where the cube root takes over from the straight line
_SLOPE, _OFFSET = 7.787, 16 / 116


def _matrix(like: Tensor) -> Tensor:
    return torch.tensor(_XYZ_FROM_RGB, dtype=torch.float64, device=like.device)


def _channels(values: tuple[float, ...], like: Tensor) -> Tensor:
    return like.new_tensor(values).view(3, *[1] * (like.ndim - 2))


def rgb_to_lab(rgb: Tensor) -> Tensor:
    """sRGB [N, 3, ...] in [0, 1] → L*a*b* of the same shape."""
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055).clamp(min=0) ** 2.4, rgb / 12.92)
    xyz = torch.einsum("xc,nc...->nx...", _matrix(rgb).to(rgb.dtype), linear) / _channels(_WHITE, rgb)
    curved = torch.where(xyz > _EPSILON, xyz.clamp(min=0) ** (1 / 3), _SLOPE * xyz + _OFFSET)
    x, y, z = curved.unbind(1)
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), dim=1)


def lab_to_rgb(lab: Tensor) -> Tensor:
    """L*a*b* [N, 3, ...] → sRGB, clipped to [0, 1]."""
    lightness, a, b = lab.unbind(1)
    y = (lightness + 16) / 116
    curved = torch.stack((a / 500 + y, y, (y - b / 200).clamp(min=0)), dim=1)
    xyz = torch.where(curved > 0.2068966, curved**3, (curved - _OFFSET) / _SLOPE) * _channels(_WHITE, lab)
    linear = torch.einsum("cx,nx...->nc...", _matrix(lab).inverse().to(lab.dtype), xyz)
    curve = 1.055 * linear.clamp(min=0) ** (1 / 2.4) - 0.055
    return torch.where(linear > 0.0031308, curve, linear * 12.92).clamp(0, 1)


def match_and_blend_colors(source_chunk: Tensor, reference_image: Tensor, strength: float) -> Tensor:
    """Move each frame's mean and deviation in L*a*b* to the reference's, then blend by `strength` (0…1).

    source_chunk [1, 3, T, H, W], reference_image [1, 3, 1, H, W], both in [−1, 1] → like source_chunk.
    A channel without variation takes the reference's mean. Raises ValueError for a wrong strength or shape.
    """
    if not 0 <= strength <= 1:
        msg = f"colour correction strength {strength} is outside 0…1"
        raise ValueError(msg)
    if source_chunk.ndim != 5 or reference_image.ndim != 5 or source_chunk.shape[1] != 3:
        msg = (
            f"expected [1, 3, T, H, W] twice, got {tuple(source_chunk.shape)}, {tuple(reference_image.shape)}"
        )
        raise ValueError(msg)
    if strength == 0:
        return source_chunk
    reference = rgb_to_lab(_unit(reference_image[:, :, 0]))  # [1, 3, H, W]
    # Frame by frame: a 720p clip in one piece would take several GB.
    frames = [_match(frame, reference, strength) for frame in source_chunk.unbind(2)]
    return torch.stack(frames, dim=2)


def _unit(x: Tensor) -> Tensor:
    return ((x.float() + 1) / 2).clamp(0, 1)


def _match(frame: Tensor, reference: Tensor, strength: float) -> Tensor:
    source = _unit(frame)
    lab = rgb_to_lab(source)
    deviation, mean = torch.std_mean(lab, dim=(-2, -1), keepdim=True, correction=0)
    target_deviation, target_mean = torch.std_mean(reference, dim=(-2, -1), keepdim=True, correction=0)
    # fp32 leaves a trace of variation in a flat channel; scaling that up would be noise.
    flat = deviation < 1e-5 * mean.abs().clamp(min=1)
    scaled = (lab - mean) * (target_deviation / torch.where(flat, 1.0, deviation)) + target_mean
    matched = lab_to_rgb(torch.where(flat, target_mean, scaled))
    blended = (1 - strength) * source + strength * matched
    return (blended * 2 - 1).to(frame.dtype)
