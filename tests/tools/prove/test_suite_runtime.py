"""The suite's checks of the runtime, against this environment's own, whole and broken."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from suite_runner import Suite

from mtbuild.prove.smoke import SUITE

ROOT = Path(__file__).parents[3]


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return Suite(tmp_path)


def broken(suite: Suite, file: str, old: str, new: str) -> None:
    """A copy of `multitalk_runtime`, found before the real one, with one text in one file replaced."""
    package = suite.folder / "site/multitalk_runtime"
    shutil.copytree(ROOT / "multitalk_runtime", package, ignore=shutil.ignore_patterns("__pycache__"))
    text = (package / file).read_text()
    assert old in text, f"{file} does not hold {old!r}"
    (package / file).write_text(text.replace(old, new))


def failure(suite: Suite, check: str) -> dict[str, Any]:
    result = suite.one(check, runtime=True)
    assert result["status"] == "failed", result
    assert result["diagnosis"]
    assert result["fix"]
    return result


# --- imports.runtime ------------------------------------------------------------------------------------


def test_every_module_of_the_runtime_imports(suite: Suite) -> None:
    report = suite.run("imports.runtime", runtime=True)
    assert report["results"][0]["status"] == "passed", report["results"]
    assert report["facts"]["runtime.modules"] > 20
    assert report["facts"]["runtime.ffmpeg"]


def test_a_module_that_does_not_import_is_named_with_its_line(suite: Suite) -> None:
    broken(suite, "outputs.py", "import base64", "import base65")
    result = failure(suite, "imports.runtime")
    assert "modules of multitalk_runtime do not import" in result["message"]
    assert "No module named 'base65'" in result["detail"]
    assert "outputs.py" in result["detail"]


def test_a_public_name_that_is_not_there(suite: Suite) -> None:
    broken(suite, "workspace.py", '__all__ = ["Workspace"]', '__all__ = ["Workspace", "Playground"]')
    assert "has no attribute 'Playground'" in failure(suite, "imports.runtime")["message"]


def test_an_extra_that_is_missing(suite: Suite) -> None:
    suite.module("runpod", "raise ImportError('no runpod in this image')")
    result = failure(suite, "imports.runtime")
    assert result["message"].startswith("what the handler needs does not import: runpod")
    assert "serverless" in result["fix"]


def test_an_image_without_the_runtime(suite: Suite) -> None:
    """Required where it should be there; elsewhere nothing is asked."""
    for check in ("imports.runtime", "handler.inputs", "generate"):
        code = (SUITE / f"checks/{check.replace('.', '_')}.py").read_text()
        # nothing can hide an installed package from find_spec but its name
        suite.add(
            check.replace(".", "_"), code.replace('find_spec("multitalk_runtime")', 'find_spec("no_such")')
        )
        assert failure(suite, check)["message"] == "the image holds no package `multitalk_runtime`"
        assert suite.one(check, runtime=False)["status"] == "skipped"


# --- handler.inputs -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_kind_of_input_arrives_and_bad_ones_are_refused(suite: Suite) -> None:
    report = suite.run("handler.inputs", runtime=True)
    assert report["results"][0]["status"] == "passed", report["results"]
    assert set(report["facts"]["handler_inputs.seconds"]) >= {
        "default",
        "url",
        "s3",
        "base64",
        "volume",
        "v7x",
    }
    assert len(report["facts"]["handler_inputs.refused"]) >= 15


def test_v71_default_inputs_that_are_not_there(suite: Suite) -> None:
    broken(suite, "defaults/__init__.py", "speech.flac", "speech.ogg")
    result = failure(suite, "handler.inputs")
    assert result["message"].startswith("the handler's modules: FileNotFoundError")
    assert "V71" in result["diagnosis"]


def test_v71_a_handler_that_looks_for_them_in_the_wrong_place(suite: Suite) -> None:
    broken(suite, "inputs.py", "image = IMAGE", 'image = IMAGE.with_name("example.png")')
    result = failure(suite, "handler.inputs")
    assert result["message"].startswith("default inputs: internal: ")
    assert "FileNotFoundError" in result["message"], "the log says what the reply must not"
    assert "example.png" in result["message"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("fetch.py", "return address.is_global and not (", "return True or (", "a private address: "),
        (
            "sniff.py",
            "return None\n\n\ndef audio_kind",
            'return "PNG"\n\n\ndef audio_kind',
            "an image that is text: ",
        ),
        ("inputs.py", "if len(data) > limit:", "if False:", "an image of too many bytes: "),
        (
            "workspace.py",
            "shutil.rmtree(self._folder",
            "(lambda *_, **__: None)(self._folder",
            "default inputs: the job left",
        ),
    ],
)
def test_a_guard_that_is_gone_is_noticed(suite: Suite, file: str, old: str, new: str, message: str) -> None:
    broken(suite, file, old, new)
    assert failure(suite, "handler.inputs")["message"].startswith(message)


# --- generate -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_video_is_made_and_kept(suite: Suite) -> None:
    report = suite.run("generate", runtime=True, timeout_s=800)
    assert report["results"][0]["status"] == "passed", report["results"]
    facts = report["facts"]
    assert facts["generate.video"]["fps"] == "25/1"
    assert facts["generate.video"]["frames"] == 21
    names = {"import_s", "tiny_s", "verify_s", "load_s", "job_s", "comparisons_s"}
    assert set(facts["generate.seconds"]) == names
    assert facts["generate.differences"]["other_audio"] > 0.01
    assert facts["generate.differences"]["zeroed_audio_to_audio_free"] < 1e-4
    assert facts["generate.differences"]["streaming_clips"] == 2
    assert (suite.folder / "out/generate.mp4").read_bytes()[4:8] == b"ftyp"
    assert (suite.folder / "out/generate.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_model_that_does_not_hear_is_noticed(suite: Suite) -> None:
    old = "return speech_embedding(self.speech_model, samples, self.device)"
    broken(suite, "generator.py", old, old + " * 0")
    result = suite.run("generate", runtime=True, timeout_s=800)["results"][0]
    assert result["status"] == "failed"
    assert result["message"].startswith("other audio: frames differ by only 0")
    assert result["diagnosis"] == "the sound does not reach the frames"


@pytest.fixture
def generation(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The suite's module, imported here."""
    monkeypatch.syspath_prepend(str(SUITE))
    sys.modules.pop("generation", None)
    import generation

    return generation


