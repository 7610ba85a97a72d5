"""Frames to ffmpeg: what ffprobe sees, the same bytes for the same frames, nothing left after a failure."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from multitalk_runtime import video
from multitalk_runtime.audio import write_wav
from multitalk_runtime.errors import Fault
from multitalk_runtime.video import VideoWriter

if TYPE_CHECKING:
    from pathlib import Path


def clip(frames: int = 10, height: int = 64, width: int = 96, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(3, frames, height // 16, width // 16, generator=generator) * 2 - 1
    return small.repeat_interleave(16, 2).repeat_interleave(16, 3)


def probe(path: Path) -> dict:
    command = ["ffprobe", "-v", "error", "-show_streams", "-show_format", "-of", "json", str(path)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)


def decoded(path: Path, height: int, width: int) -> np.ndarray:
    command = ["ffmpeg", "-v", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1"]
    raw = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    path = tmp_path / "sound.wav"
    write_wav(path, np.sin(np.arange(20 * 640) / 20))
    return path


def write(path: Path, sound: Path | None, *clips: torch.Tensor, **options: object) -> VideoWriter:
    with VideoWriter(path, audio=sound, metadata={"seed": 7}, **options) as writer:
        for frames in clips:
            writer.write(frames)
    return writer


def test_what_ffprobe_sees(tmp_path: Path, sound: Path) -> None:
    writer = write(tmp_path / "v.mp4", sound, clip(12), clip(8, seed=1))
    assert writer.frames == 20
    found = probe(tmp_path / "v.mp4")
    picture, audio = (next(s for s in found["streams"] if s["codec_type"] == k) for k in ("video", "audio"))
    assert (picture["codec_name"], picture["width"], picture["height"]) == ("h264", 96, 64)
    assert (picture["r_frame_rate"], picture["nb_frames"]) == ("25/1", "20")
    assert (audio["codec_name"], audio["sample_rate"]) == ("aac", "16000")
    assert float(picture["duration"]) == pytest.approx(0.8)
    assert float(audio["duration"]) == pytest.approx(0.8, abs=0.07)  # AAC comes in blocks of 64 ms
    assert json.loads(found["format"]["tags"]["comment"]) == {"seed": 7}
    assert "encoder" not in found["format"]["tags"]
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["sound.wav", "v.mp4"]


def test_pictures_survive(tmp_path: Path) -> None:
    frames = clip(6)
    writer = write(tmp_path / "v.mp4", None, frames, crf=4)
    wanted = ((frames + 1) / 2 * 255).clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).numpy()
    got = decoded(tmp_path / "v.mp4", 64, 96)
    assert got.shape == wanted.shape
    assert np.abs(got.astype(int) - wanted.astype(int)).mean() < 6  # 4:2:0 and the codec
    assert writer.sha256 == hashlib.sha256(wanted.tobytes()).hexdigest()


def test_the_same_frames_give_the_same_bytes(tmp_path: Path, sound: Path) -> None:
    first = write(tmp_path / "a.mp4", sound, clip(20))
    again = write(tmp_path / "b.mp4", sound, clip(20)[:, :7], clip(20)[:, 7:])  # cut elsewhere
    other = write(tmp_path / "c.mp4", sound, clip(20, seed=3))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert first.sha256 == again.sha256 != other.sha256


def test_an_error_leaves_no_file(tmp_path: Path, sound: Path) -> None:
    with pytest.raises(RuntimeError, match="model"), VideoWriter(tmp_path / "v.mp4", audio=sound) as writer:
        writer.write(clip())
        msg = "the model failed"
        raise RuntimeError(msg)
    assert [p.name for p in tmp_path.iterdir()] == ["sound.wav"]


def test_an_old_video_stays_if_the_new_one_fails(tmp_path: Path) -> None:
    target = tmp_path / "v.mp4"
    target.write_bytes(b"old")
    with pytest.raises(Fault) as caught:
        write(target, tmp_path / "no-such.wav", *[clip(40, 256, 256)] * 5)
    assert caught.value.code == "output.encode"
    assert str(tmp_path) not in str(caught.value.to_json())
    assert "no-such.wav" in str(caught.value.__cause__)  # for the log
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["v.mp4"]


def test_a_killed_encoder_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(Fault) as caught, VideoWriter(tmp_path / "v.mp4") as writer:
        writer.write(clip())
        os.kill(writer._process.pid, 9)
        writer._process.wait()
        for _ in range(20):
            writer.write(clip(20, 256, 256) if writer.size is None else clip())
    assert caught.value.code == "output.encode"
    assert not list(tmp_path.iterdir())


def test_frames_that_are_not_finite(tmp_path: Path) -> None:
    frames = clip()
    frames[0, 3, 2, 2] = float("nan")
    with pytest.raises(Fault, match="not finite"):
        write(tmp_path / "v.mp4", None, clip(), frames)
    assert not list(tmp_path.iterdir())


def test_nothing_written_is_no_file(tmp_path: Path) -> None:
    write(tmp_path / "v.mp4", None)
    assert not list(tmp_path.iterdir())


def test_one_that_writes_nothing_leaves_anothers_file_alone(tmp_path: Path) -> None:
    """In a group of processes all have a writer, and one writes."""
    with VideoWriter(tmp_path / "v.mp4") as one:
        one.write(clip(3))
        with VideoWriter(tmp_path / "v.mp4"):
            time.sleep(0.2)  # the encoder has its file by now
        one.write(clip(2))
    assert [p.name for p in tmp_path.iterdir()] == ["v.mp4"]


def test_a_finished_file_that_is_gone_is_the_outputs_fault(tmp_path: Path) -> None:
    with (
        pytest.raises(Fault, match="could not take its name") as told,
        VideoWriter(tmp_path / "v.mp4") as one,
    ):
        one.write(clip(3))
        one.path = tmp_path / "gone" / "v.mp4"
    assert told.value.code == "output.encode"
    assert not list(tmp_path.iterdir())


def test_no_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(Fault, match="not installed"):
        write(tmp_path / "v.mp4", None, clip())
    assert video.FPS == 25
