"""Speech from text by Kokoro-82M, for `--audio_mode tts` (extra `tts`).

Text of two speakers is `(s1) … (s2) …`: while one speaks, the other is silent.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from multitalk_runtime.audio import Speech, resample
from multitalk_runtime.errors import JobFault, ModelFault

if TYPE_CHECKING:
    from multitalk_runtime.input_json import Tts

__all__ = ["kokoro_voice", "parse_turns", "speak"]

KOKORO = Path("weights/Kokoro-82M")
KOKORO_RATE = 24_000
REPO = "hexgrad/Kokoro-82M"
WEIGHTS = "kokoro-v1_0.pth"
SPACY = "en_core_web_sm"
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
    """Kokoro from a local folder (config.json, kokoro-v1_0.pth), American English.

    Nothing is downloaded: raises ModelFault if the package, the folder or spaCy's English model is not there.
    The voice itself raises JobFault for a text without anything that can be pronounced.
    """
    try:
        import spacy
        from kokoro import KModel, KPipeline
    except ImportError as error:
        hint = "pip install 'multitalk-runtime[tts]'"
        raise ModelFault("model.missing", "the package kokoro is not installed", hint=hint) from error
    for name in ("config.json", WEIGHTS):
        if not (folder / name).is_file():
            msg = f"no file {str(folder / name)!r}"
            raise ModelFault("model.missing", msg, hint=f"download {REPO} and name it with --kokoro_dir")
    if not spacy.util.is_package(SPACY):  # the package would try to download it in the middle of the run
        msg = f"spaCy's model {SPACY} is not installed"
        raise ModelFault("model.missing", msg, hint=f"python -m spacy download {SPACY}")
    # Without the repository's name both write a warning to stdout, where --json has its result.
    model = KModel(repo_id=REPO, config=str(folder / "config.json"), model=str(folder / WEIGHTS)).eval()
    pipeline = KPipeline(lang_code="a", repo_id=REPO, model=model)

    def voice(text: str, file: Path) -> np.ndarray:
        # As a tensor: a path is split at its commas, and one without .pt is looked for on the Hub.
        spoken = pipeline(text, voice=_style(file), split_pattern=r"\n+")
        pieces = [np.asarray(piece.audio, np.float32).reshape(-1) for piece in spoken]
        if not pieces:
            msg = f"nothing of {text[:40]!r} can be pronounced"
            raise JobFault("job.invalid", msg, field="tts_audio.text", hint="use English words")
        return np.concatenate(pieces)

    return voice


def _style(file: Path) -> Any:
    """A voice file: a tensor [510, 1, 256]. Raises JobFault."""
    import torch

    try:
        style = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        msg = f"{file.name} is not a voice of Kokoro"
        raise JobFault("job.invalid", msg, field="tts_audio", hint=f"use a file of {REPO}/voices") from error
    if not isinstance(style, torch.Tensor) or style.shape[1:] != (1, 256):
        msg = f"{file.name} is not a voice of Kokoro"
        raise JobFault("job.invalid", msg, field="tts_audio", hint=f"use a file of {REPO}/voices")
    return style.float()
