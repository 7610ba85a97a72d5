"""`generate_multitalk`: the command line of the original, with its defects mended.

Flags and input are checked, and the image and the audio read, before any model is loaded; nothing but the
video is left behind.
"""

from __future__ import annotations

import json
import re
import signal
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multitalk_runtime.errors import CancelledFault, Fault, ModelFault, StorageFault
from multitalk_runtime.faults import as_faults
from multitalk_runtime.generate_cli import check_flags, parser
from multitalk_runtime.model_dirs import ModelDirs
from multitalk_runtime.preflight import check_run

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from multitalk_runtime.audio import Speech
    from multitalk_runtime.clock import Progress
    from multitalk_runtime.estimate import Estimate
    from multitalk_runtime.generator import Generator, Result
    from multitalk_runtime.request import Request
    from wan.quality import Machine, Setting

__all__ = ["main"]

BAD_INPUT = 2
LOG_S = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Exit code 0 done, 1 the run failed, 2 bad input, 130 interrupted."""
    flags = parser().parse_args(arguments)
    if threading.current_thread() is threading.main_thread():
        # Explicitly: what a shell starts in the background inherits "ignore"; SIGTERM ends containers.
        for sign in (signal.SIGINT, signal.SIGTERM):
            signal.signal(sign, signal.default_int_handler)
    try:
        return _main(flags)
    except Fault as fault:
        _tell(fault)
        return BAD_INPUT if fault.status < 500 and not isinstance(fault, CancelledFault) else 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; nothing was written\n")
        return 130


def _main(flags: argparse.Namespace) -> int:
    from wan.quality import resolve as resolve_switches

    check_flags(flags)
    dirs = model_dirs(flags)
    request, speech = resolve(flags)
    # Not ours to decode twice: from here on the tracks are samples, mixed and at their level.
    request = replace(request, tracks=speech.tracks, normalise=False, audio_type="para")
    with as_faults():
        setting = request.setting(**given_switches(flags))
    check_run(flags, request.output, setting.switches.attention)
    here = machine(flags)
    switches = resolve_switches(
        setting.switches, here, frames=request.frame_num, speakers=len(request.tracks)
    )
    lacks = here.lacks(switches)
    cost = cost_of(request, speech, dirs, flags.device)
    if setting.switches.linears == "fp8":
        cost = replace(cost, seconds=None)  # measured rates are those of bf16
    if flags.dry_run:
        print_cost(request, cost, setting, lacks, as_json=flags.json)
        return 0
    result = generate(flags, dirs, request, speech)
    if result is not None:
        print_result(result, as_json=flags.json)
    return 0


def model_dirs(flags: argparse.Namespace) -> ModelDirs:
    """The folders by --models, or one by one; the audio weights also beside --ckpt_dir."""
    if flags.models is not None:
        found = ModelDirs.under(flags.models)
    else:
        found = ModelDirs.under(flags.ckpt_dir.resolve().parent)
    wan = flags.ckpt_dir or found.wan
    return ModelDirs(
        wan=wan,
        multitalk=flags.audio_dir or (found.multitalk if found.multitalk.is_dir() else wan),
        wav2vec=flags.wav2vec_dir or found.wav2vec,
    )


def resolve(flags: argparse.Namespace) -> tuple[Request, Speech]:
    """The job with its image and audio read and checked; nothing is loaded yet."""
    from multitalk_runtime.generator import read_tracks
    from multitalk_runtime.input_json import read_input
    from multitalk_runtime.request import Request
    from multitalk_runtime.tts import kokoro_voice, parse_turns, speak

    wanted = read_input(flags.input_json, audio_mode=flags.audio_mode)
    if wanted.tts is not None:
        parse_turns(wanted.tts.text, len(wanted.tts.voices))
    request = Request(
        prompt=wanted.prompt,
        image=wanted.image,
        tracks=wanted.tracks or (None,) * len(wanted.tts.voices if wanted.tts else ()),
        output=output_path(flags, wanted.prompt),
        audio_type=wanted.audio_type,
        bbox=wanted.bbox,
        size=flags.size,
        mode=flags.mode,
        frame_num=flags.frame_num,
        motion_frame=flags.motion_frame,
        sample_steps=flags.sample_steps,
        sample_shift=flags.sample_shift,
        text_guide_scale=flags.sample_text_guide_scale,
        audio_guide_scale=flags.sample_audio_guide_scale,
        seed=flags.base_seed,
        quality=flags.quality,
        use_teacache=flags.use_teacache,
        teacache_thresh=flags.teacache_thresh,
        use_apg=flags.use_apg,
        apg_momentum=flags.apg_momentum,
        apg_norm_threshold=flags.apg_norm_threshold,
        color_correction_strength=flags.color_correction_strength,
        max_frames=flags.max_frames,
        max_audio_s=86_400.0,
    )
    if wanted.tts is not None:
        return request, speak(wanted.tts, kokoro_voice(flags.kokoro_dir))
    return request, read_tracks(request)


def output_path(flags: argparse.Namespace, prompt: str) -> Path:
    """--save_file with .mp4, or the original's name: task, size, processes, prompt, time."""
    if flags.save_file is not None:
        return Path(f"{flags.save_file.removesuffix('.mp4')}.mp4")
    words = re.sub(r"[^\w.,-]+", "_", prompt)[:50]
    size = flags.size.replace("*", "x")
    stamp = time.strftime("%Y%m%d_%H%M%S")
    return Path(f"{flags.task}_{size}_{flags.ulysses_size}_{flags.ring_size}_{words}_{stamp}.mp4")


