"""The generator on the tiny model: what has to show in the frames does, and failures are faults."""

from __future__ import annotations

import json
import subprocess
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from multitalk_runtime import generator as generator_module
from multitalk_runtime.clock import Clock, Progress
from multitalk_runtime.defaults import AUDIO, IMAGE
from multitalk_runtime.errors import Fault
from multitalk_runtime.faults import to_fault
from multitalk_runtime.generator import Generator
from multitalk_runtime.job import parse_job
from multitalk_runtime.model_dirs import ModelDirs
from multitalk_runtime.request import Request
from wan.tensor_files import CheckpointError

if TYPE_CHECKING:
    from multitalk_runtime.generator import Result

FRAMES = 9


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def voice(frequency: float, seconds: float = 0.5) -> np.ndarray:
    t = np.arange(int(seconds * 16_000)) / 16_000
    return (0.3 * np.sin(2 * np.pi * frequency * t) * np.sin(2 * np.pi * 3 * t)).astype(np.float32)


def ask(output: Path, **changes: Any) -> Request:
    values: dict[str, Any] = {
        "prompt": "a person talks",
        "image": IMAGE,
        "tracks": (voice(220),),
        "output": output,
        "frame_num": FRAMES,
        "motion_frame": 5,
        "sample_steps": 2,
        "seed": 1,
    }
    return Request(**{**values, **changes})


@pytest.fixture
def make(tiny_generator: Generator, tmp_path: Path) -> Any:
    def run(**changes: Any) -> Result:
        return tiny_generator.run(ask(tmp_path / "v.mp4", **changes))

    return run


def pictures(path: Path) -> np.ndarray:
    command = ["ffmpeg", "-v", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1"]
    raw = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, 80, 80, 3).astype(int)


def test_a_video_with_sound(make: Any) -> None:
    result = make()
    assert (result.frames, result.height, result.width) == (FRAMES, 80, 80)
    command = ["ffprobe", "-v", "error", "-show_streams", "-show_format", "-of", "json", str(result.video)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)
    kinds = {s["codec_type"]: s for s in found["streams"]}
    assert kinds["video"]["nb_frames"] == str(FRAMES)
    assert kinds["video"]["r_frame_rate"] == "25/1"
    assert kinds["audio"]["codec_name"] == "aac"
    assert float(found["format"]["duration"]) == pytest.approx(FRAMES / 25, abs=0.07)
    assert json.loads(found["format"]["tags"]["comment"])["seed"] == 1
    seen = pictures(result.video)
    assert seen.std() > 10
    assert np.abs(seen[1:] - seen[:-1]).mean() > 1  # it moves
    assert set(result.phases) == {"image", "audio", "text", "encode", "denoise", "decode", "video"}
    assert result.seconds == pytest.approx(sum(result.phases.values()), abs=0.5)
    assert 0 < result.first_frame_s <= result.seconds
    assert result.peak_bytes > 1e8
    assert "video" not in result.to_json()
    json.dumps(result.to_json())


def test_the_seed_decides(make: Any) -> None:
    first, again, other = make(), make(), make(seed=2)
    assert first.sha256 == again.sha256 != other.sha256
    drawn = make(seed=-1)
    assert 0 <= drawn.seed < 100_000_000
    assert make(seed=drawn.seed).sha256 == drawn.sha256


def test_the_audio_shows(make: Any, tiny_generator: Generator) -> None:
    speech = make()
    assert make(tracks=(voice(130),)).sha256 != speech.sha256
    heard = tiny_generator.embed(voice(220))
    assert heard.shape == (12, 12, 768)
    zeroed = make(speech=(torch.zeros_like(heard),))
    silent = make(tracks=(np.zeros(8000, np.float32),))
    assert len({speech.sha256, zeroed.sha256, silent.sha256}) == 3
    # Zeros are what the audio-free pass gets: no audio guidance can move them.
    assert make(speech=(torch.zeros_like(heard),), audio_guide_scale=0.0).sha256 == zeroed.sha256
    two_pass = make(text_guide_scale=1.0, audio_guide_scale=0.0)
    assert two_pass.sha256 == make(text_guide_scale=1.0, speech=(torch.zeros_like(heard),)).sha256


def test_prompt_and_guidance_show(make: Any) -> None:
    seen = [make(), make(prompt="another scene"), make(text_guide_scale=3.0), make(sample_shift=3.0),
            make(use_apg=True), make(color_correction_strength=0.0)]  # fmt: skip
    assert len({r.sha256 for r in seen}) == len(seen)


