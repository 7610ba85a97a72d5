"""Speech from text by Kokoro-82M, for `--audio_mode tts` (extra `tts`).

Text of two speakers is `(s1) … (s2) …`: while one speaks, the other is silent.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from multitalk_runtime.audio import Speech, resample
from multitalk_runtime.errors import JobFault, ModelFault

if TYPE_CHECKING:
    from multitalk_runtime.input_json import Tts

__all__ = ["kokoro_voice", "parse_turns", "speak"]

KOKORO = Path("weights/Kokoro-82M")
KOKORO_RATE = 24_000
Voice = Callable[[str, Path], np.ndarray]
"""(text, voice file) → samples at 24 kHz."""

_MARK = re.compile(r"\(s(\d+)\)")


def parse_turns(text: str, speakers: int) -> list[tuple[int, str]]:
    """`(s1) Hello. (s2) Hi.` → [(1, "Hello."), (2, "Hi.")]; text without marks is speaker 1's.

    Raises JobFault for a speaker that has no voice, and for text before the first mark.
    """
    parts = _MARK.split(text)
    if len(parts) == 1:
        return [(1, text.strip())]
    if parts[0].strip():
        msg = f"{parts[0].strip()[:40]!r} stands before the first speaker's mark"
        raise JobFault("job.invalid", msg, field="tts_audio.text", hint="begin with (s1) or (s2)")
    turns = []
    for number, words in zip(parts[1::2], parts[2::2], strict=True):
        if not 1 <= int(number) <= speakers:
            msg = f"(s{number}) speaks, but there are {speakers} voices"
            raise JobFault("job.invalid", msg, field="tts_audio.text", hint="give each speaker a voice")
        if words.strip():
            turns.append((int(number), words.strip()))
    if not turns:
        raise JobFault("job.missing", "there is no text to speak", field="tts_audio.text")
    return turns


def speak(tts: Tts, voice: Voice) -> Speech:
    """All turns, one after the other, each on its speaker's track. Levels stay as they are."""
    turns = [
        (who, resample(np.asarray(voice(words, tts.voices[who - 1]), np.float32), KOKORO_RATE))
        for who, words in parse_turns(tts.text, len(tts.voices))
    ]
    tracks = tuple(
        np.concatenate([sound if who == speaker else np.zeros_like(sound) for who, sound in turns])
        for speaker in range(1, len(tts.voices) + 1)
    )
    return Speech(tracks=tracks, mixed=np.sum(tracks, axis=0, dtype=np.float32))


def kokoro_voice(folder: Path = KOKORO) -> Voice:
    """Kokoro from a local folder (config.json, kokoro-v1_0.pth). Raises ModelFault if it is not there."""
    try:
        from kokoro import KModel, KPipeline
    except ImportError as error:
        hint = "pip install 'multitalk-runtime[tts]'"
        raise ModelFault("model.missing", "the package kokoro is not installed", hint=hint) from error
    weights = folder / "kokoro-v1_0.pth"
    if not weights.is_file():
        raise ModelFault("model.missing", f"no file {str(weights)!r}", hint="download hexgrad/Kokoro-82M")
    model = KModel(config=str(folder / "config.json"), model=str(weights)).eval()
    pipeline = KPipeline(lang_code="a", model=model)

    def voice(text: str, file: Path) -> np.ndarray:
        pieces = [np.asarray(piece.audio) for piece in pipeline(text, voice=str(file), split_pattern=r"\n+")]
        return np.concatenate(pieces)

    return voice
