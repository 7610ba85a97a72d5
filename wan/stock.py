"""What the four stock Wan2.1 pipelines share: loading the parts, keeping them where there is room, sampling.

A pipeline is prepare → encode → denoise → decode; only the first two differ between the tasks.
Sources: Wan technical report, arXiv 2503.20314; specification §1.4 (parameters and defaults), §4 (networks).
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configs import WanConfig
from .modules.clip import CLIPModel
from .modules.layers import TimeEmbedding
from .modules.model import WanModel
from .modules.runtime import Parallel
from .modules.t5 import T5EncoderModel
from .modules.vae import WanVAE, check_video
from .progress import Reporter
from .utils.fm_solvers import FlowDPMSolverMultistepScheduler, get_sampling_sigmas, retrieve_timesteps
from .utils.fm_solvers_unipc import FlowUniPCMultistepScheduler

__all__ = ["Parts", "Sampling", "StockPipeline", "denoise", "fit_area", "image_to_tensor"]

Branch = Callable[[Tensor, TimeEmbedding], Tensor]
"""A guidance branch: latents [C,T,h,w] and the embedded timestep → velocity [16,T,h,w] fp32."""

SOLVERS = ("unipc", "dpm++")
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample. `solver` is 'unipc' or 'dpm++'; guidance: v = null + guide_scale·(text − null)."""

    solver: str = "unipc"
    steps: int = 50
    shift: float = 5.0
    guide_scale: float = 5.0

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            msg = f"sample_solver is {self.solver!r}; choose one of {', '.join(SOLVERS)}"
            raise ValueError(msg)
        if self.steps < 1:
            msg = f"sampling_steps is {self.steps}; at least 1 is needed"
            raise ValueError(msg)

    def scheduler(self, train_timesteps: int, device: torch.device) -> tuple[Any, Tensor]:
        """The solver, ready for its first step, and the timesteps."""
        if self.solver == "unipc":
            scheduler: Any = FlowUniPCMultistepScheduler(num_train_timesteps=train_timesteps, shift=1)
            scheduler.set_timesteps(self.steps, device=device, shift=self.shift)
            return scheduler, scheduler.timesteps
        scheduler = FlowDPMSolverMultistepScheduler(num_train_timesteps=train_timesteps, shift=1)
        sigmas = get_sampling_sigmas(self.steps, self.shift)
        return scheduler, retrieve_timesteps(scheduler, device=device, sigmas=sigmas)[0]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The networks of a pipeline. `clip` is None where no image goes in."""

    text_encoder: T5EncoderModel
    vae: WanVAE
    model: WanModel
    clip: CLIPModel | None = None


def denoise(
    noise: Tensor,
    velocity: Callable[[Tensor, Tensor], Tensor],
    sampling: Sampling,
    *,
    train_timesteps: int = 1000,
    reporter: Reporter | None = None,
) -> Tensor:
    """Noise [16,T,h,w] fp32 → latents, following `velocity(latents, t [1])` down the noise levels."""
    scheduler, timesteps = sampling.scheduler(train_timesteps, noise.device)
    latents = noise
    reporter = reporter or Reporter(total=len(timesteps))
    for t in timesteps:
        reporter.stage("denoise")  # a cancellation is noticed before the step
        v = velocity(latents, t[None])
        latents = scheduler.step(v[None], t, latents[None], return_dict=False)[0][0]
        reporter.stage("denoise", 1)
    return latents


class StockPipeline:
    """Base of `WanT2V`, `WanI2V`, `WanFLF2V` and `WanVace`.

    Reads T5, VAE, (CLIP) and DiT from `checkpoint_dir` under the names in `config`. `device_id` is the GPU
    (the CPU is used where there is none), `rank` this process; only rank 0 decodes and returns the video.
    `t5_fsdp` and `dit_fsdp` shard over all ranks, `use_usp` spreads guidance branches and tokens over them;
    `t5_cpu` leaves T5 on the CPU; `init_on_cpu` leaves the DiT there until it is needed. Raises
    `wan.loading.CheckpointError`.
    """

    model_class: type[WanModel] = WanModel
    with_clip = False

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
        init_on_cpu: bool = True,
    ) -> None:
        device = torch.device("cuda", device_id) if torch.cuda.is_available() else torch.device("cpu")
        folder = Path(checkpoint_dir)
        shard = partial(_shard, device_id=device_id if device.type == "cuda" else device)
        clip = None
        if self.with_clip:
            clip = CLIPModel(
                config.clip_dtype, device, folder / config.clip_checkpoint, folder / config.clip_tokenizer
            )
        model_device = "cpu" if dit_fsdp or init_on_cpu else device
        model = self.model_class.from_pretrained(folder, dtype=config.param_dtype, device=model_device)
        parts = Parts(
            text_encoder=T5EncoderModel(
                config.text_len,
                config.t5_dtype,
                "cpu",
                folder / config.t5_checkpoint,
                folder / config.t5_tokenizer,
                shard_fn=shard if t5_fsdp else None,
            ),
            vae=WanVAE(vae_pth=folder / config.vae_checkpoint, device=device),
            model=shard(model) if dit_fsdp else model,
            clip=clip,
        )
        self._set_up(config, parts, device, rank, t5_fsdp, dit_fsdp, use_usp, t5_cpu)

    @classmethod
    def from_parts(
        cls,
        config: WanConfig,
        parts: Parts,
        *,
        device: str | torch.device = "cpu",
        rank: int = 0,
        use_usp: bool = False,
        t5_cpu: bool = False,
    ) -> StockPipeline:
        """A pipeline of networks that are there already."""
        pipeline = cls.__new__(cls)
        pipeline._set_up(config, parts, torch.device(device), rank, False, False, use_usp, t5_cpu)
        return pipeline

    def _set_up(
        self,
        config: WanConfig,
        parts: Parts,
        device: torch.device,
        rank: int,
        t5_fsdp: bool,
        dit_fsdp: bool,
        use_usp: bool,
        t5_cpu: bool,
    ) -> None:
        self.config, self.device, self.rank, self.t5_cpu = config, device, rank, t5_cpu
        self.text_encoder, self.vae, self.clip, self.model = (
            parts.text_encoder,
            parts.vae,
            parts.clip,
            parts.model,
        )
        self.num_train_timesteps, self.param_dtype = config.num_train_timesteps, config.param_dtype
        self.vae_stride, self.patch_size = config.vae_stride, config.patch_size
        self._sharded = {
            id(m) for m, s in ((parts.text_encoder.model, t5_fsdp), (parts.model, dit_fsdp)) if s
        }
        self._branches: Any = None
        if use_usp:
            from .distributed import BranchParallel

            self._branches = BranchParallel(parts.model.num_heads)

    # --- steps of a generation ----------------------------------------------------------------------------

    def noise(self, seed: int, frames: int, height: int, width: int) -> Tensor:
        """[16,T,h,w] fp32 from the seed (below 0: a random one); sizes in latents. Global generators stay as
        they are.
        """
        generator = torch.Generator(device=self.device).manual_seed(self.same_seed(seed))
        shape = (self.vae.model.z_dim, frames, height, width)
        return torch.randn(shape, device=self.device, generator=generator)

    def same_seed(self, seed: int) -> int:
        """The seed, or a random one that all ranks share."""
        if seed >= 0:
            return seed
        drawn = [secrets.randbelow(MAX_SEED)]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(drawn)
        return drawn[0]

    def encode_texts(self, texts: Sequence[str], *, offload: bool) -> list[Tensor]:
        """Texts → T5 states [n,4096] on the pipeline's device."""
        place = torch.device("cpu") if self.t5_cpu else self.device
        with self.resident(self.text_encoder.model, place, offload=offload):
            return [states.to(self.device) for states in self.text_encoder(texts, place)]

    def encode_image(self, frames: Sequence[Tensor], *, offload: bool) -> Tensor:
        """Frames [3,H,W] in [−1,1] → CLIP tokens [frames,257,1280]."""
        if self.clip is None:
            msg = f"{type(self).__name__} has no CLIP"
            raise RuntimeError(msg)
        with self.resident(self.clip.model, self.device, offload=offload):
            return self.clip.visual([frame[:, None].to(self.device) for frame in frames])

    def sample(
        self,
        noise: Tensor,
        branches: Sequence[Branch],
        sampling: Sampling,
        *,
        offload: bool,
        reporter: Reporter,
    ) -> Tensor:
        """Latents from noise, guided by the branches (text, null). The second isn't run at guide_scale 1."""
        scale = sampling.guide_scale
        used = branches[:1] if math.isclose(scale, 1.0) else branches

        def velocity(latents: Tensor, t: Tensor) -> Tensor:
            time = self.model.embed_time(t)
            out = self.run_branches([partial(branch, latents, time) for branch in used])
            return out[0] if len(out) == 1 else out[1] + scale * (out[0] - out[1])

        with self.resident(self.model, self.device, offload=offload):
            return denoise(
                noise, velocity, sampling, train_timesteps=self.num_train_timesteps, reporter=reporter
            )

    def run_branches(self, branches: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """The branches' results: one after the other, or over all ranks with `use_usp`."""
        if self._branches is None:
            return [branch() for branch in branches]

        def use(parallel: Parallel) -> None:
            self.model.use(parallel=parallel)

        return self._branches(use, branches)

    def decode(self, latents: Tensor) -> Tensor | None:
        """Latents [16,T,h,w] → video [3,1+4(T−1),8h,8w] in [−1,1], on rank 0; None on the others."""
        video = self.vae.decode([latents])[0] if self.rank == 0 else None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        return video

    @contextmanager
    def resident(self, module: nn.Module, device: torch.device, *, offload: bool) -> Iterator[None]:
        """`module` on `device` for a while, with `offload` on the CPU afterwards. Sharded modules stay."""
        if id(module) in self._sharded:
            yield
            return
        module.to(device)
        try:
            yield
        finally:
            if offload and device.type == "cuda":
                module.to("cpu")
                torch.cuda.empty_cache()

    def prompts(self, prompt: str, negative: str) -> list[str]:
        """[prompt, negative prompt]; an empty one selects the configuration's."""
        return [prompt, negative or self.config.sample_neg_prompt]


def _shard(model: nn.Module, device_id: int | torch.device, **options: Any) -> nn.Module:
    from .distributed import shard_model

    return shard_model(model, device_id=device_id, **options)


def latent_frames(frame_num: int, stride: int) -> int:
    """How many latents `frame_num` frames make. Raises ValueError unless it is 4n+1."""
    check_video(frame_num, 0, 0)
    return 1 + (frame_num - 1) // stride


def fit_area(
    height: int, width: int, max_area: int, vae_stride: Sequence[int], patch: Sequence[int]
) -> tuple[int, int]:
    """The latent size (h, w) of at most `max_area` pixels with the image's aspect ratio, in whole patches."""
    ratio = height / width
    h = round(math.sqrt(max_area * ratio) // vae_stride[1] // patch[1] * patch[1])
    w = round(math.sqrt(max_area / ratio) // vae_stride[2] // patch[2] * patch[2])
    if h < patch[1] or w < patch[2]:
        msg = f"max_area {max_area} leaves no room for an image of {width}x{height}"
        raise ValueError(msg)
    return h, w


def image_to_tensor(image: Any) -> Tensor:
    """A PIL image or a tensor [3,H,W] in [−1,1] → tensor [3,H,W] fp32 in [−1,1]."""
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != 3:
            msg = f"an image tensor must be [3, H, W], got {list(image.shape)}"
            raise ValueError(msg)
        return image.float()
    pixels = torch.from_numpy(np.array(image.convert("RGB")))  # [H, W, 3] uint8
    return pixels.permute(2, 0, 1).float().div_(255).sub_(0.5).div_(0.5)


def conditioned_latents(
    vae: WanVAE, frames: Sequence[Tensor], known: Sequence[int], frame_num: int, size: tuple[int, int]
) -> Tensor:
    """y [20,T,h,w]: a 4-channel mask of the known frames, and the VAE's latents of them among grey ones.

    `frames` are images [3,H,W], `known` their places among `frame_num` (ascending, 0 first), `size` the
    video's (height, width). The first frame's mask counts four times, as the first latent stands for one
    frame.
    """
    height, width = size
    video = frames[0].new_zeros(3, frame_num, height, width)
    for place, frame in zip(known, frames, strict=True):
        video[:, place] = F.interpolate(frame[None], size=size, mode="bicubic")[0]
    z = vae.encode([video.to(vae.device)])[0]  # [16, T, h, w]
    mask = z.new_zeros(frame_num)
    mask[list(known)] = 1
    mask = torch.cat([mask[:1].expand(3), mask]).view(-1, 4).T  # [4, T]
    mask = mask[:, :, None, None].expand(-1, -1, *z.shape[2:])
    return torch.cat([mask, z])
