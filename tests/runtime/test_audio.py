"""Audio files → tracks: every container, rates and channels, and what is turned away."""

from __future__ import annotations

import subprocess
import sys
import wave
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from multitalk_runtime.audio import decode_audio, mix_tracks, write_wav
from multitalk_runtime.defaults import AUDIO
from multitalk_runtime.errors import Fault

if TYPE_CHECKING:
    from collections.abc import Callable


def tone(seconds: float = 1.0, rate: int = 16_000, frequency: float = 440.0) -> np.ndarray:
    return (0.4 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def pitch(samples: np.ndarray, rate: int = 16_000) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(spectrum.argmax() * rate / len(samples))


@pytest.fixture
def wav(tmp_path: Path) -> Path:
    path = tmp_path / "tone.wav"
    write_wav(path, tone())
    return path


def test_16_kilohertz_mono_comes_back_as_it_was(wav: Path) -> None:
    got = decode_audio(wav)
    assert got.dtype == np.float32
    assert len(got) == 16_000
    assert np.abs(got - tone()).max() < 1e-4  # 16 bits


@pytest.mark.parametrize("name", ["a.mp3", "a.flac", "a.ogg", "a.m4a", "a.mp4", "a.mkv", "a.mov"])
def test_containers(wav: Path, tmp_path: Path, ffmpeg: Callable[..., None], name: str) -> None:
    target = tmp_path / name
    picture = ["-f", "lavfi", "-i", "testsrc=d=1:s=64x64:r=10"] if name in ("a.mp4", "a.mkv", "a.mov") else []
    ffmpeg("-i", str(wav), *picture, str(target))
    got = decode_audio(target)
    assert abs(len(got) / 16_000 - 1) < 0.1
    assert abs(pitch(got) - 440) < 3


def test_rates_and_channels(tmp_path: Path) -> None:
    path = tmp_path / "stereo.wav"
    left, right = tone(rate=44_100), np.zeros(44_100, np.float32)
    with wave.open(str(path), "wb") as file:
        file.setparams((2, 2, 44_100, 0, "NONE", ""))
        both = np.stack((left, right), axis=1)
        file.writeframes((both * 32767).astype("<i2").tobytes())
    got = decode_audio(path)
    assert abs(len(got) - 16_000) <= 2
    assert abs(pitch(got) - 440) < 2
    assert abs(np.abs(got[2000:-2000]).max() - 0.2) < 0.01  # the mean of both channels


def test_a_name_that_looks_like_a_protocol_is_a_file(wav: Path, tmp_path: Path) -> None:
    odd = tmp_path / "concat:a|b -i x.wav"
    wav.rename(odd)
    assert len(decode_audio(odd)) == 16_000


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "audio.not_audio"),
        (b"this is no audio at all" * 50, "audio.not_audio"),
        (b"RIFF\x00\x00\x00\x00WAVE", "audio.not_audio"),
        (b"ffconcat version 1.0\nfile secret.wav\n", "audio.not_audio"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.wav\n#EXT-X-ENDLIST\n", "audio.not_audio"),
    ],
)
def test_what_is_not_audio(wav: Path, tmp_path: Path, content: bytes, code: str) -> None:
    wav.rename(tmp_path / "secret.wav")  # a playlist must not lead to it
    path = tmp_path / "in.wav"
    path.write_bytes(content)
    with pytest.raises(Fault) as caught:
        decode_audio(path, field="audio.person1")
    assert caught.value.code == code
    assert caught.value.field == "audio.person1"
    assert str(tmp_path) not in str(caught.value.to_json())


def test_bounds(tmp_path: Path, ffmpeg: Callable[..., None]) -> None:
    path = tmp_path / "x.wav"
    write_wav(path, tone(2.0))
    with pytest.raises(Fault, match="longer than 1 seconds") as caught:
        decode_audio(path, max_seconds=1.0)
    assert caught.value.code == "too_large.seconds"
    write_wav(path, tone(0.3))
    with pytest.raises(Fault) as caught:
        decode_audio(path)
    assert caught.value.code == "audio.too_short"
    video = tmp_path / "silent.mp4"
    ffmpeg("-f", "lavfi", "-i", "testsrc=d=1:s=64x64:r=10", str(video))
    with pytest.raises(Fault) as caught:
        decode_audio(video)
    assert caught.value.code == "audio.no_stream"


