"""MultiTalk: an image, speech of one or two people and a prompt → a video of them talking.

    pipeline = MultiTalkPipeline(WAN_CONFIGS["multitalk-14B"], "weights/Wan2.1-I2V-14B-480P")
    video = pipeline.generate({"prompt": …, "cond_image": "a.png", "cond_audio": {"person1": embedding}})

MultiTalk, arXiv 2505.22647; Wan2.1, arXiv 2503.20314; specification §3.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from .attention_backends import AttentionBackend
from .clips import Clip
from .configs import WanConfig
from .frames import new_frames, on_host
from .guidance import ApgOptions, Guidance
from .loading import network_sizes
from .parts import Parts, load_parts
from .pipeline_steps import (
    DEFAULT,
    OFFICIAL,
    Branches,
    Options,
    Parity,
    Prepared,
    decode,
    denoise,
    embed_conditions,
    encode,
    one_after_the_other,
    prepare,
    timestep_transform,
)
from .preprocess import BUCKETS, Buckets, resize_and_centercrop
from .progress import Cancelled, ProgressCallback, Reporter, TqdmBar, agreed
from .quality import Machine, Switches, resolve

__all__ = [
    "OFFICIAL",
    "Cancelled",
    "MultiTalkPipeline",
    "Parity",
    "resize_and_centercrop",
    "timestep_transform",
]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What stays the same over the clips of one video."""

    prepared: Prepared
    options: Options
    texts: list[Tensor]
    generator: torch.Generator
    report: Reporter
    offload: bool


_DECODE = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of a 720p clip: tokens, hidden layer, kept keys and values, and the VAE's widest layer.
ACTIVATION_BYTES = 20 * 2**30