def cost_of(request: Request, speech: Speech, dirs: ModelDirs, device: str | None) -> Estimate:
    """Check image and masks against the bucket, plan the clips, and estimate. Raises Fault."""
    import torch

    from multitalk_runtime.estimate import estimate
    from multitalk_runtime.generator import check_masks, plan_video, read_image
    from wan.audio import video_frames
    from wan.loading import network_sizes, read_config
    from wan.preprocess import BUCKETS, choose_bucket

    with as_faults():
        config = read_config(dirs.wan)
        buckets = {**BUCKETS, **network_sizes(dirs.wan, "buckets")}
        image = read_image(request.image)
        check_masks(request, image, buckets)
        plan, _ = plan_video(request, video_frames(len(speech.mixed)))
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and torch.cuda.is_available():
        name = torch.cuda.get_device_name(torch.device(name))
    bucket = choose_bucket(image.height, image.width, buckets[request.size])
    return estimate(request, plan, bucket, config, device=name, parameters=parameter_counts(dirs, config))


def parameter_counts(dirs: ModelDirs, config: dict[str, Any]) -> dict[str, int]:
    """Of networks that are not of the published size (see `sizes.json`)."""
    from wan.loading import SIZES_FILE, build_from_config, build_on_meta, config_arguments, network_sizes

    if config.get("dim") == 5120 and not (dirs.wan / SIZES_FILE).is_file():
        return {}
    from wan.modules.clip import feature_tower
    from wan.modules.multitalk_model import WanModel
    from wan.modules.t5 import umt5_xxl
    from wan.modules.vae import VideoVAE

    networks = {
        "dit": build_from_config(WanModel, config_arguments(WanModel, dirs.wan)),
        "t5": umt5_xxl(encoder_only=True, device="meta", **network_sizes(dirs.wan, "t5")),
        "clip": build_on_meta(lambda: feature_tower(**network_sizes(dirs.wan, "clip"))),
        "vae": build_on_meta(lambda: VideoVAE(**network_sizes(dirs.wan, "vae"))),
    }
    return {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}


def generate(flags: argparse.Namespace, dirs: ModelDirs, request: Request, speech: Speech) -> Result | None:
    """Load once, run once. With several processes all take part and the first one writes."""
    from multitalk_runtime.generator import Generator
    from multitalk_runtime.settings import Lora
    from wan.distributed import init_from_environment

    files = flags.lora_dir or []
    scales = flags.lora_scale if flags.lora_scale and not flags.quant else [1.2] * len(files)
    loras = [Lora(file=f, scale=s) for f, s in zip(files, scales, strict=True)]
    with init_from_environment() as launch:
        bar = Bar() if launch.rank == 0 else None
        with bar or nullcontext():
            generator = Generator.load(
                dirs,
                device=flags.device or launch.device,
                rank=launch.rank,
                quality=flags.quality,
                **{name: value for name, value in given_switches(flags).items() if name in SWITCH_FLAGS},
                kernels=flags.kernels,
                loras=loras,
                quant=flags.quant,
                quant_dir=flags.quant_dir,
                t5_cpu=flags.t5_cpu,
                t5_fsdp=flags.t5_fsdp,
                dit_fsdp=flags.dit_fsdp,
                use_usp=flags.ulysses_size > 1,
                cfg_parallel=flags.cfg_parallel,
                num_persistent_param_in_dit=flags.num_persistent_param_in_dit,
                offload_model=launch.size == 1 if flags.offload_model is None else flags.offload_model,
                task=flags.task,
            )
            if flags.audio_save_dir is not None and launch.rank == 0:
                keep_audio(generator, speech, flags.audio_save_dir / request.image.stem)
            result = generator.run(request, progress=bar.show if bar else None)
        return result if launch.rank == 0 else None


SWITCH_FLAGS = ("attention", "linears", "vae_decode", "absorb_audio")


def given_switches(flags: argparse.Namespace) -> dict[str, Any]:
    """The switches of `wan.quality` that stand on the command line; None where one doesn't."""
    given = {name: getattr(flags, name) for name in SWITCH_FLAGS}
    return given | {"weights": flags.quant, "lora": True if flags.lora_dir else None}


def machine(flags: argparse.Namespace) -> Machine:
    """What the qualities ask of the device that would be used."""
    import torch

    from wan.quality import Machine

    name, loras = flags.device or ("cuda" if torch.cuda.is_available() else "cpu"), len(flags.lora_dir or ())
    if name != "cpu" and not torch.cuda.is_available():  # planned for a GPU that is elsewhere
        return Machine(device=name, fp8=None, fp8_attention=None, loras=loras)
    with as_faults():
        return Machine.here(name, loras=loras)


