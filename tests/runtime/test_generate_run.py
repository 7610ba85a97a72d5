"""What a run of the command line shows and leaves: one bar, one encoder, one file."""

from __future__ import annotations

import io
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from multitalk_runtime.clock import Progress
from multitalk_runtime.defaults import AUDIO, IMAGE
from multitalk_runtime.generate import Bar, main, output_path
from multitalk_runtime.generate_cli import parser
from multitalk_runtime.request import Request
from multitalk_runtime.video import VideoWriter

if TYPE_CHECKING:
    from multitalk_runtime.generator import Generator


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """In place of stderr. Not a fixture: pytest sets stderr anew when the test begins."""
    shown = Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    monkeypatch.setenv("COLUMNS", "120")
    return shown


def test_the_bar_has_stage_step_time_left_and_peak_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    with Bar() as bar:
        bar.show(Progress(stage="text", peak_bytes=1 << 30))
        bar.show(Progress(stage="denoise", step=3, total=40, seconds_left=3725.4, peak_bytes=3 << 30))
    lines = screen.getvalue().split("\r")
    text = next(line for line in lines if line.startswith("text"))
    denoise = next(line for line in lines if line.startswith("denoise"))
    assert "peak 1.0 GiB" in text
    assert "left" not in text
    assert re.search(r"denoise +8% \|.*\| 3/40 steps, 1:02:05 left, peak 3\.0 GiB", denoise)


def test_one_encoder_one_bar_one_file(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs, temporary, calls = tmp_path / "bin", tmp_path / "tmp", tmp_path / "calls"
    for folder in (programs, temporary):
        folder.mkdir()
    real = shutil.which("ffmpeg")
    (programs / "ffmpeg").write_text(f'#!/bin/sh\necho "$@" >> {calls}\nexec {real} "$@"\n')
    (programs / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "bin"))  # torch makes it when it likes
    screen = terminal(monkeypatch)
    job = tmp_path / "job.json"
    job.write_text(
        json.dumps({"prompt": "x", "cond_image": str(IMAGE), "cond_audio": {"person1": str(AUDIO)}})
    )
    arguments = ["--models", str(tiny_models), "--input_json", str(job), "--device", "cpu", "--mode"]
    arguments += ["streaming", "--frame_num", "9", "--motion_frame", "5", "--max_frames", "17"]
    assert main([*arguments, "--sample_steps", "1", "--save_file", str(tmp_path / "v")]) == 0
    encodes = [line for line in calls.read_text().splitlines() if " -c:v " in line or " -c:a aac" in line]
    assert len(encodes) == 1, encodes
    assert "-i pipe:0" in encodes[0]
    assert re.search(r"-i file:\S+/sound\.wav", encodes[0])
    assert list(temporary.iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"bin", "tmp", "calls", "job.json", "v.mp4"}
    shown = screen.getvalue()
    for stage in ("loading", "text", "encode", "denoise", "decode", "video"):
        assert f"\r{stage}" in shown, stage
    assert re.search(r"denoise .*[1-3]/3 steps, \d+:\d\d left, peak \d+\.\d GiB", shown)


def test_frames_go_to_the_encoder_as_they_come(
    tiny_generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Any] = []
    inner = VideoWriter.write

    def write(self: VideoWriter, frames: torch.Tensor) -> None:
        inner(self, frames)
        events.append("frames")

    monkeypatch.setattr(VideoWriter, "write", write)
    voice = (0.3 * np.sin(np.arange(16_000) / 9)).astype(np.float32)
    request = Request(
        prompt="x", image=IMAGE, tracks=(voice,), output=tmp_path / "v.mp4", mode="streaming", frame_num=9,
        motion_frame=5, sample_steps=1, max_frames=17,
    )  # fmt: skip
    tiny_generator.run(request, progress=lambda p: events.append((p.stage, p.step)))
    assert events.index("frames") < events.index(("denoise", 2)), "the first clip waited for the second"


def test_the_name_of_a_video_without_a_name() -> None:
    flags = parser().parse_args(["--ulysses_size", "2"])
    name = output_path(flags, "Two people / one table: " + "a" * 80).name
    words = "Two_people_one_table_" + "a" * 29
    assert re.fullmatch(rf"multitalk-14B_multitalk-480_2_1_{words}_\d{{8}}_\d{{6}}\.mp4", name)
    assert output_path(flags, "../../etc").parent == Path()
    long = output_path(flags, "说" * 400).name
    assert len(long.encode()) < 255, "a file name has 255 bytes"
    assert output_path(parser().parse_args(["--save_file", "a/b"]), "x") == Path("a/b.mp4")
