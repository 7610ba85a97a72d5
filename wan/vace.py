"""VACE: video creation and editing with stock Wan2.1, steered by control videos, masks and reference images.

VACE, arXiv 2503.07598 (§3: a frame is split by its mask into what stays and what changes; both are coded, the
mask is carried as 64 channels, reference images are put in front as frames).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .modules.vace_model import VaceWanModel
from .progress import ProgressCallback, Reporter
from .stock import Sampling, image_to_tensor
from .text2video import WanT2V
from .vace_workers import WanVaceMP

__all__ = ["WanVace", "WanVaceMP"]

REFERENCE_GREY = 1.0  # a reference image is put on white


class WanVace(WanT2V):
    """See `wan.stock.StockPipeline` for the parameters."""

    model_class = VaceWanModel

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_prompt: str,
        input_frames: Sequence[Tensor],
        input_masks: Sequence[Tensor | None] | None,
        input_ref_images: Sequence[Sequence[Tensor] | None] | None,
        size: tuple[int, int] = (1280, 720),
        frame_num: int = 81,
        context_scale: float = 1.0,
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
        """→ video [3,T,H,W] in [−1,1] on rank 0, None on the others; T, H and W are those of the control
        video.

        One control video [3,T,H,W] in [−1,1] in `input_frames`, its mask [1,T,H,W] (1: to be made anew) in
        `input_masks` or None, and reference images [3,1,H,W] in `input_ref_images` or None: as
        `prepare_source` returns them. `context_scale` weighs the control. `size` and `frame_num` are not
        read.
        """
        sampling = Sampling(solver=sample_solver, steps=sampling_steps, shift=shift, guide_scale=guide_scale)
        if len(input_frames) != 1:
            msg = f"one control video is generated from at a time, got {len(input_frames)}"
            raise ValueError(msg)
        references = list((input_ref_images or [None])[0] or ())
        control = self.encode_control(input_frames[0], (input_masks or [None])[0], references)
        noise = self.noise(seed, *control.shape[1:])
        contexts = self.encode_texts(self.prompts(input_prompt, n_prompt), offload=offload_model)
        branches = [self.controlled(context, control, context_scale) for context in contexts]
        reporter = Reporter(total=sampling_steps, callback=on_progress, cancelled=cancelled)
        latents = self.sample(noise, branches, sampling, offload=offload_model, reporter=reporter)
        return self.decode(latents[:, len(references) :])  # the references are not part of the video

    def controlled(self, context: Tensor, control: Tensor, scale: float) -> Any:
        """A guidance branch for one text under the control latents."""
        text = None

        def run(latents: Tensor, time: Any) -> Tensor:
            nonlocal text
            text = text or self.model.embed_text([context], keep=True)
            return self.model.predict(latents[None], time, text, control[None], scale)[0]

        return run

    def encode_control(self, frames: Tensor, mask: Tensor | None, references: Sequence[Tensor]) -> Tensor:
        """Control video [3,T,H,W], mask [1,T,H,W] or None, references [3,1,H,W] → control latents
        [96,R+t,h,w].

        Channels: 16 of what stays, 16 of what changes, 64 of the mask.
        """
        frames = frames.to(self.device)
        if mask is None:
            mask = frames.new_ones(1, *frames.shape[1:])
        mask = mask.to(self.device)
        check_mask(mask, frames)
        binary = (mask > 0.5).to(frames.dtype)
        stays, changes = self.vae.encode([frames * (1 - binary), frames * binary])
        z = torch.cat([stays, changes])  # [32, t, h, w]
        for image in reversed(references):
            latent = self.vae.encode([image.to(self.device)])[0]
            z = torch.cat([torch.cat([latent, torch.zeros_like(latent)]), z], dim=1)
        return torch.cat([z, mask_latents(mask, self.vae_stride, len(references)).to(z)])

    def prepare_source(
        self,
        src_video: Sequence[Tensor | str | os.PathLike[str] | None],
        src_mask: Sequence[Tensor | str | os.PathLike[str] | None],
        src_ref_images: Sequence[Sequence[Any] | None],
        num_frames: int,
        image_size: tuple[int, int],
        device: str | torch.device | None = None,
    ) -> tuple[list[Tensor], list[Tensor], list[list[Tensor] | None]]:
        """Files or tensors → (frames, masks, reference images) as `generate` takes them, one entry a job.

        A missing video is grey frames of `image_size` (height, width), a missing mask is all ones. Reference
        images are scaled to fit and put on white. Raises ValueError; reading files needs ffmpeg.
        """
        from .utils.vace_processor import VaceVideoProcessor

        step = [s * p for s, p in zip(self.vae_stride, self.patch_size, strict=True)]
        area = image_size[0] * image_size[1]
        processor = VaceVideoProcessor(
            downsample=tuple(step),
            min_area=area,
            max_area=area,
            min_fps=self.config.sample_fps,
            max_fps=self.config.sample_fps,
            zero_start=True,
            seq_len=(1 + (num_frames - 1) // step[0]) * (area // (step[1] * step[2])),
            keep_last=True,
        )
        frames, masks, references = [], [], []
        for video, mask, images in zip(src_video, src_mask, src_ref_images, strict=True):
            if video is None:
                video = torch.zeros(3, num_frames, *image_size)
            if isinstance(video, str | os.PathLike):
                video, mask = processor.load_video_pair(video, mask)
            if mask is None:
                mask = torch.ones(1, *video.shape[1:])
            frames.append(video.to(device or self.device))
            masks.append(mask[:1].to(device or self.device))
            size = tuple(video.shape[2:])
            refs = [
                on_white(image_to_tensor(image), size).to(device or self.device) for image in images or ()
            ]
            references.append(refs or None)
        return frames, masks, references


def check_mask(mask: Tensor, frames: Tensor) -> None:
    """Raise ValueError unless the mask is one channel of the frames' size."""
    if mask.shape[0] != 1 or mask.shape[1:] != frames.shape[1:]:
        wanted = [1, *frames.shape[1:]]
        msg = f"a mask must be {wanted} like its video, got {list(mask.shape)}"
        raise ValueError(msg)


def mask_latents(mask: Tensor, stride: Sequence[int], references: int) -> Tensor:
    """Mask [1,T,H,W] → [64,R+t,h,w]: each 8x8 patch becomes 64 channels, frames are picked; zeros for R
    references.
    """
    frames, height, width = mask.shape[1:]
    h, w = height // stride[1], width // stride[2]
    patches = mask[0].view(frames, h, stride[1], w, stride[2]).permute(2, 4, 0, 1, 3)
    patches = patches.reshape(stride[1] * stride[2], frames, h, w)
    latent = F.interpolate(patches[None], size=(1 + (frames - 1) // stride[0], h, w), mode="nearest-exact")[0]
    return torch.cat([latent.new_zeros(latent.shape[0], references, h, w), latent], dim=1)


def on_white(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Image [3,H,W] → [3,1,height,width]: scaled to fit into `size`, centred on white."""
    scale = min(size[0] / image.shape[1], size[1] / image.shape[2])
    height, width = (min(round(n * scale), limit) for n, limit in zip(image.shape[1:], size, strict=True))
    small = F.interpolate(image[None], size=(height, width), mode="bilinear", align_corners=False)[0]
    canvas = image.new_full((3, *size), REFERENCE_GREY)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    canvas[:, top : top + height, left : left + width] = small
    return canvas[:, None]
