"""Video files by the ffmpeg program: frames piped in or out. Sound belongs to the runtime."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["MediaError", "ffmpeg", "read_video", "write_video"]


class MediaError(RuntimeError):
    """A video that can't be read or written, or no ffmpeg; the message says what to do."""


def ffmpeg() -> str:
    """The ffmpeg program: the one on PATH, else the one in the package imageio-ffmpeg. Raises MediaError."""
    found = shutil.which("ffmpeg")
    if found:
        return found
    try:
        from imageio_ffmpeg import get_ffmpeg_exe
    except ImportError:
        fix = "install it (apt install ffmpeg) or the extra: pip install 'multitalk-runtime[video]'"
        msg = f"there is no ffmpeg: {fix}"
        raise MediaError(msg) from None
    return get_ffmpeg_exe()


def write_video(frames: Tensor, path: str | os.PathLike[str], fps: float = 25, *, crf: int = 18) -> Path:
    """Frames [T,H,W,3] uint8 → an H.264 file; odd sizes are padded by a row or column. Raises MediaError.

    The file appears under its name only when it is complete.
    """
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != torch.uint8:
        msg = f"frames must be [T, H, W, 3] uint8, got {list(frames.shape)} {frames.dtype}"
        raise ValueError(msg)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    height, width = frames.shape[1:3]
    source = [
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-s",
        f"{width}x{height}",
        "-r",
        str(fps),
        "-i",
        "pipe:0",
    ]
    even = ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2"]  # 4:2:0 needs even sides
    target = ["-c:v", "libx264", "-crf", str(crf), "-pix_fmt", "yuv420p", str(part)]
    try:
        _run(["-y", *source, *even, *target], path, stdin=frames.contiguous().cpu().numpy().tobytes())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def read_video(path: str | os.PathLike[str]) -> tuple[Tensor, float]:
    """A video (or image) file → frames [T,H,W,3] uint8 and frames a second. Raises MediaError.

    All frames are in memory at once: meant for clips of seconds.
    """
    path = Path(path)
    if not path.is_file():
        msg = f"{path}: no such file"
        raise MediaError(msg)
    # Pictures in a row carry their own size, rotation applied; the rate stands only in the log.
    out, log = _run(["-i", str(path), "-an", "-f", "image2pipe", "-c:v", "ppm", "pipe:1"], path, level="info")
    frames = _portable_pixmaps(out)
    if not frames:
        msg = f"{path}: there is no picture in it"
        raise MediaError(msg)
    rate = re.search(r"Video:.*?([\d.]+)(k?) (?:fps|tbr)", log)
    fps = float(rate[1]) * (1000 if rate[2] else 1) if rate else 25.0
    return torch.from_numpy(np.stack(frames)), float(Fraction(fps).limit_denominator(1001))


def _run(
    arguments: list[str], path: Path, *, stdin: bytes | None = None, level: str = "error"
) -> tuple[bytes, str]:
    command = [ffmpeg(), "-hide_banner", "-loglevel", level, *arguments]
    given = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
    done = subprocess.run(command, capture_output=True, check=False, **given)
    log = done.stderr.decode(errors="replace").strip()
    if done.returncode:
        msg = f"{path}: ffmpeg failed: {log.splitlines()[-1] if log else f'exit code {done.returncode}'}"
        raise MediaError(msg)
    return done.stdout, log


def _portable_pixmaps(data: bytes) -> list[np.ndarray]:
    """Split a stream of binary PPM pictures (header `P6 width height 255`)."""
    frames, at = [], 0
    header = re.compile(rb"P6\s(\d+)\s(\d+)\s255\s")
    while match := header.match(data, at):
        width, height = int(match[1]), int(match[2])
        pixels = np.frombuffer(data, np.uint8, width * height * 3, match.end())
        frames.append(pixels.reshape(height, width, 3))
        at = match.end() + pixels.size
    return frames
