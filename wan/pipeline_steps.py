"""The four steps of a MultiTalk generation, as functions of typed values: prepare → encode → denoise →
decode.

`wan.multitalk` calls them in turn. Specification §3.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .audio import audio_windows, extend_reversed
from .clips import Clip, ClipPlan, plan_clips
from .color import match_and_blend_colors
from .guidance import ApgOptions, Guidance
from .modules.multitalk_model import StepShare
from .preprocess import BUCKETS, Buckets, choose_bucket, resize_and_centercrop, speaker_masks, to_latent_masks
from .progress import Reporter

if TYPE_CHECKING:
    from .modules.layers import TextCondition
    from .modules.multitalk_model import AudioCondition, WanModel
    from .modules.teacache import TeaCache

Branches = Callable[[Sequence[Callable[[], Tensor]]], list[Tensor]]
"""Runs the guidance passes of one step: one after the other, or spread over processes."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Where our behaviour differs from the original's on purpose, and how to get the original's.

    streaming_length: the original loses 3 frames of every long video, more near the cap, and refuses speech
    that is not longer than one clip; we give as many frames as there is speech. bbox_order: "rows_first"
    reads boxes as the original does, [row_min, column_min, row_max, column_max]; "xyxy" as everyone else
    does. seed_globals: also seed the process-wide generators of torch, numpy and random and set
    `cudnn.deterministic`, as the original does; without it a private generator gives the same noise and
    nothing else is touched.
    """

    streaming_length: bool = False
    bbox_order: str = "rows_first"
    seed_globals: bool = False


DEFAULT = Parity()
OFFICIAL = Parity(streaming_length=True, seed_globals=True)


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to generate; what, is in the input. `teacache` is a threshold, or None for exact results."""

    size: str = "multitalk-480"
    frame_num: int = 81
    motion_frame: int = 25
    max_frames: int = 1000
    steps: int = 40
    shift: float = 5.0
    text_scale: float = 5.0
    audio_scale: float = 4.0
    color_strength: float = 0.0
    face_scale: float = 0.05
    apg: ApgOptions | None = None
    teacache: float | None = None
    keep_kv: bool = True
    vae_decode: torch.dtype = torch.float32
    num_timesteps: int = 1000
    timestep_transform: bool = True
    vae_stride: tuple[int, int, int] = (4, 8, 8)
    parity: Parity = field(default_factory=Parity)

    def __post_init__(self) -> None:
        if self.steps < 1:
            msg = f"sampling_steps is {self.steps}; at least 1 is needed"
            raise ValueError(msg)
        if not 0 <= self.color_strength <= 1:
            msg = f"color_correction_strength is {self.color_strength}; it goes from 0 (off) to 1"
            raise ValueError(msg)
        if not 0 <= self.face_scale < 0.5:
            msg = f"face_scale is {self.face_scale}; it is the margin cut off each half, from 0 to below 0.5"
            raise ValueError(msg)
        if self.teacache is not None and self.teacache <= 0:
            msg = f"the TeaCache threshold is {self.teacache}; it must be positive"
            raise ValueError(msg)


