"""Image to video with stock Wan2.1: the image is the first frame."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .progress import ProgressCallback, Reporter
from .stock import (
    Sampling,
    StockPipeline,
    conditioned_latents,
    fit_area,
    image_to_tensor,
    latent_frames,
)

__all__ = ["WanI2V"]


class WanI2V(StockPipeline):
    """See `wan.stock.StockPipeline` for the parameters."""

    with_clip = True

    @torch.no_grad()
    def generate(
        self,
        input_prompt: str,
        img: Any,
        max_area: int = 720 * 1280,
        frame_num: int = 81,
        shift: float = 5.0,
        sample_solver: str = "unipc",
        sampling_steps: int = 40,
        guide_scale: float = 5.0,
        n_prompt: str = "",
        seed: int = -1,
        offload_model: bool = True,
        *,
        on_progress: ProgressCallback | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Tensor | None:
        """→ video [3,frame_num,H,W] in [−1,1] on rank 0, None on the others.

        `img` is a PIL image or a tensor [3,H,W] in [−1,1]; the video has its aspect ratio and at most
        `max_area` pixels a frame. For 480p, shift 3 is advised. Raises ValueError.
        """
        sampling = Sampling(solver=sample_solver, steps=sampling_steps, shift=shift, guide_scale=guide_scale)
        return self.animate(
            [image_to_tensor(img)],
            (input_prompt, n_prompt),
            max_area,
            frame_num,
            sampling,
            seed,
            offload=offload_model,
            reporter=Reporter(total=sampling_steps, callback=on_progress, cancelled=cancelled),
        )

    def animate(
        self,
        images: list[Tensor],
        texts: tuple[str, str],
        max_area: int,
        frame_num: int,
        sampling: Sampling,
        seed: int,
        *,
        offload: bool,
        reporter: Reporter,
    ) -> Tensor | None:
        """With one image it is the first frame; with two, the first and the last."""
        frames = latent_frames(frame_num, self.vae_stride[0])
        h, w = fit_area(*images[0].shape[1:], max_area, self.vae_stride, self.patch_size)
        noise = self.noise(seed, frames, h, w)
        contexts = self.encode_texts(self.prompts(*texts), offload=offload)
        clip = self.encode_image(images, offload=offload)
        known = [0, frame_num - 1][: len(images)]
        size = (h * self.vae_stride[1], w * self.vae_stride[2])
        y = conditioned_latents(self.vae, images, known, frame_num, size)
        branches = [self.branch(context, clip, y) for context in contexts]
        return self.decode(self.sample(noise, branches, sampling, offload=offload, reporter=reporter))

    def branch(self, context: Tensor, clip: Tensor, y: Tensor) -> Any:
        """A guidance branch: latents and y are joined along the channels."""
        text = None

        def run(latents: Tensor, time: Any) -> Tensor:
            nonlocal text
            text = text or self.model.embed_text([context], clip, keep=True)
            return self.model.predict(torch.cat([latents, y])[None], time, text)[0]

        return run
