"""Speech on arrays: loudness, mixing of two speakers, wav2vec2 windows per video frame. Files are not read
here.

Specification §2.2, §3.2, §3.5, §3.11.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from .modules.wav2vec2 import Wav2Vec2Model

SAMPLE_RATE = 16_000
VIDEO_FPS = 25
TARGET_LUFS = -23.0
MIN_SECONDS = 0.4  # one block of ITU-R BS.1770's gated loudness


def loudness_norm(audio: np.ndarray, sr: int = SAMPLE_RATE, lufs: float = TARGET_LUFS) -> np.ndarray:
    """Scale mono samples [n] to an integrated loudness of `lufs` (ITU-R BS.1770-4); silence stays as it is.

    Raises ValueError for less than 0.4 s, over which no loudness is defined, and for samples that are not
    finite.
    """
    import pyloudnorm

    if len(audio) < MIN_SECONDS * sr:
        msg = f"the audio has {len(audio) / sr:.2f} s; its loudness needs at least {MIN_SECONDS} s"
        raise ValueError(msg)
    if not np.isfinite(audio).all():
        msg = "the audio has samples that are not finite (NaN or infinite)"
        raise ValueError(msg)
    loudness = pyloudnorm.Meter(sr).integrated_loudness(audio)
    if abs(loudness) > 100:  # −inf: silence
        return audio
    return audio * 10 ** ((lufs - loudness) / 20)


@dataclass(frozen=True, kw_only=True)
class Tracks:
    """Both speakers on one time axis, [n] each, and their sum for the video's sound."""

    person1: np.ndarray
    person2: np.ndarray
    mixed: np.ndarray


def mix(person1: np.ndarray | None, person2: np.ndarray | None, audio_type: str) -> Tracks:
    """Put two speakers on one time axis. `None` is a silent speaker.

    "para": both start at 0; the shorter one is followed by silence. "add": person 1 speaks first, then person
    2. Raises ValueError for another type, or when both are silent.
    """
    if person1 is None and person2 is None:
        msg = "both speakers are silent; at least one needs audio"
        raise ValueError(msg)
    first = np.zeros_like(person2) if person1 is None else person1
    second = np.zeros_like(person1) if person2 is None else person2
    if audio_type == "para":
        length = max(len(first), len(second))
        tracks = [np.pad(track, (0, length - len(track))) for track in (first, second)]
    elif audio_type == "add":
        tracks = [np.pad(first, (0, len(second))), np.pad(second, (len(first), 0))]
    else:
        msg = f"audio_type {audio_type!r} is neither 'para' (at once) nor 'add' (one after the other)"
        raise ValueError(msg)
    return Tracks(person1=tracks[0], person2=tracks[1], mixed=tracks[0] + tracks[1])


def video_frames(samples: int, sr: int = SAMPLE_RATE, fps: int = VIDEO_FPS) -> int:
    """How many whole video frames the audio covers."""
    return int(samples / sr * fps)


def speech_embedding(model: Wav2Vec2Model, audio: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """wav2vec2 states of mono 16 kHz samples [n], one row a video frame: [T, 12, 768] fp32 on the CPU.

    The samples go in as they are: the checkpoint was used without normalisation (specification §0.1).
    """
    wave = torch.from_numpy(np.ascontiguousarray(audio, dtype=np.float32)).to(device)
    return model.embed(wave, video_frames(len(audio))).cpu()


def extend_reversed(embedding: Tensor, rows: int) -> Tensor:
    """Append the last `rows` rows in reverse, so that a window past the end sees plausible speech."""
    return torch.cat((embedding, embedding[-rows:].flip(0))) if rows > 0 else embedding


def audio_windows(embeddings: list[Tensor], start: int, frames: int, window: int = 5) -> Tensor:
    """Embeddings [N, 12, 768] of each person → windows around frames start…start+frames−1: [P, frames,
    window, 12, 768].

    Positions before the first and after the last row repeat that row.
    """
    offsets = torch.arange(window) - window // 2
    centers = torch.arange(start, start + frames)[:, None] + offsets  # [frames, window]
    return torch.stack([e[centers.clamp(0, len(e) - 1)] for e in embeddings])
