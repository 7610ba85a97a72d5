"""The flags of `generate_multitalk`: the original's, with their defaults, and a few of ours."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from multitalk_runtime.errors import JobFault
from wan.quality import ABSORB_AUDIO, LINEARS, QUALITIES, TIERS, VAE_DECODE

__all__ = ["check_flags", "parser"]

EXAMPLES = """
the input JSON:
  {"prompt": "A woman sings in a studio", "cond_image": "woman.png", "cond_audio": {"person1": "song.wav"}}
  two speakers:  "cond_audio": {"person1": "a.wav", "person2": "b.mp4"}, "audio_type": "para" | "add",
                 "bbox": {"person1": [row_min, col_min, row_max, col_max], "person2": [...]}
  Boxes are in pixels of the image, rows first. Without them person1 is the left half, person2 the right.
  A track may be "None" (that person is silent) or a video file.

examples:
  generate_multitalk --ckpt_dir weights/Wan2.1-I2V-14B-480P --wav2vec_dir weights/chinese-wav2vec2-base \\
      --input_json job.json --save_file out --dry-run          what it would do, and how long
  generate_multitalk --models weights --input_json job.json --mode streaming --save_file long
  generate_multitalk --models weights --input_json job.json --quality fast --save_file quick      fp8 linears
  generate_multitalk --models weights --input_json job.json --quality turbo --lora_dir FusionX.safetensors \\
      --lora_scale 1.0                                          8 steps, shift 2, guidance 1 and 2
  torchrun --nproc-per-node 4 -m multitalk_runtime.generate --models weights --ulysses_size 4 …