def video(*, frames: int = 9) -> Any:
    import torch

    return torch.rand(3, frames, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_frames_that_are_fine(generation: Any) -> None:
    seen = generation.look_at_frames(video(), 9)
    assert seen["motion"] > 0.1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda frames: frames.fill_(float("nan")), "not finite"),
        (lambda frames: frames.fill_(0.2), "of one colour"),
        (lambda frames: frames[:, :1].repeat(1, 9, 1, 1), "don't change over time"),
        (lambda frames: frames[:, :8], "8 frames instead of 9"),
    ],
)
def test_frames_that_are_not(generation: Any, spoil: Any, message: str) -> None:
    with pytest.raises(generation.Wrong, match=message):
        generation.look_at_frames(spoil(video()), 9)


def ffmpeg(*words: str | Path) -> None:
    subprocess.run(["ffmpeg", "-v", "error", "-y", *map(str, words)], check=True, timeout=60)


PICTURE = ("-f", "lavfi", "-i", "testsrc=size=48x32:rate=25:duration=0.36")
SIZE = {"width": 48, "height": 32}


def test_a_file_with_picture_and_sound(generation: Any, tmp_path: Path) -> None:
    ffmpeg(*PICTURE, "-f", "lavfi", "-i", "sine=duration=0.36", tmp_path / "v.mp4")
    seen = generation.look_at_file(tmp_path / "v.mp4", SIZE, 9)
    assert seen["frames"] == 9


@pytest.mark.parametrize(
    ("sound", "message"),
    [
        ((), "the streams video"),
        (("-f", "lavfi", "-i", "anullsrc=d=0.36"), "silent"),
        (("-f", "lavfi", "-i", "sine=duration=2"), "audio_seconds of the video: 2"),
        (("-f", "lavfi", "-i", "sine=duration=0.36", "-r", "30"), "fps is 30/1"),
    ],
)
def test_a_file_that_is_not_right(
    generation: Any, tmp_path: Path, sound: tuple[str, ...], message: str
) -> None:
    ffmpeg(*PICTURE, *sound, tmp_path / "v.mp4")
    with pytest.raises(generation.Wrong, match=message):
        generation.look_at_file(tmp_path / "v.mp4", SIZE, 9)


def test_the_contact_sheet_shows_the_whole_video(generation: Any, tmp_path: Path) -> None:
    from PIL import Image

    generation.contact_sheet(video(frames=30), tmp_path / "s.png")
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.size == (6 * 48 * 3, 2 * 32 * 3)


# --- generate.weights -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_weights_that_are_given_make_a_video_with_its_measures(suite: Suite) -> None:
    """A tiny model's folder in the place of real checkpoints: found, verified, loaded, used, only read."""
    weights = suite.folder / "weights"
    subprocess.run([sys.executable, "-m", "multitalk_runtime.tiny", weights], check=True, timeout=200)
    before = sorted((path, path.stat().st_mtime_ns) for path in weights.rglob("*"))
    report = suite.run("generate.weights", runtime=True, weights=str(weights), timeout_s=500)
    assert report["results"][0]["status"] == "passed", report["results"]
    facts = {name.removeprefix("generate_weights."): value for name, value in report["facts"].items()}
    assert facts["video"]["frames"] == facts["frames"] == 9
    assert facts["step_s"] == pytest.approx(facts["phases"]["denoise"] / facts["steps"], abs=1e-3)
    assert facts["peak_bytes"] > 1 << 20
    assert set(facts["seconds"]) == {"import_s", "verify_s", "load_s", "job_s"}, "no tiny model was made"
    assert (suite.folder / "out/generate_weights.mp4").read_bytes()[4:8] == b"ftyp"
    assert (suite.folder / "out/generate_weights.png").read_bytes().startswith(b"\x89PNG")
    assert sorted((path, path.stat().st_mtime_ns) for path in weights.rglob("*")) == before


@pytest.mark.slow
def test_weights_that_do_not_verify_are_named(suite: Suite) -> None:
    weights = suite.folder / "weights"
    subprocess.run([sys.executable, "-m", "multitalk_runtime.tiny", weights], check=True, timeout=200)
    (lost,) = weights.rglob("Wan2.1_VAE.pth")
    lost.unlink()
    result = suite.one("generate.weights", runtime=True, weights=str(weights))
    assert result["status"] == "failed"
    assert "mtmodels verify refuses the weights" in result["message"]
    assert "Wan2.1_VAE.pth" in result["message"]


def test_no_weights_is_no_pass(suite: Suite) -> None:
    assert suite.one("generate.weights", runtime=True)["status"] == "failed"
