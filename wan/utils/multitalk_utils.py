"""The names under which callers of the original find these helpers; each lives in a module of its own."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..color import match_and_blend_colors
from ..guidance import MomentumBuffer, adaptive_projected_guidance, project
from ..modules.attention import normalize_and_scale, reference_map
from ..modules.rope import RotaryPositionalEmbedding1D
from ..modules.runtime import Grid, Parallel
from ..preprocess import ASPECT_RATIO_627, ASPECT_RATIO_960, resize_and_centercrop

__all__ = [
    "ASPECT_RATIO_627",
    "ASPECT_RATIO_960",
    "MomentumBuffer",
    "RotaryPositionalEmbedding1D",
    "adaptive_projected_guidance",
    "get_attn_map_with_target",
    "match_and_blend_colors",
    "normalize_and_scale",
    "project",
    "resize_and_centercrop",
    "save_video_ffmpeg",
    "split_token_counts_and_frame_ids",
]


def get_attn_map_with_target(
    visual_q: Tensor,
    ref_k: Tensor,
    shape: Grid,
    ref_target_masks: Tensor | None = None,
    split_num: int = 2,
    enable_sp: bool = False,
) -> Tensor:
    """The reference map [3, L] of q, k [1, L, N, D]; `split_num` and `enable_sp` are accepted and not needed.

    With several processes use `attention.reference_map`, which takes the process group's `Parallel`.
    """
    if enable_sp:
        msg = "enable_sp: call wan.modules.attention.reference_map with a Parallel instead"
        raise ValueError(msg)
    return reference_map(visual_q, ref_k, shape, ref_target_masks, Parallel())


def split_token_counts_and_frame_ids(
    T: int, token_frame: int, world_size: int, rank: int
) -> tuple[list[int], list[int]]:
    """If T·token_frame tokens are cut into `world_size` equal runs: this rank's tokens per frame, and those
    frames.

    The remainder of an uneven split goes to the first ranks, one token each.
    """
    share, rest = divmod(T * token_frame, world_size)
    start = rank * share + min(rank, rest)
    stop = start + share + (rank < rest)
    frames = list(range(start // token_frame, (stop - 1) // token_frame + 1))
    counts = [min(stop, (f + 1) * token_frame) - max(start, f * token_frame) for f in frames]
    return counts, frames


def save_video_ffmpeg(
    gen_video_samples: Tensor,
    save_path: str,
    vocal_audio_list: Sequence[str],
    fps: int = 25,
    quality: int = 5,
    high_quality_save: bool = False,
) -> None:
    """Write frames [3, T, H, W] in [−1, 1] and the first audio file to `<save_path>.mp4`: one ffmpeg run.

    H.264 and AAC; the sound is cut to the video. `quality` belonged to an intermediate file that is no longer
    written; `high_quality_save` encodes visually lossless. Raises `media.MediaError` with ffmpeg's message,
    or when there is no ffmpeg.
    """
    from .media import MediaError, ffmpeg

    frames = ((gen_video_samples + 1) / 2 * 255).clamp(0, 255).to(torch.uint8)  # truncates, as always
    count, height, width = frames.shape[1:]
    target = Path(f"{save_path}.mp4")
    target.parent.mkdir(parents=True, exist_ok=True)
    crf, preset = ("10", "veryslow") if high_quality_save else ("23", "medium")
    sound_input = ["-i", str(vocal_audio_list[0])] if vocal_audio_list else []
    sound = ["-map", "1:a", "-c:a", "aac"] if vocal_audio_list else []
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps)]
    command = [ffmpeg(), "-y", "-v", "error", *source, "-i", "pipe:0", *sound_input, "-map", "0:v", *sound]
    command += ["-c:v", "libx264", "-crf", crf, "-preset", preset, "-pix_fmt", "yuv420p"]
    command += ["-t", f"{count / fps:.6f}", str(target)]
    raw = np.ascontiguousarray(frames.permute(1, 2, 3, 0).cpu().numpy()).tobytes()
    done = subprocess.run(command, input=raw, capture_output=True, check=False)
    if done.returncode:
        msg = f"ffmpeg could not write {target}: {done.stderr.decode(errors='replace').strip()}"
        raise MediaError(msg)