def test_two_speakers(make: Any) -> None:
    a, b = voice(220), voice(130)
    both, swapped = make(tracks=(a, b)), make(tracks=(b, a))
    boxes = {"person1": (100, 20, 500, 300), "person2": (100, 340, 500, 620)}
    boxed = make(tracks=(a, b), bbox=boxes)
    turned = make(tracks=(a, b), bbox={"person1": boxes["person2"], "person2": boxes["person1"]})
    mute = make(tracks=(a, None))
    assert len({r.sha256 for r in (both, swapped, boxed, turned, mute)}) == 5


def test_streaming_joins_clips(make: Any) -> None:
    result = make(mode="streaming", tracks=(voice(220, 0.72),))  # 18 frames
    assert (result.frames, result.clips) == (18, 4)
    assert len(pictures(result.video)) == 18
    short = make(mode="streaming", tracks=(voice(220, 0.72),), max_frames=14)
    assert short.frames == 14
    assert "0.56 s" in short.notes[0]
    # The first clip does not depend on what comes later.
    assert np.abs(pictures(result.video)[:FRAMES] - pictures(short.video)[:FRAMES]).mean() < 8


def test_files_as_tracks_and_the_image_by_exif(make: Any, tmp_path: Path) -> None:
    assert make(tracks=(AUDIO,)).frames == FRAMES
    wide = Image.open(IMAGE).convert("RGB").resize((600, 300))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    wide.save(tmp_path / "turned.jpg", exif=exif)
    result = make(image=tmp_path / "turned.jpg")
    assert result.height > result.width


def test_progress_and_time_left(tiny_generator: Generator, tmp_path: Path) -> None:
    seen: list[Progress] = []
    tiny_generator.run(
        ask(tmp_path / "v.mp4", mode="streaming", tracks=(voice(220, 0.6),)), progress=seen.append
    )
    assert [p.stage for p in seen][:3] == ["image", "audio", "text"]
    assert seen[-1].stage == "video"
    steps = [p.step for p in seen if p.stage == "denoise"]
    assert steps == sorted(steps)
    assert steps[-1] == max(p.total for p in seen) == 6
    assert all(p.peak_bytes > 0 for p in seen)
    left = [p.seconds_left for p in seen if p.stage == "denoise" and p.seconds_left is not None]
    assert left
    assert left[-1] == 0


def test_time_left_is_what_the_steps_say() -> None:
    times = iter([0.0, 0.0, 10.0, 12.0, 12.0, 15.0])
    seen: list[Progress] = []
    clock = Clock(callback=seen.append, now=lambda: next(times))
    clock.stage("text")
    clock.report(0, 4, "denoise")
    clock.report(1, 4, "denoise")
    assert [p.seconds_left for p in seen] == [None, None, 6.0]
    assert clock.end()["text"] == 10.0


def test_cancelling_leaves_nothing_and_the_next_job_is_right(
    tiny_generator: Generator, make: Any, tmp_path: Path
) -> None:
    before = make().sha256
    calls = 0

    def cancelled() -> bool:
        nonlocal calls
        calls += 1
        return calls > 3

    with pytest.raises(Fault) as caught:
        tiny_generator.run(ask(tmp_path / "cut.mp4"), cancelled=cancelled)
    assert caught.value.code == "cancelled.by_caller"
    assert not (tmp_path / "cut.mp4").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["v.mp4"]
    assert make().sha256 == before


def test_a_failing_callback_spoils_nothing(tiny_generator: Generator, make: Any, tmp_path: Path) -> None:
    def broken(progress: Progress) -> None:
        if progress.stage == "decode":
            msg = "the network is gone"
            raise ConnectionError(msg)

    with pytest.raises(ConnectionError):
        tiny_generator.run(ask(tmp_path / "x.mp4"), progress=broken)
    assert not list(tmp_path.iterdir())
    assert make().frames == FRAMES


