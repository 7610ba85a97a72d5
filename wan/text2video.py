"""Text to video with stock Wan2.1 (and text to image: one frame)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .configs import WanConfig
from .progress import ProgressCallback, Reporter
from .stock import Sampling, StockPipeline, latent_frames

__all__ = ["WanT2V"]


class WanT2V(StockPipeline):
    """See `wan.stock.StockPipeline` for the parameters."""

    def __init__(
        self,
        config: WanConfig,
        checkpoint_dir: str | os.PathLike[str],
        device_id: int = 0,
        rank: int = 0,
        t5_fsdp: bool = False,
        dit_fsdp: bool = False,
        use_usp: bool = False,
        t5_cpu: bool = False,
    ) -> None:
        super().__init__(config, checkpoint_dir, device_id, rank, t5_fsdp, dit_fsdp, use_usp, t5_cpu)

    @torch.no_grad()
    def generate(
        self,
        input_prompt: str,
        size: tuple[int, int] = (1280, 720),
        frame_num: int = 81,
        shift: float = 5.0,
        sample_solver: str = "unipc",
        sampling_steps: int = 50,
        guide_scale: float = 5.0,
        n_prompt: str = "",
        seed: int = -1,
        offload_model: bool = True,
        *,
        on_progress: ProgressCallback | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Tensor | None:
        """→ video [3,frame_num,height,width] in [−1,1] on rank 0, None on the others.

        `size` is (width, height), multiples of 16; `frame_num` is 4n+1; `seed` below 0 draws one. With
        `offload_model` each network leaves the GPU when it has done its part. Raises ValueError.
        """
        sampling = Sampling(solver=sample_solver, steps=sampling_steps, shift=shift, guide_scale=guide_scale)
        noise = self.noise(seed, *self.latent_size(size, frame_num))
        contexts = self.encode_texts(self.prompts(input_prompt, n_prompt), offload=offload_model)
        branches = [self.branch(context) for context in contexts]
        reporter = Reporter(total=sampling_steps, callback=on_progress, cancelled=cancelled)
        latents = self.sample(noise, branches, sampling, offload=offload_model, reporter=reporter)
        return self.decode(latents)

    def latent_size(self, size: tuple[int, int], frame_num: int) -> tuple[int, int, int]:
        """(width, height) in pixels and frames → latent (T, h, w). Raises ValueError for other multiples."""
        width, height = size
        steps = [s * p for s, p in zip(self.vae_stride[1:], self.patch_size[1:], strict=True)]
        if height % steps[0] or width % steps[1]:
            msg = f"size (width, height) must be multiples of {steps[1]} and {steps[0]}, got {width}x{height}"
            raise ValueError(msg)
        frames = latent_frames(frame_num, self.vae_stride[0])
        return frames, height // self.vae_stride[1], width // self.vae_stride[2]

    def branch(self, context: Tensor) -> Any:
        """A guidance branch for one text; the text is embedded at the first step and kept."""
        text = None

        def run(latents: Tensor, time: Any) -> Tensor:
            nonlocal text
            text = text or self.model.embed_text([context], keep=True)
            return self.model.predict(latents[None], time, text)[0]

        return run
