"""First and last frame to video with stock Wan2.1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .image2video import WanI2V
from .progress import ProgressCallback, Reporter
from .stock import Sampling, image_to_tensor

__all__ = ["WanFLF2V"]


class WanFLF2V(WanI2V):
    """See `wan.stock.StockPipeline` for the parameters."""

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_prompt: str,
        first_frame: Any,
        last_frame: Any,
        max_area: int = 720 * 1280,
        frame_num: int = 81,
        shift: float = 16,
        sample_solver: str = "unipc",
        sampling_steps: int = 50,
        guide_scale: float = 5.5,
        n_prompt: str = "",
        seed: int = -1,
        offload_model: bool = True,
        *,
        on_progress: ProgressCallback | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Tensor | None:
        """→ video [3,frame_num,H,W] in [−1,1] on rank 0, None on the others.

        Frames are PIL images or tensors [3,H,W] in [−1,1]; the last one is scaled and cropped to the first
        one's size. The rest as for `WanI2V.generate`. Raises ValueError.
        """
        first = image_to_tensor(first_frame)
        last = cover(image_to_tensor(last_frame), tuple(first.shape[1:]))
        sampling = Sampling(solver=sample_solver, steps=sampling_steps, shift=shift, guide_scale=guide_scale)
        return self.animate(
            [first, last],
            (input_prompt, n_prompt),
            max_area,
            frame_num,
            sampling,
            seed,
            offload=offload_model,
            reporter=Reporter(total=sampling_steps, callback=on_progress, cancelled=cancelled),
        )


def cover(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Scale an image [3,H,W] until it covers `size` (height, width), and cut its centre out."""
    height, width = image.shape[1:]
    if (height, width) == size:
        return image
    scale = max(size[0] / height, size[1] / width)
    scaled = (max(round(height * scale), size[0]), max(round(width * scale), size[1]))
    image = F.interpolate(image[None], size=scaled, mode="bilinear", antialias=True)[0]
    top, left = (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2
    return image[:, top : top + size[0], left : left + size[1]]