exit codes: 0 done, 1 the run failed, 2 bad input, 130 interrupted
"""


def _boolean(text: str) -> bool:
    known = {"true": True, "yes": True, "y": True, "t": True, "1": True}
    known |= {"false": False, "no": False, "n": False, "f": False, "0": False}
    if text.lower() not in known:
        msg = f"{text!r} is neither true nor false"
        raise argparse.ArgumentTypeError(msg)
    return known[text.lower()]


def parser() -> argparse.ArgumentParser:
    """All flags; parsing loads nothing."""
    from wan.configs import SIZE_CONFIGS, WAN_CONFIGS

    top = argparse.ArgumentParser(
        prog="generate_multitalk",
        description="A talking-person video from an image, speech of one or two people and a prompt.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = top.add_argument_group("what").add_argument
    add("--task", default="multitalk-14B", choices=list(WAN_CONFIGS), help="multitalk-14B (default)")
    add("--size", default="multitalk-480", choices=list(SIZE_CONFIGS), help="multitalk-480 or multitalk-720")
    add("--input_json", type=Path, default=Path("examples.json"), help="the job (default examples.json)")
    add("--mode", default="clip", choices=["clip", "streaming"], help="one clip, or as long as the speech")
    add("--frame_num", type=int, default=81, help="frames of a clip, 4n+1 (default 81)")
    add("--motion_frame", type=int, default=25, help="frames that clips share when streaming (default 25)")
    add("--max_frames", type=int, default=1000, help="of a streaming video (default 1000, 40 seconds)")
    add("--audio_mode", default="localfile", choices=["localfile", "tts"], help="tts speaks tts_audio.text")
    add("--save_file", default=None, help="the video's path without .mp4 (default: from task, prompt, time)")
    add("--audio_save_dir", type=Path, default=None,
        help="keep embeddings and the mixed sound in DIR/IMAGE_NAME (default: not kept)")  # fmt: skip
    add = top.add_argument_group("how").add_argument
    add("--quality", default="exact", choices=QUALITIES,
        help="exact (default), near, fast (fp8 linears), turbo (few steps, needs a distilled LoRA); "
        "any other flag given beside it wins")  # fmt: skip
    add("--linears", default=None, choices=LINEARS, help="matrix products (default bf16; fast fp8)")
    add("--vae_decode", default=None, choices=VAE_DECODE, help="default fp32; else than exact bf16")
    add("--absorb_audio", default=None, choices=ABSORB_AUDIO,
        help="multiply audio projections into keys and values; silence takes 2 GB, all 22")  # fmt: skip
    add("--base_seed", type=int, default=42, help="below 0: a random one (default 42)")
    add("--sample_steps", type=int, default=None, help="default 40; turbo 8")
    add("--sample_shift", type=float, default=None, help="default 7 for 480, 11 for 720; turbo 2")
    add("--sample_text_guide_scale", type=float, default=None,
        help="1.0 runs two passes a step (default 5; turbo 1)")  # fmt: skip
    add("--sample_audio_guide_scale", type=float, default=None, help="default 4; turbo 2")
    add("--use_teacache", action="store_true", help="skip steps that change little")
    add("--teacache_thresh", type=float, default=0.2, help="0.2 to 0.5 (default 0.2)")
    add("--use_apg", action="store_true", help="adaptive projected guidance")
    add("--apg_momentum", type=float, default=-0.75, help="default -0.75")
    add("--apg_norm_threshold", type=float, default=55, help="default 55")
    add("--color_correction_strength", type=float, default=1.0, help="0 (off) to 1 (default)")
    add = top.add_argument_group("models").add_argument
    add("--models", type=Path, default=None, help="folder of all three models; or one by one:")
    add("--ckpt_dir", type=Path, default=None, help="Wan2.1-I2V-14B-480P")
    add("--audio_dir", type=Path, default=None, help="MeiGen-MultiTalk, if its file is not in --ckpt_dir")
    add("--wav2vec_dir", type=Path, default=None, help="chinese-wav2vec2-base")
    add("--kokoro_dir", type=Path, default=Path("weights/Kokoro-82M"), help="for --audio_mode tts")
    add("--quant", default=None, choices=["int8", "fp8"], help="quantised weights from --quant_dir")
    add("--quant_dir", type=Path, default=None, help="folder that contains quant_models/")
    add("--lora_dir", type=Path, nargs="+", default=None,
        help="LoRA files; with --quant one complete quantised model file")  # fmt: skip
    add("--lora_scale", type=float, nargs="+", default=None, help="one for each LoRA (default 1.2 each)")
    add = top.add_argument_group("where").add_argument
    add("--device", default=None, help="cuda, cuda:1, cpu (default: the GPU if there is one)")
    add("--attention", default=None, help="backend of wan.attention_backends (default auto)")
    add("--kernels", default=None, choices=["eager", "fused"], help="default: fused on a GPU")
    add("--offload_model", type=_boolean, default=None,
        help="keep networks that wait in RAM, if they do not all fit (default: true on one GPU)")  # fmt: skip
    add("--num_persistent_param_in_dit", type=int, default=None,
        help="DiT parameters to keep on the GPU, the others are fetched ahead; 0 needs least")  # fmt: skip
    add("--t5_cpu", action="store_true", help="run T5 on the CPU")
    add("--ulysses_size", type=int, default=1, help="processes that share a pass")
    add("--ring_size", type=int, default=1, help="accepted; only 1 is implemented")
    add("--cfg_parallel", action="store_true", help="spread guidance passes over processes first")
    add("--t5_fsdp", action="store_true", help="shard T5 over processes")
    add("--dit_fsdp", action="store_true", help="shard the DiT over processes")
    add = top.add_argument_group("output").add_argument
    add(
        "--dry-run",
        "--dry_run",
        action="store_true",
        help="print the resolved job and its cost; load nothing",
    )
    add("--json", action="store_true", help="print the result as JSON")
    return top


def check_flags(flags: argparse.Namespace) -> None:
    """Everything that the flags alone can say, before a file is opened. Raises JobFault with the flag."""

    def refuse(flag: str, message: str, hint: str, code: str = "job.invalid") -> None:
        raise JobFault(code, message, field=flag, hint=hint)

    if flags.task != "multitalk-14B":
        refuse("--task", f"{flags.task} is not MultiTalk's", "use multitalk-14B")
    if flags.size not in ("multitalk-480", "multitalk-720"):
        refuse("--size", f"{flags.size} is not MultiTalk's", "use multitalk-480 or multitalk-720", "job.size")
    for name in ("frame_num", "motion_frame"):
        value, least = getattr(flags, name), 5 if name == "frame_num" else 1
        if value < least or value % 4 != 1:
            near = max(least, (value - 1) // 4 * 4 + 1)
            refuse(f"--{name}", f"{value} is not 4n+1", f"use {near} or {near + 4}", "job.frame_num")
    if flags.mode == "streaming" and flags.motion_frame >= flags.frame_num:
        refuse("--motion_frame", "it leaves nothing new in a clip", "use 25", "job.conflict")
    if flags.sample_steps is not None and flags.sample_steps < 1:
        refuse("--sample_steps", f"{flags.sample_steps} steps", "use 1 or more")
    if flags.sample_shift is not None and not (flags.sample_shift > 0 and math.isfinite(flags.sample_shift)):
        refuse("--sample_shift", f"{flags.sample_shift} is not positive", "use 7 for 480, 11 for 720")
    if not 0 <= flags.color_correction_strength <= 1:
        refuse("--color_correction_strength", "it goes from 0 to 1", "use 1")
    if not flags.teacache_thresh > 0:
        refuse("--teacache_thresh", "it must be positive", "use 0.2")
    for name in ("sample_text_guide_scale", "sample_audio_guide_scale", "apg_momentum", "apg_norm_threshold"):
        if getattr(flags, name) is not None and not math.isfinite(getattr(flags, name)):
            refuse(f"--{name}", "it is not a finite number", "leave it out")
    if TIERS[flags.quality].lora and not flags.lora_dir:
        refuse("--quality", "turbo needs a distilled LoRA", "name it with --lora_dir", "job.quality")
    if flags.quant and (flags.linears or TIERS[flags.quality].linears) == "fp8" and flags.quant != "fp8":
        refuse("--quality", f"no fp8 linears with {flags.quant} weights", "leave --quant out")
    if flags.base_seed >= 2**32:
        refuse("--base_seed", f"{flags.base_seed} is too large", "use less than 2**32; -1 draws one")
    if flags.max_frames < 1:
        refuse("--max_frames", f"{flags.max_frames} frames", "use 1000")
    _check_models(flags, refuse)
    _check_processes(flags, refuse)


def _check_models(flags: argparse.Namespace, refuse: object) -> None:
    assert callable(refuse)
    if flags.models is None:
        for name in ("ckpt_dir", "wav2vec_dir"):
            if getattr(flags, name) is None:
                refuse(f"--{name}", "this is needed", "name the folder, or --models", "job.missing")
    for name in ("models", "ckpt_dir", "audio_dir", "wav2vec_dir", "quant_dir"):
        folder = getattr(flags, name)
        if folder is not None and not folder.is_dir():
            refuse(f"--{name}", f"no folder {str(folder)!r}", "correct the path")
    loras, scales = flags.lora_dir or [], flags.lora_scale
    for file in loras:
        if not file.is_file():
            refuse("--lora_dir", f"no file {str(file)!r}", "name LoRA files, not their folder")
    if scales is not None and not flags.quant and len(scales) != len(loras):
        refuse("--lora_scale", f"{len(scales)} scales for {len(loras)} LoRA files", "give one for each")
    if flags.quant and flags.quant_dir is None:
        refuse(
            "--quant", "it needs --quant_dir", "name the folder that contains quant_models/", "job.missing"
        )
    if flags.quant and len(loras) > 1:
        refuse("--lora_dir", "with --quant it is one complete model file", "give one")
    if flags.quant and (flags.t5_fsdp or flags.dit_fsdp):
        refuse("--quant", "quantised weights are not sharded", "leave --t5_fsdp and --dit_fsdp out")
    if flags.num_persistent_param_in_dit is not None and flags.num_persistent_param_in_dit < 0:
        refuse("--num_persistent_param_in_dit", "it is a count", "use 0 or more")


def _check_processes(flags: argparse.Namespace, refuse: object) -> None:
    assert callable(refuse)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if flags.ring_size != 1:
        hint = f"use --ulysses_size {flags.ulysses_size * max(flags.ring_size, 1)}"
        refuse("--ring_size", "ring attention is not implemented", hint)
    if flags.ulysses_size < 1 or flags.ulysses_size not in (1, world):
        msg = f"{flags.ulysses_size} processes asked for, torchrun started {world}"
        refuse("--ulysses_size", msg, f"start as many: torchrun --nproc-per-node {flags.ulysses_size}")
    if world == 1:
        for name in ("t5_fsdp", "dit_fsdp", "cfg_parallel"):
            if getattr(flags, name):
                refuse(f"--{name}", "it needs several processes", "start with torchrun")
