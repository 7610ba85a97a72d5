"""The models, loaded once and kept warm, and a video from a request.

    generator = Generator.load(ModelDirs.under(Path("weights")))
    result = generator.run(Request(prompt=…, image=…, tracks=(…,), output=Path("video.mp4")))

Everything that can go wrong for a reason a caller can act on is a `Fault`; a run leaves nothing behind but
its video, and the next one does not notice how the last one ended.
"""

from __future__ import annotations

import secrets
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multitalk_runtime import provenance
from multitalk_runtime.audio import Speech, decode_audio, mix_tracks, write_wav
from multitalk_runtime.clock import Clock, Progress
from multitalk_runtime.errors import ForbiddenFault, ImageFault, JobFault, PersonsFault
from multitalk_runtime.faults import as_faults
from multitalk_runtime.memory import peak_bytes, reset_peak
from multitalk_runtime.preflight import usable_device
from multitalk_runtime.video import FPS, VideoWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from multitalk_runtime.model_dirs import ModelDirs
    from multitalk_runtime.request import Request
    from multitalk_runtime.settings import Lora
    from wan.modules.wav2vec2 import Wav2Vec2Model
    from wan.multitalk import MultiTalkPipeline
    from wan.quality import Setting

__all__ = ["Generator", "Progress", "Result"]

MAX_RANDOM_SEED = 100_000_000


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run made. `phases` are seconds by stage, `first_frame_s` those until the first frames came.

    `sha256` is that of the raw frames (uint8 [F, H, W, 3]): equal for equal videos, whatever the codec does.
    `quality` as asked for, `switches` all that it stands for, `overrides` those which were set otherwise.
    `attention` is the switch, `attention_kernel` what it meant here, from `attention_module`.
    """

    video: Path
    frames: int
    height: int
    width: int
    seed: int
    steps: int
    clips: int
    seconds: float
    first_frame_s: float
    phases: Mapping[str, float]
    peak_bytes: int
    device: str
    attention: str
    sha256: str
    quality: str = "exact"
    attention_kernel: str = ""
    attention_module: str = ""
    switches: Mapping[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    versions: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    fps: int = FPS

    @property
    def duration_s(self) -> float:
        return self.frames / self.fps

    def to_json(self) -> dict[str, Any]:
        """For replies and logs; without the path, which is the worker's own business."""
        values = {k: v for k, v in vars(self).items() if k != "video"}
        rounded = {k: round(v, 3) for k, v in self.phases.items()}
        return {
            **values,
            "phases": rounded,
            "notes": list(self.notes),
            "overrides": list(self.overrides),
            "seconds": round(self.seconds, 3),
            "first_frame_s": round(self.first_frame_s, 3),
            "duration_s": self.duration_s,
        }