# --- prepare ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The input, checked and in the model's shapes: image [1, 3, 1, H, W] fp32 in [−1, 1], speech [N, 12,
    768] for each person (extended for the last clip's windows), masks [3, h, w] of the latent.
    """

    prompt: str
    image: Tensor
    speech: tuple[Tensor, ...]
    masks: Tensor
    plan: ClipPlan


def prepare(
    input_data: Mapping[str, Any], options: Options, buckets: Mapping[str, Buckets] = BUCKETS
) -> Prepared:
    """Read image and speech, choose the size, plan the clips. Raises ValueError or FileNotFoundError, naming
    the key.
    """
    if options.size not in buckets:
        msg = f"size {options.size!r} is not one of {', '.join(buckets)}"
        raise ValueError(msg)
    source = _image(input_data)
    size = choose_bucket(source.height, source.width, buckets[options.size])
    image = (resize_and_centercrop(source, size) / 255 - 0.5) * 2
    speech = _speech(input_data)
    plan = plan_clips(
        len(speech[0]),
        options.frame_num,
        options.motion_frame,
        options.max_frames,
        official_length=options.parity.streaming_length,
    )
    masks = speaker_masks(
        source.height,
        source.width,
        len(speech),
        input_data.get("bbox"),
        order=options.parity.bbox_order,
        face_scale=options.face_scale,
    )
    latent = (size[0] // options.vae_stride[1], size[1] // options.vae_stride[2])
    return Prepared(
        prompt=_key(input_data, "prompt"),
        image=image,
        speech=tuple(extend_reversed(s, plan.extend) for s in speech),
        masks=to_latent_masks(masks, size, latent),
        plan=plan,
    )


def _key(input_data: Mapping[str, Any], name: str) -> Any:
    if name not in input_data:
        msg = f"the input has no {name!r}; it has {', '.join(sorted(input_data)) or 'nothing'}"
        raise ValueError(msg)
    return input_data[name]


def _image(input_data: Mapping[str, Any]) -> Any:
    from PIL import Image

    given = _key(input_data, "cond_image")
    if isinstance(given, str | os.PathLike):
        if not Path(given).is_file():
            msg = f"cond_image: no file {str(given)!r}"
            raise FileNotFoundError(msg)
        given = Image.open(given)
    return given.convert("RGB")


def _speech(input_data: Mapping[str, Any]) -> list[Tensor]:
    given = _key(input_data, "cond_audio")
    if set(given) not in ({"person1"}, {"person1", "person2"}):
        names = ", ".join(sorted(given)) or "nobody"
        msg = f"cond_audio names {names}; it takes person1, or person1 and person2"
        raise ValueError(msg)
    speech = [_embedding(f"cond_audio.{name}", given[name]) for name in sorted(given)]
    if len({len(s) for s in speech}) > 1:
        msg = (
            f"cond_audio: person1 has {len(speech[0])} frames of speech, person2 {len(speech[1])}; "
            "both need the same (wan.audio.mix pads them)"
        )
        raise ValueError(msg)
    return speech


def _embedding(name: str, value: Any) -> Tensor:
    if isinstance(value, str | os.PathLike):
        if not Path(value).is_file():
            msg = f"{name}: no file {str(value)!r}"
            raise FileNotFoundError(msg)
        value = torch.load(value, map_location="cpu", weights_only=True)
    if not isinstance(value, Tensor) or value.shape[1:] != (12, 768) or not len(value):
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        msg = f"{name}: expected a speech embedding [frames, 12, 768], got {shape}"
        raise ValueError(msg)
    if not torch.isfinite(value).all():
        msg = f"{name}: the speech embedding has values that are not finite"
        raise ValueError(msg)
    return value.float()


# --- encode -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EncodedClip:
    """What a clip is conditioned on: y [1, 20, T, h, w] (mask and latents of the known frames), the latents
    of those alone [16, M, h, w] (None in the first clip), CLIP features [1, 257, 1280], windows [P, frames,
    5, 12, 768].
    """

    y: Tensor
    motion: Tensor | None
    image_features: Tensor
    windows: Tensor


def encode(
    known: Tensor,
    clip: Clip,
    prepared: Prepared,
    options: Options,
    *,
    vae: Any,
    image_encoder: Any,
    dtype: torch.dtype,
) -> EncodedClip:
    """Known frames [1, 3, m, H, W] (the image, or the last frames so far) → the clip's conditions, in
    `dtype`.
    """
    frames = options.frame_num
    features = image_encoder.visual(list(known[:, :, -1:])).to(dtype)
    grey = known.new_zeros(1, 3, frames - known.shape[2], *known.shape[3:])
    latents = torch.stack(vae.encode(list(torch.cat((known, grey), dim=2)))).to(dtype)  # [1, 16, T, h, w]
    mask = known_mask(known.shape[2], frames, latents.shape[-2:]).to(latents)
    motion = latents[0, :, : 1 + (clip.motion - 1) // 4] if clip.motion else None
    windows = audio_windows(list(prepared.speech), clip.start, frames).to(known.device, dtype)
    return EncodedClip(
        y=torch.cat((mask, latents), dim=1), motion=motion, image_features=features, windows=windows
    )


def known_mask(known: int, frames: int, latent: Sequence[int]) -> Tensor:
    """[1, 4, T, h, w]: 1 for known frames. The first frame counts four times, then four frames make one
    latent.
    """
    mask = torch.zeros(frames)
    mask[:known] = 1
    mask = torch.cat((mask[:1].repeat(3), mask)).view(-1, 4).T  # [4, T]
    return mask[None, :, :, None, None].expand(-1, -1, -1, *latent)


# --- denoise ----------------------------------------------------------------------------------------------


def timestep_transform(t: Tensor, shift: float = 5.0, num_timesteps: int = 1000) -> Tensor:
    """Spend more steps at high noise: u = t / num → num·s·u / (1 + (s − 1)·u)."""
    u = t / num_timesteps
    return shift * u / (1 + (shift - 1) * u) * num_timesteps


def sampling_timesteps(options: Options) -> Tensor:
    """The timesteps of one clip and the final 0: [steps + 1] fp32."""
    t = torch.cat((torch.linspace(options.num_timesteps, 1, options.steps), torch.zeros(1)))
    return timestep_transform(t, options.shift, options.num_timesteps) if options.timestep_transform else t


def euler_step(latents: Tensor, velocity: Tensor, t: Tensor | float, following: Tensor | float) -> Tensor:
    """Follow the velocity (which points to the noise) from timestep t to the next; timesteps run 1000…0."""
    return latents - velocity * ((t - following) / 1000)


def one_after_the_other(passes: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
    return [run() for run in passes]


@dataclass(kw_only=True)
class Conditions:
    """All that the passes of a clip read, embedded once: texts by prompt and negative prompt, speech and
    silence.
    """

    prompt: TextCondition
    negative: TextCondition | None
    speech: AudioCondition
    silence: AudioCondition

    def of(self, name: str) -> tuple[TextCondition, AudioCondition]:
        """The text and the speech that guidance pass `name` sees."""
        text = self.prompt if name in ("cond", "drop_audio") else self.negative
        return text, self.speech if name in ("cond", "drop_text") else self.silence


def embed_conditions(
    model: WanModel, encoded: EncodedClip, texts: Sequence[Tensor], masks: Tensor, options: Options
) -> Conditions:
    """texts: T5 states of the prompt and, unless text guidance is off, the negative prompt."""
    keep = options.keep_kv
    embedded = [model.embed_text([text], encoded.image_features, keep=keep) for text in texts]
    silence = torch.zeros_like(encoded.windows[-1:])  # one silent person, however many speak
    return Conditions(
        prompt=embedded[0],
        negative=embedded[1] if len(embedded) > 1 else None,
        speech=model.embed_audio(encoded.windows, masks, keep=keep),
        silence=model.embed_audio(silence, keep=keep),
    )


def denoise(
    model: WanModel,
    encoded: EncodedClip,
    conditions: Conditions,
    options: Options,
    *,
    generator: torch.Generator,
    report: Reporter,
    branches: Branches = one_after_the_other,
) -> Tensor:
    """Noise → latents [16, T, h, w] fp32. Random numbers are drawn in the original's order: the noise, then
    fresh noise for the known frames before the first and after every step.
    """
    device = encoded.y.device
    timesteps = sampling_timesteps(options).to(device)
    guidance = Guidance(text_scale=options.text_scale, audio_scale=options.audio_scale, apg=options.apg)
    times = model.embed_time(timesteps[:-1])
    teacache = _teacache(times, guidance, options)
    shape = (16, *encoded.y.shape[2:])
    latents = draw(shape, torch.float32, device, generator)
    latents = _with_known(latents, encoded.motion, timesteps[0], generator)
    for i in range(options.steps):
        report.stage("denoise")
        model_input = torch.cat((latents, encoded.y[0]))[None]
        time = times.at(i)
        predict = partial(model.predict, model_input, time, teacache=teacache, step=i, share=StepShare())
        passes = [
            partial(predict, *conditions.of(name), slot=slot) for slot, name in enumerate(guidance.passes)
        ]
        velocity = guidance([v[0] for v in branches(passes)])
        latents = euler_step(latents, velocity, timesteps[i], timesteps[i + 1])
        latents = _with_known(latents, encoded.motion, timesteps[i + 1], generator)
        report.stage("denoise", steps=1)
    return latents


def draw(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Tensor:
    """Every random number of a generation comes from here: standard normal noise."""
    return torch.randn(shape, dtype=dtype, device=device, generator=generator)


def _teacache(times: Any, guidance: Guidance, options: Options) -> TeaCache | None:
    if options.teacache is None:
        return None
    from .modules.teacache import TeaCache  # lossy: not imported for exact results

    return TeaCache.create(
        times.e,
        times.e0,
        threshold=options.teacache,
        model_scale=options.size,
        passes=len(guidance.passes),
    )


def _with_known(latents: Tensor, motion: Tensor | None, t: Tensor, generator: torch.Generator) -> Tensor:
    """The known latent frames replaced by themselves at noise level u = t/1000: (1 − u)·motion + u·noise."""
    if motion is None:
        return latents
    noise = draw(tuple(motion.shape), motion.dtype, motion.device, generator)
    u = t / 1000
    known = (1 - u) * motion.float() + u * noise.float()
    return torch.cat((known, latents[:, motion.shape[1] :]), dim=1)


# --- decode -----------------------------------------------------------------------------------------------


def decode(latents: Tensor, reference: Tensor, options: Options, *, vae: Any) -> Iterator[Tensor]:
    """Latents [16, T, h, w] → frames [1, 3, f, H, W] fp32 in [−1, 1], in the colours of `reference` [1, 3, 1,
    H, W], piece by piece as they get ready.
    """
    half = {} if options.vae_decode == torch.float32 else {"dtype": options.vae_decode}
    for piece in vae.decode_pieces(latents, **half):
        frames = piece[None]
        if options.color_strength > 0:
            frames = match_and_blend_colors(frames, reference, options.color_strength)
        yield frames
