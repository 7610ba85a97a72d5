"""Audio files → the speakers' tracks: 16 kHz, mono, float32, at one loudness, on one time axis.

ffmpeg decodes (video files count as audio), soxr resamples as the model's original did; loudness and mixing
are `wan.audio`'s.
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
import wave
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from multitalk_runtime.errors import AudioFault, PersonsFault, TooLargeFault
from multitalk_runtime.ffmpeg import READ_ONLY_FILES, program

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["Speech", "decode_audio", "mix_tracks", "write_wav"]

SAMPLE_RATE = 16_000
MAX_SECONDS = 600.0
MIN_SECONDS = 0.4  # below, no loudness is defined
_PROBE_S = 30.0
_DECODE_S = 300.0
_BLOCK = 1 << 16  # frames that are decoded at a time


@dataclass(frozen=True, kw_only=True)
class Speech:
    """The speakers' tracks [n] each and the sound of the video [n]: float32 at 16 kHz."""

    tracks: tuple[np.ndarray, ...]
    mixed: np.ndarray

    @property
    def seconds(self) -> float:
        return len(self.mixed) / SAMPLE_RATE


def decode_audio(path: Path, *, field: str = "audio", max_seconds: float = MAX_SECONDS) -> np.ndarray:
    """The first audio stream of a file → samples [n] float32 in about [−1, 1]: 16 kHz, channels averaged.

    Raises AudioFault (no audio, broken, shorter than 0.4 s) or TooLargeFault (longer than `max_seconds`).
    """
    rate, channels = _layout(path, field)
    # A second more than allowed shows that there is more; nothing beyond it is decoded.
    command = [program("ffmpeg"), "-nostdin", "-v", "error", *READ_ONLY_FILES, "-i", f"file:{path}"]
    command += ["-map", "0:a:0", "-vn", "-sn", "-dn", "-t", f"{max_seconds + 1:.3f}"]
    command += ["-f", "f32le", "-c:a", "pcm_f32le", "pipe:1"]
    samples, seconds = _decode(command, rate, channels, field)
    if seconds > max_seconds:
        msg = f"the audio is longer than {max_seconds:g} seconds"
        raise TooLargeFault("too_large.seconds", msg, field=field)
    _check_length(seconds, field)
    return samples


def _decode(command: list[str], rate: int, channels: int, field: str) -> tuple[np.ndarray, float]:
    """ffmpeg's output as it comes: averaged and resampled piece by piece → samples, seconds of sound.

    Never held whole at its own rate: silence of eight channels at 384 kHz is a few hundred kilobytes of FLAC
    and gigabytes of samples.
    """
    mono, frames = _Mono(rate), 0
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        timer = threading.Timer(_DECODE_S, process.kill)
        timer.start()
        begin = time.monotonic()
        try:
            assert process.stdout is not None
            while raw := process.stdout.read(_BLOCK * channels * 4):
                whole = len(raw) // (4 * channels) * 4 * channels
                block = np.frombuffer(raw[:whole], dtype="<f4").reshape(-1, channels)
                if not np.isfinite(block).all():
                    raise AudioFault("audio.broken", "the audio has samples that are not finite", field=field)
                frames += len(block)
                # The mean, as the model's original took it; ffmpeg's own downmix keeps the power instead.
                mono.add(block.mean(axis=1))
            code = process.wait()
        except BaseException:
            process.kill()
            raise
        finally:
            timer.cancel()
    if time.monotonic() - begin > _DECODE_S:
        raise AudioFault("audio.broken", "decoding took too long", field=field)
    if code or not frames:
        raise AudioFault("audio.broken", "the audio can't be decoded", field=field)
    return mono.end(), frames / rate


class _Mono:
    """Samples at `rate` in pieces → 16 kHz; the same numbers as all at once."""

    def __init__(self, rate: int) -> None:
        self._parts: list[np.ndarray] = []
        self._stream = None
        if rate != SAMPLE_RATE:
            import soxr

            self._stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")

    def add(self, samples: np.ndarray, *, last: bool = False) -> None:
        if self._stream is not None:
            samples = self._stream.resample_chunk(samples, last=last)
        self._parts.append(np.asarray(samples, np.float32))

    def end(self) -> np.ndarray:
        self.add(np.zeros(0, np.float32), last=True)
        return np.concatenate(self._parts)


def _check_length(seconds: float, field: str) -> None:
    if seconds < MIN_SECONDS:
        msg = f"the audio has {seconds:.2f} s; at least {MIN_SECONDS} s are needed"
        raise AudioFault("audio.too_short", msg, field=field)


def _layout(path: Path, field: str) -> tuple[int, int]:
    """Sample rate and number of channels of the first audio stream."""
    command = [program("ffprobe"), "-v", "error", *READ_ONLY_FILES, "-select_streams", "a:0"]
    command += ["-show_entries", "stream=sample_rate,channels", "-of", "json", "-i", f"file:{path}"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=_PROBE_S
        )
    except subprocess.TimeoutExpired as error:
        raise AudioFault("audio.broken", "reading the audio's header took too long", field=field) from error
    if done.returncode:
        raise AudioFault("audio.not_audio", "this is not an audio or video file", field=field)
    streams = json.loads(done.stdout or b"{}").get("streams", [])
    if not streams:
        raise AudioFault("audio.no_stream", "the file has no audio stream", field=field)
    rate, channels = int(streams[0].get("sample_rate", 0)), int(streams[0].get("channels", 0))
    if not (1000 <= rate <= 768_000 and 1 <= channels <= 16):
        msg = f"{channels} channels at {rate} Hz"
        raise AudioFault("audio.broken", msg, field=field)
    return rate, channels


def resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """Samples [n] at `rate` → 16 kHz, float32."""
    if rate == SAMPLE_RATE:
        return np.asarray(samples, np.float32)
    import soxr

    return soxr.resample(samples, rate, SAMPLE_RATE, quality="HQ").astype(np.float32)


def mix_tracks(
    tracks: Sequence[np.ndarray | None], audio_type: str = "para", *, normalise: bool = True
) -> Speech:
    """One or two speakers' samples at 16 kHz → `Speech`; None is a silent speaker.

    "para": they speak at once, and the shorter track is followed by silence. "add": person 1 first, then
    person 2. `normalise` brings each track to −23 LUFS (synthetic speech is left as it is). Raises
    PersonsFault for another number of speakers, or if every track is silent; AudioFault below 0.4 s.
    """
    from wan.audio import loudness_norm, mix

    if len(tracks) not in (1, 2):
        msg = f"{len(tracks)} tracks; the model knows one or two speakers"
        raise PersonsFault("persons.count", msg, field="audio")
    if all(track is None for track in tracks):
        raise PersonsFault("persons.all_silent", "every track is silent", field="audio")
    for number, track in enumerate(tracks, 1):
        if track is not None:
            _check_length(len(track) / SAMPLE_RATE, f"audio.person{number}")
    levelled = [None if track is None else (loudness_norm(track) if normalise else track) for track in tracks]
    if len(levelled) == 1:
        track = np.asarray(levelled[0], dtype=np.float32)
        return Speech(tracks=(track,), mixed=track)
    both = mix(levelled[0], levelled[1], audio_type)
    first, second, mixed = (
        np.asarray(track, dtype=np.float32) for track in (both.person1, both.person2, both.mixed)
    )
    return Speech(tracks=(first, second), mixed=mixed)


def write_wav(path: Path, samples: np.ndarray) -> None:
    """Samples [n] at 16 kHz in [−1, 1] (clipped) → a 16-bit WAV file."""
    data = (np.clip(samples, -1, 1) * 32767).round().astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(data.tobytes())