def keep_audio(generator: Generator, speech: Speech, folder: Path) -> None:
    """The files that the original always left: 1.pt, 2.pt, sum.wav."""
    import torch

    from multitalk_runtime.audio import write_wav

    folder.mkdir(parents=True, exist_ok=True)
    for number, track in enumerate(speech.tracks, 1):
        torch.save(generator.embed(track), folder / f"{number}.pt")
    write_wav(folder / "sum.wav", speech.mixed)


class Bar:
    """A progress bar: stage, steps, seconds left, peak memory. In a log: a line at most every ten seconds."""

    def __init__(self) -> None:
        from tqdm import tqdm

        layout = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} steps{postfix}"
        self._bar = tqdm(total=1, bar_format=layout, dynamic_ncols=True, file=sys.stderr, disable=None)
        self._bar.set_description_str("loading", refresh=True)
        self._last = time.monotonic()

    def show(self, progress: Progress) -> None:
        """As `Generator.run` calls it."""
        bar = self._bar
        bar.set_description_str(f"{progress.stage:<8}", refresh=False)
        if progress.total:
            bar.total, bar.n = progress.total, progress.step
        left = "" if progress.seconds_left is None else f"{_duration(progress.seconds_left)} left, "
        rest = f"{left}peak {progress.peak_bytes / 2**30:.1f} GiB"
        bar.set_postfix_str(rest, refresh=True)
        if bar.disable and time.monotonic() - self._last > LOG_S:
            self._last = time.monotonic()
            sys.stderr.write(f"{progress.stage}: {progress.step}/{progress.total} steps, {rest}\n")

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def print_cost(
    request: Request, cost: Estimate, setting: Setting, lacks: Sequence[str], *, as_json: bool
) -> None:
    """The resolved job. `lacks`: what this machine has not, but the job would need."""
    from multitalk_runtime.provenance import versions

    if as_json:
        job = {"prompt": request.prompt, "image": str(request.image), "output": str(request.output),
               "persons": len(request.tracks), "mode": request.mode, "seed": request.seed,
               "shift": request.shift, **cost.to_json(), **setting.to_json(),
               "lacks": list(lacks), "versions": versions()}  # fmt: skip
        sys.stdout.write(json.dumps(job, indent=1, ensure_ascii=False) + "\n")
        return
    time_left = f"no measured rate for {cost.device}"
    if cost.seconds is not None:
        time_left = f"about {_duration(cost.seconds)} on {cost.device}, without loading"
    gib = 2**30
    rows = {
        "video": f"{request.output}: {cost.bucket[1]}×{cost.bucket[0]}, {cost.frames} frames "
        f"({cost.frames / 25:.2f} s)",
        "persons": f"{len(request.tracks)}",
        "clips": f"{cost.clips} of {request.frame_num} frames, {cost.tokens} tokens",
        "steps": f"{cost.steps} a clip, {cost.passes} passes a step, shift {request.shift:g}",
        "work": f"{cost.flops / 1e15:.3g} PFLOP",
        "time": time_left,
        "memory": f"about {cost.weights_bytes / gib:.1f} GiB of weights and "
        f"{cost.activation_bytes / gib:.1f} GiB beside them; --num_persistent_param_in_dit 0 needs less",
        "seed": f"{request.seed if request.seed >= 0 else 'random'}",
        "quality": describe(setting),
    }
    rows |= {"lacks": "; ".join(lacks)} if lacks else {}
    sys.stdout.write("".join(f"{name:<8} {text}\n" for name, text in rows.items()))


def describe(setting: Setting) -> str:
    """The quality with all its switches; those that were set otherwise have a star."""
    switches = (
        f"{name}{'*' if name in setting.overrides else ''} {value}"
        for name, value in setting.to_json()["switches"].items()
    )
    return f"{setting.quality}: {', '.join(switches)}" + (" (* set by a flag)" if setting.overrides else "")


def print_result(result: Result, *, as_json: bool) -> None:
    if as_json:
        content = {"video": str(result.video), **result.to_json()}
        sys.stdout.write(json.dumps(content, indent=1) + "\n")
        return
    for note in result.notes:
        sys.stderr.write(f"note: {note}\n")
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.phases.items())
    sys.stdout.write(
        f"{result.video}: {result.width}×{result.height}, {result.frames} frames, seed {result.seed}, "
        f"{result.seconds:.1f} s ({phases}), peak {result.peak_bytes / 2**30:.1f} GiB\n"
    )


def _tell(fault: Fault) -> None:
    where = f"{fault.field}: " if fault.field else ""
    # On one's own machine paths are no secret: a model's error is told in full.
    inner = fault.__cause__
    detail = f"\n  {inner}" if isinstance(fault, ModelFault | StorageFault) and inner is not None else ""
    sys.stderr.write(f"error: {where}{fault.message} ({fault.code}){detail}\n  fix: {fault.hint}\n")


if __name__ == "__main__":
    sys.exit(main())