def test_one_loudness_for_quiet_and_loud() -> None:
    quiet, loud = (mix_tracks([tone() * gain]).tracks[0] for gain in (0.1, 1.0))
    assert np.abs(quiet - loud).max() < 1e-3
    assert np.array_equal(mix_tracks([tone() * 0.1], normalise=False).tracks[0], tone() * np.float32(0.1))
    silence = mix_tracks([np.zeros(16_000, np.float32)])
    assert not silence.mixed.any()


def test_two_speakers_at_once_and_in_turn() -> None:
    a, b = tone(1.0), tone(0.5, frequency=200)
    both = mix_tracks([a, b], "para", normalise=False)
    assert [len(t) for t in (*both.tracks, both.mixed)] == [16_000] * 3  # the shorter one falls silent
    assert not both.tracks[1][8000:].any()
    turns = mix_tracks([a, b], "add", normalise=False)
    assert len(turns.mixed) == 24_000
    assert not turns.tracks[0][16_000:].any()
    assert not turns.tracks[1][:16_000].any()
    one = mix_tracks([None, b], "para", normalise=False)
    assert not one.tracks[0].any()
    assert np.array_equal(one.mixed, b)


@pytest.mark.parametrize(
    ("tracks", "code"),
    [([None, None], "persons.all_silent"), ([None], "persons.all_silent"), ([], "persons.count")],
)
def test_speakers_that_do_not_speak(tracks: list[None], code: str) -> None:
    with pytest.raises(Fault) as caught:
        mix_tracks(tracks)
    assert caught.value.code == code


def test_the_built_in_sound() -> None:
    samples = decode_audio(AUDIO)
    assert 3.9 < len(samples) / 16_000 < 4.1  # more than the 81 frames of a clip
    assert samples.std() > 0.02


def test_the_built_in_inputs_are_what_the_script_makes(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[2] / "tools" / "make_defaults.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, timeout=120)
    made = decode_audio(tmp_path / "speech.flac")
    assert np.abs(made - decode_audio(AUDIO)).max() < 2e-4
    assert (tmp_path / "face.png").stat().st_size > 1000


def test_a_small_file_of_much_silence_needs_little_memory(
    tmp_path: Path, ffmpeg: Callable[..., None]
) -> None:
    """Eight channels at 384 kHz: tens of kilobytes of FLAC, 740 MB of samples."""
    bomb = tmp_path / "bomb.flac"
    ffmpeg("-f", "lavfi", "-i", "anullsrc=r=384000:cl=7.1:d=60", str(bomb))
    assert bomb.stat().st_size < 100_000
    code = (
        "import resource, sys; from pathlib import Path; from multitalk_runtime.audio import decode_audio\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "decode_audio(Path(sys.argv[1]), max_seconds=1e9); before = peak()\n"
        "assert len(decode_audio(Path(sys.argv[2]))) == 60 * 16_000; print(peak() - before)"
    )
    command = [sys.executable, "-c", code, str(AUDIO), str(bomb)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) < 100, "megabytes"


def test_pieces_are_resampled_as_the_whole_is(tmp_path: Path) -> None:
    import soxr

    path = tmp_path / "long.wav"
    noise = (0.2 * np.random.default_rng(0).standard_normal(44_100 * 5)).astype(np.float32)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 44_100, 0, "NONE", ""))
        file.writeframes((noise.clip(-1, 1) * 32767).astype("<i2").tobytes())
    read = (noise.clip(-1, 1) * 32767).astype("<i2").astype(np.float32) / 32768
    assert np.array_equal(decode_audio(path), soxr.resample(read, 44_100, 16_000, quality="HQ"))