@dataclass(kw_only=True)
class Generator:
    """The pipeline and the speech model on one device. One run at a time; a second one waits.

    `given`: the switches of `wan.quality` that were set by name; they hold for every run.
    """

    pipeline: MultiTalkPipeline
    speech_model: Wav2Vec2Model
    device: torch.device
    given: Mapping[str, Any] = field(default_factory=dict)
    loras: int = 0
    load_s: float = 0.0
    offload: bool = True
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def load(
        cls,
        models: ModelDirs,
        *,
        device: str | torch.device | None = None,
        rank: int = 0,
        quality: str = "exact",
        attention: str | None = None,
        linears: str | None = None,
        vae_decode: str | None = None,
        absorb_audio: str | None = None,
        kernels: str | None = None,
        loras: Sequence[Lora] = (),
        quant: str | None = None,
        quant_dir: Path | None = None,
        t5_cpu: bool = False,
        t5_fsdp: bool = False,
        dit_fsdp: bool = False,
        use_usp: bool = False,
        cfg_parallel: bool = False,
        num_persistent_param_in_dit: int | None = None,
        offload_model: bool = True,
        task: str = "multitalk-14B",
    ) -> Generator:
        """Read all weights. `kernels` None means "fused" on a GPU and "eager" elsewhere; `attention`,
        `linears`, `vae_decode`, `absorb_audio` None mean what `quality` stands for.

        Raises ModelFault (files, memory), CudaFault, or JobFault for options that exclude each other or that
        this machine can't do.
        """
        import torch

        from wan import quality as tiers
        from wan.configs import WAN_CONFIGS
        from wan.loading import load_wav2vec2
        from wan.multitalk import MultiTalkPipeline

        begin = time.monotonic()
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        device = usable_device(device)
        given = {"attention": attention, "linears": linears, "vae_decode": vae_decode,
                 "absorb_audio": absorb_audio, "weights": quant, "lora": True if loras else None}  # fmt: skip
        with as_faults():
            resident = num_persistent_param_in_dit is None
            here = tiers.Machine.here(device, loras=len(loras), resident=resident)
            setting = tiers.settle(tiers.expand(quality, **given), here)
            pipeline = MultiTalkPipeline(
                WAN_CONFIGS[task],
                models.wan,
                audio_dir=models.audio,
                device=device,
                rank=rank,
                attention=setting.switches.attention,
                linears=setting.switches.linears,
                kernels=kernels or ("fused" if device.type == "cuda" else "eager"),
                quant=quant,
                quant_dir=quant_dir,
                lora_dir=[str(lora.file) for lora in loras],
                lora_scales=[lora.scale for lora in loras],
                t5_cpu=t5_cpu,
                t5_fsdp=t5_fsdp,
                dit_fsdp=dit_fsdp,
                use_usp=use_usp,
                cfg_parallel=cfg_parallel,
            )
            if num_persistent_param_in_dit is not None:
                pipeline.enable_vram_management(num_persistent_param_in_dit)
            speech_model = load_wav2vec2(models.wav2vec, device)
        return cls(
            pipeline=pipeline,
            speech_model=speech_model,
            device=device,
            given=given,
            loras=len(loras),
            offload=offload_model,
            load_s=time.monotonic() - begin,
        )

    def setting(self, request: Request) -> Setting:
        """The switches that `request` runs with here. Raises JobFault for what this machine or these models
        can't do, ForbiddenFault for linears that were loaded in another precision.
        """
        from wan.quality import TIERS, Machine, expand, settle

        loaded = self.pipeline.linears
        given = dict(self.given)
        if given.get("linears") is None and TIERS[request.quality].lora:
            given["linears"] = loaded  # few steps go with either
        if given.get("weights") is None and self.pipeline.weights != "bf16":
            given["weights"] = self.pipeline.weights  # a pipeline that was not loaded here
        with as_faults():
            setting = request.setting(**given)
            wanted = setting.switches.linears
            if wanted != loaded:
                works = [name for name in TIERS if expand(name, **self.given).switches.linears == loaded]
                msg = (
                    f"quality {request.quality!r} needs {wanted} linears; the model was loaded with {loaded}"
                )
                raise ForbiddenFault(
                    "forbidden.option", msg, field="quality", hint=f"what works here: {', '.join(works)}"
                )
            resident = self.pipeline.offloader is None
            here = Machine.here(self.device, loras=self.loras, resident=resident)
            return settle(setting, here, frames=request.frame_num, speakers=len(request.tracks))

    def embed(self, samples: np.ndarray) -> Tensor:
        """A track [n] at 16 kHz → what the model hears: [frames, 12, 768] fp32, 25 frames a second."""
        import torch

        from wan.audio import speech_embedding

        with torch.inference_mode():
            return speech_embedding(self.speech_model, samples, self.device)

    def run(
        self,
        request: Request,
        *,
        progress: Callable[[Progress], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Result:
        """Make the video at `request.output`. `progress` is told of every stage and step, from this thread;
        `cancelled` is asked between steps.

        Raises PersonsFault, AudioFault, ImageFault, JobFault for the request; CancelledFault, CudaFault,
        OutputFault. A failed run leaves no file.
        """
        with self._lock, as_faults():
            return self._run(request, progress, cancelled)

    def _run(
        self,
        request: Request,
        progress: Callable[[Progress], None] | None,
        cancelled: Callable[[], bool] | None,
    ) -> Result:
        reset_peak(self.device)
        clock = Clock(callback=progress, peak=lambda: peak_bytes(self.device))
        setting = self.setting(request)
        clock.stage("image")
        image = read_image(request.image)
        check_masks(request, image, self.pipeline.buckets)
        clock.stage("audio")
        speech = read_tracks(request)
        embeddings = request.speech or tuple(self.embed(track) for track in speech.tracks)
        plan, notes = plan_video(request, len(embeddings[0]))
        seed = drawn_seed(self.device) if request.seed < 0 else request.seed
        first_frame: list[float] = []
        with tempfile.TemporaryDirectory(prefix="mt-run-") as folder:
            sound = Path(folder) / "sound.wav"
            write_wav(sound, padded(speech.mixed, plan.frames))
            model = self.pipeline.model
            heads = model.dim // model.num_heads
            kernel = provenance.attention(setting.switches.attention, heads, self.device)
            facts = provenance.metadata(request, seed, setting, kernel)
            writer = VideoWriter(request.output, audio=sound, metadata=facts)

            def on_frames(frames: Tensor) -> None:
                if not first_frame:
                    first_frame.append(clock.elapsed)
                writer.write(frames)

            with writer:
                self.pipeline.generate(
                    {
                        "prompt": request.prompt,
                        "cond_image": image,
                        "cond_audio": {f"person{i}": e for i, e in enumerate(embeddings, 1)},
                        "bbox": request.bbox,
                    },
                    size_buckget=request.size,
                    motion_frame=request.overlap,
                    frame_num=request.frame_num,
                    shift=request.shift,
                    sampling_steps=request.steps,
                    text_guide_scale=request.text_guide_scale,
                    audio_guide_scale=request.audio_guide_scale,
                    seed=seed,
                    offload_model=self.offload,
                    max_frames_num=request.frames_at_most,
                    progress=False,
                    color_correction_strength=request.color_correction_strength,
                    extra_args=request,
                    on_progress=clock.report,
                    cancelled=cancelled,
                    on_frames=on_frames,
                    keep_frames=False,
                    switches=setting.switches,
                )
                clock.stage("video")
            phases = clock.end()
        height, width = writer.size or (0, 0)
        return Result(
            video=request.output,
            frames=writer.frames,
            height=height,
            width=width,
            seed=seed,
            steps=request.steps,
            clips=len(plan.clips),
            seconds=clock.elapsed,
            first_frame_s=first_frame[0] if first_frame else 0.0,
            phases=phases,
            peak_bytes=peak_bytes(self.device),
            device=str(self.device),
            attention=setting.switches.attention,
            sha256=writer.sha256,
            attention_kernel=kernel["kernel"],
            attention_module=kernel["module"],
            quality=setting.quality,
            switches=asdict(setting.switches),
            overrides=setting.overrides,
            versions=provenance.versions(),
            notes=notes,
        )


def drawn_seed(device: torch.device) -> int:
    """A random seed below 10⁸; all processes of a group get the first one's."""
    import torch
    import torch.distributed as dist

    seed = torch.tensor(secrets.randbelow(MAX_RANDOM_SEED))
    if dist.is_available() and dist.is_initialized():
        seed = seed.to(device)
        dist.broadcast(seed, 0)
    return int(seed)


def read_image(path: Path) -> Image:
    """The image as RGB, upright as its EXIF data says. Raises ImageFault."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (UnidentifiedImageError, FileNotFoundError) as error:
        raise ImageFault("image.not_image", "this is not an image file", field="image") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageFault("image.broken", "the image can't be decoded", field="image") from error


def check_masks(request: Request, image: Image, buckets: Mapping[str, Any]) -> None:
    """Boxes inside the image, disjoint, and something of each left after the crop. Raises PersonsFault."""
    from wan.preprocess import choose_bucket, speaker_masks, to_latent_masks

    people = len(request.tracks)
    if people == 1 and not request.bbox:
        return
    try:
        masks = speaker_masks(image.height, image.width, people, request.bbox)
    except ValueError as error:
        raise PersonsFault("persons.bbox", str(error), field="bbox") from error
    if (masks[0] * masks[1]).any():
        raise PersonsFault("persons.overlap", "the boxes of person1 and person2 overlap", field="bbox")
    size = choose_bucket(image.height, image.width, buckets[request.size])
    try:
        to_latent_masks(masks, size, (size[0] // 8, size[1] // 8))
    except ValueError as error:
        raise PersonsFault("persons.empty_mask", str(error), field="bbox") from error


def read_tracks(request: Request) -> Speech:
    """The tracks decoded and mixed. Raises AudioFault, PersonsFault, TooLargeFault."""
    tracks: list[np.ndarray | None] = []
    for number, track in enumerate(request.tracks, 1):
        name = f"audio.person{number}"
        if isinstance(track, Path):
            tracks.append(decode_audio(track, field=name, max_seconds=request.max_audio_s))
        else:
            tracks.append(track)
    return mix_tracks(tracks, request.audio_type, normalise=request.normalise)


def plan_video(request: Request, speech_frames: int) -> tuple[Any, tuple[str, ...]]:
    """The clips, and what the caller should know about the length. Raises JobFault."""
    from wan.clips import plan_clips

    try:
        plan = plan_clips(speech_frames, request.frame_num, request.overlap, request.frames_at_most)
    except ValueError as error:
        raise JobFault("job.frame_num", str(error), field="frame_num") from error
    if plan.frames >= speech_frames:
        return plan, ()
    hint = "use mode streaming" if request.mode == "clip" else "cut the audio into several jobs"
    note = f"the speech has {speech_frames / FPS:.2f} s, the video {plan.frames / FPS:.2f} s; {hint}"
    return plan, (note,)


def padded(samples: np.ndarray, frames: int) -> np.ndarray:
    """The sound, exactly as long as the video."""
    import numpy as np

    wanted = frames * 16_000 // FPS
    return np.pad(samples[:wanted], (0, max(0, wanted - len(samples))))