def test_runs_wait_for_each_other(tiny_generator: Generator, tmp_path: Path) -> None:
    want = tiny_generator.run(ask(tmp_path / "a.mp4")).sha256
    got: list[str] = []
    threads = [
        threading.Thread(target=lambda i=i: got.append(tiny_generator.run(ask(tmp_path / f"{i}.mp4")).sha256))
        for i in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert got == [want] * 3


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"tracks": (voice(220), voice(130)), "bbox": {"person1": (0, 0, 10, 10)}}, "persons.bbox"),
        (
            {
                "tracks": (voice(220), voice(130)),
                "bbox": {"person1": (0, 0, 900, 300), "person2": (0, 400, 600, 600)},
            },
            "persons.bbox",
        ),
        (
            {
                "tracks": (voice(220), voice(130)),
                "bbox": {"person1": (0, 0, 400, 400), "person2": (100, 100, 600, 600)},
            },
            "persons.overlap",
        ),
        (
            {
                "tracks": (voice(220), voice(130)),
                "bbox": {"person1": (1, 1, 3, 3), "person2": (100, 100, 600, 600)},
            },
            "persons.empty_mask",
        ),
        ({"bbox": {"person1": (0, 0, 10, 10)}}, "persons.bbox"),
        ({"tracks": (None,)}, "persons.all_silent"),
        ({"tracks": (voice(220, 0.3),)}, "audio.too_short"),
        ({"image": AUDIO}, "image.not_image"),
        ({"tracks": (IMAGE,)}, "audio.not_audio"),
        ({"image": Path("no-such.png")}, "image.not_image"),
    ],
)
def test_bad_input_is_a_fault_before_the_model_runs(
    make: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_generator: Generator,
    changes: Any,
    code: str,
) -> None:
    monkeypatch.setattr(tiny_generator.pipeline, "generate", lambda *_, **__: pytest.fail("the model ran"))
    with pytest.raises(Fault) as caught:
        make(**changes)
    assert caught.value.code == code
    assert caught.value.hint
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"frame_num": 10}, "job.frame_num"),
        ({"frame_num": 1}, "job.frame_num"),
        ({"mode": "streaming", "motion_frame": 9}, "job.conflict"),
        ({"size": "720*1280"}, "job.size"),
        ({"mode": "film"}, "job.invalid"),
        ({"tracks": ()}, "persons.count"),
    ],
)
def test_requests_that_cannot_be(tmp_path: Path, changes: Any, code: str) -> None:
    with pytest.raises(Fault) as caught:
        ask(tmp_path / "v.mp4", **changes)
    assert caught.value.code == code


def test_requests_from_jobs(tmp_path: Path) -> None:
    paths = {"image": IMAGE, "tracks": (AUDIO,), "output": tmp_path / "v.mp4"}
    plain = Request.from_job(parse_job({"prompt": "x"})[0], **paths)
    assert (plain.steps, plain.shift, plain.text_guide_scale, plain.passes) == (40, 7.0, 5.0, 3)
    fast = Request.from_job(parse_job({"prompt": "x", "turbo": True, "sample_steps": 4})[0], **paths)
    assert (fast.steps, fast.shift, fast.text_guide_scale, fast.passes) == (4, 2.0, 1.0, 2)
    large = Request.from_job(parse_job({"prompt": "x", "size": "multitalk-720"})[0], **paths)
    assert large.shift == 11.0


def test_what_the_libraries_raise() -> None:
    codes = {
        "cuda.out_of_memory": torch.cuda.OutOfMemoryError("CUDA out of memory"),
        "cuda.error": RuntimeError("CUDA error: an illegal memory access was encountered"),
        "model.memory": MemoryError(),
        "model.missing": CheckpointError("/secret/place/Wan2.1_VAE.pth", "no such file", "x"),
        "model.invalid": CheckpointError("/secret/place/Wan2.1_VAE.pth", "the file is empty", "x"),
        "job.invalid": ValueError("frame_num is odd"),
    }
    for code, error in codes.items():
        fault = to_fault(error)
        assert fault is not None
        assert fault.code == code
        assert "/secret" not in json.dumps(fault.to_json())
    assert to_fault(RuntimeError("something else")) is None
    assert to_fault(KeyError("x")) is None


def test_out_of_memory_in_the_model_is_told(
    make: Any, tiny_generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        msg = "CUDA out of memory. Tried to allocate 2 GiB"
        raise torch.cuda.OutOfMemoryError(msg)

    with monkeypatch.context() as patch:
        patch.setattr(tiny_generator.pipeline, "generate", full)
        with pytest.raises(Fault) as caught:
            make()
    assert caught.value.code == "cuda.out_of_memory"
    assert make().frames == FRAMES


def test_loading_says_what_is_missing(tiny_models: Path, tmp_path: Path) -> None:
    dirs = ModelDirs.under(tiny_models)
    with pytest.raises(Fault) as caught:
        Generator.load(replace(dirs, wan=tmp_path), device="cpu")
    assert caught.value.code == "model.missing"
    with pytest.raises(Fault) as caught:
        Generator.load(replace(dirs, multitalk=dirs.wan), device="cpu")
    assert caught.value.code == "model.invalid"
    with pytest.raises(Fault, match="unknown attention backend"):
        Generator.load(dirs, device="cpu", attention="fast")


def test_the_sound_is_as_long_as_the_video() -> None:
    assert len(generator_module.padded(np.ones(100_000, np.float32), 9)) == 9 * 640
    short = generator_module.padded(np.ones(100, np.float32), 9)
    assert (len(short), short.sum()) == (9 * 640, 100)
