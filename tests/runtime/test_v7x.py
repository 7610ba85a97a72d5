"""Jobs and variables of the V7x images through the handler: what the model is asked, what the reply says."""

from __future__ import annotations

import asyncio
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from runtime_helpers import as_base64, image_bytes, wav_bytes

from multitalk_runtime import settings as settings_module
from multitalk_runtime.core import Worker
from multitalk_runtime.generator import Result
from multitalk_runtime.handler import make_handler
from multitalk_runtime.model_dirs import ModelDirs
from multitalk_runtime.settings import Settings
from multitalk_runtime.storage import Storage

if TYPE_CHECKING:
    from multitalk_runtime.request import Request

WAV, PNG = wav_bytes(), image_bytes()


class Recorder:
    """A generator that keeps what it was asked for, files read."""

    def run(self, request: Request, **_: Any) -> Result:
        self.request = request
        self.image = request.image.read_bytes()
        self.tracks = [t.read_bytes() if isinstance(t, Path) else t for t in request.tracks]
        request.output.write_bytes(b"video")
        return Result(
            video=request.output, frames=5, height=8, width=8, seed=1, steps=1, clips=1, seconds=0.1,
            first_frame_s=0.1, phases={}, peak_bytes=1, device="cpu", attention="sdpa", sha256="0",
        )  # fmt: skip


@pytest.fixture
def old(s3: Any, s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The variables of the old images, a bucket and a volume with a voice and a face."""
    monkeypatch.setenv("AWS_REGION", "eu-west-3")
    monkeypatch.setenv("AWS_S3_BUCKET_NAME", "media")
    monkeypatch.setenv("BUCKET_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("MODEL_PATH", "/runpod-volume/models")
    monkeypatch.setenv("MT_VOLUMES", str(tmp_path / "volume"))
    (tmp_path / "volume").mkdir()
    for name, content in (("a.wav", WAV), ("a.png", PNG)):
        (tmp_path / "volume" / name).write_bytes(content)
        s3.put_object(Bucket="media", Key=f"in/{name}", Body=content)
    return tmp_path


def run(job: dict[str, Any]) -> tuple[Recorder, dict[str, Any]]:
    settings = Settings.from_environment()
    recorder = Recorder()
    worker = Worker(settings=settings, generator=recorder, storage=Storage(settings))
    return recorder, asyncio.run(make_handler(worker)({"id": "j", "input": job}))  # type: ignore[arg-type]


SOUND = [
    {"audio_s3_key": "in/a.wav"},
    {"audio_file": "a.wav"},
    {"audio_file": as_base64(WAV)["base64"]},
    {"audio_1": "a.wav"},
    {"audio_1": as_base64(WAV)["base64"]},
]
FACE = [
    {"image_s3_key": "in/a.png"},
    {"image_file": "a.png"},
    {"image_file": as_base64(PNG)["base64"]},
    {"condition_image": "a.png"},
    {"condition_image": as_base64(PNG)["base64"]},
]


@pytest.mark.parametrize("job", [*SOUND, *FACE], ids=lambda job: str(job)[:40])
def test_files(old: Path, job: dict[str, str]) -> None:
    recorder, reply = run(job)
    assert reply["status"] == "completed", reply
    if job in SOUND:
        assert recorder.tracks == [WAV]
    else:
        assert recorder.image == PNG
    (note,) = reply["deprecations"]
    assert note == {"key": next(iter(job)), "use": "audio.person1" if job in SOUND else "image"}


def test_prompt_and_steps(old: Path) -> None:
    recorder, reply = run({"prompt": "A man speaks.", "sampling_steps": 12})
    assert (recorder.request.prompt, recorder.request.steps) == ("A man speaks.", 12)
    assert reply["deprecations"] == [{"key": "sampling_steps", "use": "sample_steps"}]


def test_turbo_works_with_and_without_a_lora(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, reply = run({"turbo": True})
    assert reply["status"] == "completed", reply
    assert (recorder.request.quality, recorder.request.steps) == ("exact", 40)
    (note,) = reply["deprecations"]
    assert note["key"] == "turbo"
    assert "no LoRA" in note["use"]
    monkeypatch.setenv("MT_LORA", "/l/fast.safetensors:1.0")
    recorder, reply = run({"turbo": True})
    assert (recorder.request.quality, recorder.request.steps, recorder.request.passes) == ("turbo", 8, 2)
    assert reply["deprecations"] == [{"key": "turbo", "use": "quality"}]


def test_output_format(old: Path) -> None:
    _, reply = run({"output_format": "s3"})
    with urllib.request.urlopen(reply["video_url"], timeout=10) as answer:
        assert answer.read() == b"video"
    assert "eu-west-3" in reply["video_url"], "AWS_REGION signs"
    assert reply["s3"]["bucket"] == "media"
    assert reply["deprecations"] == [{"key": "output_format", "use": "output.format"}]
    _, reply = run({"output_format": "base64"})
    assert reply["video_base64"]


def test_the_health_check(old: Path) -> None:
    recorder, reply = run({"test": "health_check"})
    assert reply["health"]["healthy"] is True
    assert reply["deprecations"][0]["key"] == "test"
    assert not hasattr(recorder, "request")


@pytest.mark.parametrize(
    ("variable", "code"),
    [
        ("AWS_ACCESS_KEY_ID", "storage.credentials"),
        ("AWS_SECRET_ACCESS_KEY", "storage.credentials"),
        ("AWS_S3_BUCKET_NAME", "forbidden.bucket"),
        ("BUCKET_ENDPOINT_URL", "storage.unavailable"),
    ],
)
def test_every_variable_counts(old: Path, monkeypatch: pytest.MonkeyPatch, variable: str, code: str) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(old / "none"))
    if variable == "BUCKET_ENDPOINT_URL":
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nothing listens there
    else:
        monkeypatch.delenv(variable)
    _, reply = run({"audio_s3_key": "in/a.wav"})
    assert f'"{code}"' in reply["error"]


def test_the_model_path(old: Path) -> None:
    found = ModelDirs.from_settings(Settings.from_environment())
    assert found.wan == Path("/runpod-volume/models/Wan2.1-I2V-14B-480P")


def test_without_a_model_path_the_network_volume_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings_module, "VOLUME_MODELS", tmp_path)
    assert Settings.from_environment({}).model_path == tmp_path
    assert Settings.from_environment({"MODEL_PATH": "/m"}).model_path == Path("/m")
    monkeypatch.setattr(settings_module, "VOLUME_MODELS", tmp_path / "none")
    assert Settings.from_environment({}).model_path == Path("/models")