class MultiTalkPipeline:
    """The loaded models and how to run them. `generate` may be called any number of times; calls share no
    state.

    checkpoint_dir holds the Wan2.1 image-to-video folder and, in it or in `audio_dir`,
    `multitalk.safetensors`; it is only read. `device_id` is this process's GPU (the CPU is used where there
    is none); `device` overrides it (for example "cpu"). `use_usp` spreads each pass over all processes,
    `cfg_parallel` the guidance passes first. `kernels` is "eager" or "fused". `attention` names a backend of
    `wan.attention_backends`, `linears` is "bf16" or "fp8" (lossy). `init_on_cpu` is accepted and means
    nothing: weights go straight where they are used.
    """

    def __init__(
        self,
        config: WanConfig,
        checkpoint_dir: str | Path,
        quant_dir: str | Path | None = None,
        device_id: int = 0,
        rank: int = 0,
        t5_fsdp: bool = False,
        dit_fsdp: bool = False,
        use_usp: bool = False,
        t5_cpu: bool = False,
        init_on_cpu: bool = True,
        num_timesteps: int = 1000,
        use_timestep_transform: bool = True,
        lora_dir: list[str] | None = None,
        lora_scales: list[float] | None = None,
        quant: str | None = None,
        *,
        audio_dir: str | Path | None = None,
        device: str | torch.device | None = None,
        attention: str = "auto",
        kernels: str = "eager",
        linears: str = "bf16",
        cfg_parallel: bool = False,
    ) -> None:
        if device is None:
            device = f"cuda:{device_id}" if torch.cuda.is_available() else "cpu"
        device = torch.device(device)
        parts = load_parts(
            config,
            checkpoint_dir,
            device=device,
            audio_dir=audio_dir,
            quant=quant,
            quant_dir=quant_dir,
            lora_files=lora_dir or [],
            lora_scales=lora_scales,
            t5_cpu=t5_cpu,
            t5_fsdp=t5_fsdp,
            dit_fsdp=dit_fsdp,
            attention=attention,
            kernels=kernels,
            linears=linears,
        )
        self.linears = linears
        buckets = BUCKETS | network_sizes(checkpoint_dir, "buckets")
        self._setup(config, parts, device, rank, num_timesteps, use_timestep_transform, buckets)
        if use_usp or cfg_parallel:
            self.spread_over_processes(cfg_parallel=cfg_parallel)

    @classmethod
    def from_parts(
        cls,
        config: WanConfig,
        parts: Parts,
        device: str | torch.device = "cpu",
        *,
        rank: int = 0,
        buckets: Mapping[str, Buckets] = BUCKETS,
    ) -> MultiTalkPipeline:
        """A pipeline of models that are loaded already."""
        pipeline = cls.__new__(cls)
        pipeline._setup(config, parts, torch.device(device), rank, config.num_train_timesteps, True, buckets)
        return pipeline

    linears = "bf16"

    def _setup(
        self,
        config: WanConfig,
        parts: Parts,
        device: torch.device,
        rank: int,
        num_timesteps: int,
        timestep_transform: bool,
        buckets: Mapping[str, Buckets],
    ) -> None:
        self.config = config
        self.parts = parts
        self.device = device
        self.rank = rank
        self.num_timesteps = num_timesteps
        self.use_timestep_transform = timestep_transform
        self.buckets = buckets
        self.branches: Branches = one_after_the_other
        self.offloader: Any = None
        self.last_seed: int | None = None

    @property
    def model(self) -> nn.Module:
        return self.parts.model

    @property
    def weights(self) -> str:
        """Of the DiT: "bf16", or the kind that its linears are quantised to (`wan.quality`)."""
        quant = sys.modules.get(f"{__package__}.quant")  # not there: nothing was quantised
        if quant is None:
            return "bf16"
        found = (m for m in self.model.modules() if isinstance(m, quant.QuantLinear) and m.matmul != "fp8")
        return next((module.kind for module in found), "bf16")

    def enable_vram_management(self, num_persistent_param_in_dit: int | None = None) -> None:
        """Keep about this many DiT parameters on the GPU, the other blocks in RAM, fetched ahead of their
        use.

        None and 0 keep none. Keys and values are then computed in every step instead of being kept.
        """
        from .offload import offload

        self.offloader = offload(
            self.model, self.device, persistent_parameters=num_persistent_param_in_dit or 0
        )

    def spread_over_processes(self, *, cfg_parallel: bool = True) -> None:
        """Use all processes of the default group: sequence parallel, or guidance passes first and then
        sequence.
        """
        from .distributed import BranchParallel, UlyssesParallel

        if not cfg_parallel:
            self.model.use(parallel=UlyssesParallel())
            return
        spread = BranchParallel(self.model.num_heads)
        self.branches = lambda passes: spread(lambda p: self.model.use(parallel=p), passes)

    def generate(
        self,
        input_data: Mapping[str, Any],
        size_buckget: str = "multitalk-480",
        motion_frame: int = 25,
        frame_num: int = 81,
        shift: float = 5.0,
        sampling_steps: int = 40,
        text_guide_scale: float = 5.0,
        audio_guide_scale: float = 4.0,
        n_prompt: str = "",
        seed: int = -1,
        offload_model: bool = True,
        max_frames_num: int = 1000,
        face_scale: float = 0.05,
        progress: bool = True,
        color_correction_strength: float = 0.0,
        extra_args: Any = None,
        *,
        parity: Parity = DEFAULT,
        on_progress: ProgressCallback | None = None,
        cancelled: Callable[[], bool] | None = None,
        on_frames: Callable[[Tensor], None] | None = None,
        keep_frames: bool = True,
        switches: Switches | None = None,
    ) -> Tensor | None:
        """→ video [3, F, H, W] fp32 in [−1, 1] on the CPU, F as many frames (25 a second) as there is speech;
        None on other ranks than 0, and without `keep_frames` (then `on_frames` alone gets them).

        input_data: prompt; cond_image, a path or PIL image; cond_audio {"person1": …[, "person2": …]},
        embeddings [N, 12, 768] of `wan.audio.speech_embedding` or paths of saved ones; bbox, optional with
        two people. `max_frames_num` up to `frame_num` makes one clip, more streams clips that share
        `motion_frame` frames. With `offload_model` networks wait in RAM while others run, if they do not all
        fit on the GPU. An empty `n_prompt` takes the configuration's. `extra_args` may have
        use_teacache, teacache_thresh, use_apg, apg_momentum, apg_norm_threshold. `on_progress(step, total,
        stage)` replaces the bar; `cancelled()` is asked between steps; `on_frames` gets new frames [3, f, H,
        W] as they are decoded, for an encoder to write. `switches` sets for this call what `wan.quality`
        decides and needs no other weights: attention, absorbed audio projections, the VAE's decoding.

        Raises ValueError or FileNotFoundError for wrong input, `progress.Cancelled` when asked to stop.
        """
        options = Options(
            size=size_buckget,
            frame_num=frame_num,
            motion_frame=motion_frame,
            max_frames=max_frames_num,
            steps=sampling_steps,
            shift=shift,
            text_scale=text_guide_scale,
            audio_scale=audio_guide_scale,
            color_strength=color_correction_strength,
            face_scale=face_scale,
            keep_kv=self.offloader is None,
            vae_decode=_DECODE["fp32" if switches is None else switches.vae_decode],
            num_timesteps=self.num_timesteps,
            timestep_transform=self.use_timestep_transform,
            vae_stride=self.config.vae_stride,
            parity=parity,
            **_extra(extra_args),
        )
        bar = TqdmBar() if progress and on_progress is None and self.rank == 0 else None
        try:
            with torch.inference_mode():
                prepared = prepare(input_data, options, self.buckets)
            with self._switched(switches, frame_num, len(prepared.speech)), torch.inference_mode():
                total = options.steps * len(prepared.plan.clips)
                stop = agreed(cancelled, self.device)
                report = Reporter(total=total, callback=on_progress or bar, cancelled=stop)
                run = Run(
                    prepared=prepared,
                    options=options,
                    texts=self._encode_texts(prepared, options, n_prompt, report, offload_model),
                    generator=self._generator(seed, parity),
                    report=report,
                    offload=offload_model,
                )
                kept = []
                for frames in self._clips(run):
                    if keep_frames:
                        # a copy: page-locked memory is for what is under way, not for a whole video
                        kept.append(frames.clone() if frames.is_pinned() else frames)
                    if on_frames is not None and self.rank == 0:
                        on_frames(frames)
        finally:
            if bar is not None:
                bar.close()
        return torch.cat(kept, dim=1) if kept and self.rank == 0 else None

    @contextmanager
    def _switched(self, switches: Switches | None, frame_num: int, speakers: int) -> Iterator[None]:
        """The model set to the switches, then as it was; absorb_audio "auto" is what this machine allows.
        Raises ValueError for linears it has not.
        """
        if switches is None:
            yield
            return
        if switches.linears != self.linears:
            msg = f"linears {switches.linears!r} can't be had: the model was loaded with {self.linears!r}"
            raise ValueError(msg)
        machine = Machine.here(self.device, resident=self.offloader is None)
        absorb = resolve(switches, machine, frames=frame_num, speakers=speakers).absorb_audio
        before = self.model.runtime
        self.model.use(
            attention=AttentionBackend(name=switches.attention),
            absorb_audio=absorb == "all",
            absorb_silence=absorb == "silence",
        )
        try:
            yield
        finally:
            self.model.use(**vars(before))

    def _clips(self, run: Run) -> Iterator[Tensor]:
        """The new frames [3, f, H, W] of each clip, on the CPU, cut to the length of the video."""
        plan, room = run.prepared.plan, run.prepared.plan.frames
        image = run.prepared.image.to(self.device)
        known = image
        for clip in plan.clips:
            last, tail = clip is plan.clips[-1], list[Tensor]()
            pieces = self._clip(run, clip, known, image)
            for frames in on_host(new_frames(pieces, clip, room, tail, last=last)):
                room -= frames.shape[1]
                yield frames
            if last:
                return
            known = torch.cat(tail, dim=2)[:, :, -run.options.motion_frame :]

    def _clip(self, run: Run, clip: Clip, known: Tensor, image: Tensor) -> Iterator[Tensor]:
        """All frames of one clip, [1, 3, frame_num, H, W] in pieces: encode → denoise → decode."""
        parts, options, dtype = self.parts, run.options, self.config.param_dtype
        run.report.stage("encode")
        with self._on_device(parts.image_encoder, run.offload):
            encoded = encode(
                known,
                clip,
                run.prepared,
                options,
                vae=parts.vae,
                image_encoder=parts.image_encoder,
                dtype=dtype,
            )
        with self._on_device(parts, run.offload and self.offloader is None):
            masks = run.prepared.masks.to(self.device)
            conditions = embed_conditions(parts.model, encoded, run.texts, masks, options)
            latents = denoise(
                parts.model,
                encoded,
                conditions,
                options,
                generator=run.generator,
                report=run.report,
                branches=self.branches,
            )
        del conditions  # several GB of kept keys and values
        run.report.stage("decode")
        yield from decode(latents, image, options, vae=parts.vae)

    def _encode_texts(
        self, prepared: Prepared, options: Options, n_prompt: str, report: Reporter, offload: bool
    ) -> list[Tensor]:
        """T5 states of the prompt and, if text guidance needs it, the negative prompt, on our device."""
        report.stage("text")
        prompts = [prepared.prompt]
        if "uncond" in Guidance(text_scale=options.text_scale).passes:
            prompts.append(n_prompt or self.config.sample_neg_prompt)
        encoder, on_cpu = self.parts.text_encoder, self.parts.t5_cpu
        with self._on_device(encoder, offload and not on_cpu):
            states = encoder(prompts, torch.device("cpu") if on_cpu else self.device)
        return [s.to(self.device, self.config.param_dtype) for s in states]

    @contextmanager
    def _on_device(self, part: Any, offload: bool) -> Iterator[None]:
        """Hold a part's network on the device; with `offload`, only for this long."""
        module = getattr(part, "model", None)
        if not offload or not isinstance(module, nn.Module) or self._all_fits():
            yield
            return
        module.to(self.device)
        try:
            yield
        finally:
            module.to("cpu")

    def _all_fits(self) -> bool:
        """Whether all networks and a clip's activations fit on the device together: then nothing moves."""
        if self.device.type != "cuda":
            return True
        parts = (self.parts.model, *(getattr(p, "model", None) for p in self.parts.encoders))
        tensors = (t for part in parts if isinstance(part, nn.Module) for t in part.state_dict().values())
        total = torch.cuda.get_device_properties(self.device).total_memory
        return sum(t.nbytes for t in tensors) + ACTIVATION_BYTES < total

    def _generator(self, seed: int, parity: Parity) -> torch.Generator:
        if seed < 0:
            seed = random.randint(0, sys.maxsize)  # noqa: S311 - a seed, not a secret
            if dist.is_available() and dist.is_initialized():  # one for all ranks
                shared = torch.tensor([seed], device=self.device)
                dist.broadcast(shared, 0)
                seed = int(shared.item())
        self.last_seed = seed
        if parity.seed_globals:
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            torch.backends.cudnn.deterministic = True
        return torch.Generator(self.device).manual_seed(seed)


def _extra(args: Any) -> dict[str, Any]:
    """Guidance and caching options from the command line's namespace, or None."""
    options: dict[str, Any] = {}
    if getattr(args, "use_apg", False):
        options["apg"] = ApgOptions(
            momentum=getattr(args, "apg_momentum", -0.75),
            norm_threshold=getattr(args, "apg_norm_threshold", 55),
        )
    if getattr(args, "use_teacache", False):
        options["teacache"] = getattr(args, "teacache_thresh", 0.2)
    return options
