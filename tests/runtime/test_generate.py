"""generate_multitalk: the original's flags and input JSON, checked before anything loads; its video."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from multitalk_runtime import generate as generate_module
from multitalk_runtime import generator as generator_module
from multitalk_runtime.audio import write_wav
from multitalk_runtime.clock import Progress
from multitalk_runtime.defaults import AUDIO, IMAGE
from multitalk_runtime.errors import Fault
from multitalk_runtime.estimate import estimate
from multitalk_runtime.generate import main
from multitalk_runtime.generate_cli import parser
from multitalk_runtime.input_json import Tts, read_input
from multitalk_runtime.published import CONFIG
from multitalk_runtime.request import Request
from multitalk_runtime.tts import parse_turns, speak
from wan.clips import plan_clips

if TYPE_CHECKING:
    from collections.abc import Callable

SMALL = ["--frame_num", "9", "--sample_steps", "2", "--device", "cpu"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., str]:
    """Write an input JSON with changes (None removes a key); its path."""

    def write(**changes: Any) -> str:
        content = {
            "prompt": "a person talks",
            "cond_image": str(IMAGE),
            "cond_audio": {"person1": str(AUDIO)},
        }
        content = {k: v for k, v in {**content, **changes}.items() if v is not None}
        path = tmp_path / "job.json"
        path.write_text(json.dumps(content))
        return str(path)

    return write


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        generator_module.Generator, "load", lambda *_, **__: pytest.fail("a model was loaded")
    )


# The original's flags and defaults, specification §2.1. Two differ on purpose: nothing is kept in
# audio_save_dir unless asked for, and every LoRA has the scale 1.2 that only the first one had. Guidance
# scales left open are the original's 5 and 4 unless --quality says otherwise (test_provenance.py).
OFFICIAL = {
    "task": "multitalk-14B", "size": "multitalk-480", "frame_num": 81, "ckpt_dir": None, "quant_dir": None,
    "wav2vec_dir": None, "lora_dir": None, "lora_scale": None, "offload_model": None, "ulysses_size": 1,
    "ring_size": 1, "t5_fsdp": False, "t5_cpu": False, "dit_fsdp": False, "save_file": None,
    "audio_save_dir": None, "base_seed": 42, "input_json": Path("examples.json"), "motion_frame": 25,
    "mode": "clip", "sample_steps": None, "sample_shift": None, "sample_text_guide_scale": None,
    "sample_audio_guide_scale": None, "num_persistent_param_in_dit": None, "audio_mode": "localfile",
    "use_teacache": False, "teacache_thresh": 0.2, "use_apg": False, "apg_momentum": -0.75,
    "apg_norm_threshold": 55, "color_correction_strength": 1.0, "quant": None,
}  # fmt: skip


def test_every_flag_of_the_original_with_its_default() -> None:
    flags = vars(parser().parse_args([]))
    assert {name: flags[name] for name in OFFICIAL} == OFFICIAL
    given = parser().parse_args(
        ["--lora_dir", "a", "b", "--lora_scale", "1", "0.5", "--offload_model", "False"]
    )
    assert (given.lora_dir, given.lora_scale, given.offload_model) == (
        [Path("a"), Path("b")],
        [1.0, 0.5],
        False,
    )


def test_help_has_examples_and_the_order_of_boxes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    shown = capsys.readouterr().out
    assert "[row_min, col_min, row_max, col_max]" in shown
    assert "examples:" in shown


def test_a_video(
    tiny_models: Path,
    job: Callable[..., str],
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    arguments = ["--models", str(tiny_models), "--input_json", job(), *SMALL, "--json"]
    assert main([*arguments, "--save_file", str(tmp_path / "out")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["video"] == str(tmp_path / "out.mp4")
    assert (result["frames"], result["seed"], result["device"]) == (9, 42, "cpu")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "job.json", "out.mp4"]
    assert not list(Path.cwd().iterdir())  # where the original left its temporary files
    wan = tiny_models / "Wan2.1-I2V-14B-480P"
    one_by_one = ["--ckpt_dir", str(wan), "--wav2vec_dir", str(tiny_models / "chinese-wav2vec2-base")]
    keep = ["--audio_save_dir", str(tmp_path / "kept"), "--save_file", str(tmp_path / "b.mp4")]
    assert main([*one_by_one, "--input_json", job(), *SMALL, "--json", *keep]) == 0
    assert json.loads(capsys.readouterr().out)["sha256"] == result["sha256"]
    assert sorted(p.name for p in (tmp_path / "kept" / "face").iterdir()) == ["1.pt", "sum.wav"]
    assert torch.load(tmp_path / "kept" / "face" / "1.pt", weights_only=True).shape[1:] == (12, 768)


def test_two_speakers_and_a_video_as_audio(
    tiny_models: Path, job: Callable[..., str], tmp_path: Path, ffmpeg: Callable[..., None], capsys: Any
) -> None:
    film = tmp_path / "b.mp4"
    ffmpeg("-i", str(AUDIO), "-f", "lavfi", "-i", "testsrc=d=1:s=64x64:r=10", "-shortest", str(film))
    boxes = {"person1": [100, 20, 500, 300], "person2": [100, 340, 500, 620]}
    path = job(cond_audio={"person1": str(AUDIO), "person2": str(film)}, audio_type="add", bbox=boxes)
    arguments = [
        "--models",
        str(tiny_models),
        "--input_json",
        path,
        *SMALL,
        "--save_file",
        str(tmp_path / "v"),
    ]
    assert main([*arguments, "--mode", "streaming", "--motion_frame", "5", "--max_frames", "13"]) == 0
    out = capsys.readouterr()
    assert "13 frames" in out.out
    assert "note: the speech has" in out.err


@pytest.mark.usefixtures("no_loading")
def test_dry_run_resolves_without_loading(tiny_models: Path, job: Callable[..., str], capsys: Any) -> None:
    path = job(cond_audio={"person1": str(AUDIO), "person2": "None"}, audio_type="para")
    arguments = ["--models", str(tiny_models), "--input_json", path, "--mode", "streaming", "--dry-run"]
    assert main([*arguments, "--json", "--device", "h100"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["bucket"] == [80, 80]
    assert (plan["persons"], plan["clips"], plan["frames"], plan["steps"], plan["passes"]) == (
        2,
        2,
        99,
        40,
        3,
    )
    assert plan["seconds"] > 0
    quantised = [*arguments, "--json", "--device", "h100", "--quant", "int8", "--quant_dir", str(tiny_models)]
    assert main(quantised) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["quality"], plan["overrides"], plan["lossy"]) == ("exact", ["weights"], ["weights"])
    assert main([*arguments, "--save_file", "x"]) == 0
    shown = capsys.readouterr().out
    for word in ("x.mp4: 80×80, 99 frames", "2 of 81 frames", "40 a clip, 3 passes", "memory"):
        assert word in shown


def test_the_estimate_of_the_real_model_is_what_was_counted(tmp_path: Path) -> None:
    request = Request(prompt="x", image=IMAGE, tracks=(AUDIO,), output=tmp_path / "v.mp4")
    plan = plan_clips(100, 81, 1, 81)
    found = estimate(request, plan, (640, 640), CONFIG, device="NVIDIA H200")
    assert found.tokens == 33_600
    forward = found.flops / 120
    assert forward == pytest.approx(1.894e15, rel=0.01)  # multitalk.md §3.13, docs/performance.md
    assert found.seconds == pytest.approx(120 * 3.2, rel=0.02)
    assert found.weights_bytes == pytest.approx(52e9, rel=0.02)
    assert estimate(request, plan, (640, 640), CONFIG, device="cpu").seconds is None


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--task", "i2v-14B"], "--task"),
        (["--size", "720*1280"], "--size"),
        (["--frame_num", "80"], "use 77 or 81"),
        (["--frame_num", "1"], "--frame_num"),
        (["--mode", "streaming", "--motion_frame", "24"], "use 21 or 25"),
        (["--mode", "streaming", "--frame_num", "25"], "--motion_frame"),
        (["--sample_steps", "0"], "--sample_steps"),
        (["--sample_shift", "-1"], "--sample_shift"),
        (["--sample_text_guide_scale", "nan"], "--sample_text_guide_scale"),
        (["--color_correction_strength", "2"], "--color_correction_strength"),
        (["--use_teacache", "--teacache_thresh", "0"], "--teacache_thresh"),
        (["--models", "/nowhere"], "no folder '/nowhere'"),
        (["--lora_dir", "/nowhere.safetensors"], "--lora_dir"),
        (["--lora_scale", "1", "2"], "2 scales for 0 LoRA files"),
        (["--quant", "int8"], "--quant_dir"),
        (["--num_persistent_param_in_dit", "-1"], "--num_persistent_param_in_dit"),
        (["--ulysses_size", "2"], "torchrun"),
        (["--ring_size", "2"], "--ring_size"),
        (["--t5_fsdp"], "--t5_fsdp"),
        (["--input_json", "/nowhere.json"], "no file '/nowhere.json'"),
    ],
)
def test_flags_are_checked_first(
    tiny_models: Path, job: Callable[..., str], capsys: Any, flags: list[str], words: str
) -> None:
    assert main(["--models", str(tiny_models), "--input_json", job(), *flags]) == 2
    shown = capsys.readouterr().err
    assert words in shown
    assert "fix: " in shown


@pytest.mark.usefixtures("no_loading")
def test_model_folders_are_needed(job: Callable[..., str], capsys: Any, tmp_path: Path) -> None:
    assert main(["--input_json", job()]) == 2
    assert "--ckpt_dir" in capsys.readouterr().err
    assert main(["--ckpt_dir", str(tmp_path), "--wav2vec_dir", str(tmp_path), "--input_json", job()]) == 1
    assert "config.json: no such file" in capsys.readouterr().err


TWO = {"person1": str(AUDIO), "person2": str(AUDIO)}


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": " "}, "prompt is empty"),
        ({"cond_image": "/nowhere.png"}, "cond_image: no file"),
        ({"cond_image": str(AUDIO)}, "not an image"),
        ({"cond_audio": {}}, "names nobody"),
        ({"cond_audio": {"person2": str(AUDIO)}}, "names person2"),
        ({"cond_audio": {"person1": "None"}}, "silent"),
        ({"cond_audio": {"person1": "None", "person2": "None"}, "audio_type": "para"}, "silent"),
        ({"cond_audio": {"person1": str(IMAGE)}}, "not an audio"),
        ({"cond_audio": {"person1": "/nowhere.wav"}}, "cond_audio.person1: no file"),
        ({"cond_audio": TWO}, "need audio_type"),
        ({"cond_audio": TWO, "audio_type": "both"}, "'both' is not a type"),
        ({"bbox": {"person1": [0, 0, 9, 9], "person2": [9, 9, 19, 19]}}, "there is one"),
        (
            {"cond_audio": TWO, "audio_type": "para", "bbox": {"person1": [0, 0, 9, 9]}},
            "must name person1 and",
        ),
        (
            {
                "cond_audio": TWO,
                "audio_type": "para",
                "bbox": {"person1": [9, 0, 5, 9], "person2": [0, 9, 5, 19]},
            },
            "rows 9…5",
        ),
        (
            {
                "cond_audio": TWO,
                "audio_type": "para",
                "bbox": {"person1": [0, 0, 5], "person2": [0, 9, 5, 19]},
            },
            "four whole numbers",
        ),
        (
            {
                "cond_audio": TWO,
                "audio_type": "para",
                "bbox": {"person1": [0, 0, 1, 5000], "person2": [2, 9, 5, 19]},
            },
            "does not lie in the image of 640 rows",
        ),
        ({"colour": "red"}, "no key 'colour'"),
    ],
)
def test_the_input_is_checked_before_loading(
    tiny_models: Path, job: Callable[..., str], capsys: Any, changes: dict[str, Any], words: str
) -> None:
    assert main(["--models", str(tiny_models), "--input_json", job(**changes), *SMALL]) == 2
    shown = capsys.readouterr().err
    assert words in shown
    assert "fix: " in shown


def test_a_file_that_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for content in ("{", "[1]"):
        path.write_text(content)
        with pytest.raises(Fault) as caught:
            read_input(path)
        assert caught.value.field == "--input_json"


def test_turns_of_a_conversation() -> None:
    assert parse_turns("Hello there.", 1) == [(1, "Hello there.")]
    assert parse_turns("(s1) Hi. (s2) Well,\nhello! (s1) Bye.", 2) == [
        (1, "Hi."),
        (2, "Well,\nhello!"),
        (1, "Bye."),
    ]
    for text in ("(s3) Hi", "Hm (s1) Hi", "(s1) "):
        with pytest.raises(Fault) as caught:
            parse_turns(text, 2)
        assert caught.value.field == "tts_audio.text"


def test_each_speaker_is_silent_while_the_other_speaks() -> None:
    def voice(text: str, file: Path) -> np.ndarray:
        return np.full(24_000 * len(text.split()), 0.1 if file.stem == "a" else 0.2, np.float32)

    speech = speak(Tts(text="(s1) one (s2) one two (s1) one", voices=(Path("a.pt"), Path("b.pt"))), voice)
    assert [len(t) for t in speech.tracks] == [64_000] * 2
    first, second = (np.abs(t) > 0.05 for t in speech.tracks)
    assert not (first & second).any()
    assert first[:15_000].all()
    assert second[17_000:47_000].all()
    assert first[49_000:].all()
    assert np.allclose(speech.mixed, speech.tracks[0] + speech.tracks[1])


def test_tts_without_its_package(
    tiny_models: Path, job: Callable[..., str], tmp_path: Path, capsys: Any
) -> None:
    voice = tmp_path / "v.pt"
    voice.touch()
    path = job(cond_audio={}, tts_audio={"text": "Hello", "human1_voice": str(voice)})
    arguments = ["--models", str(tiny_models), "--input_json", path, "--audio_mode", "tts", *SMALL]
    assert main(arguments) == 1
    shown = capsys.readouterr().err
    assert "kokoro" in shown or "Kokoro" in shown


def test_two_processes_make_one_video(tiny_models: Path, job: Callable[..., str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [
        "-m",
        "multitalk_runtime.generate",
        "--models",
        str(tiny_models),
        "--input_json",
        job(),
        *SMALL,
    ]
    command += ["--ulysses_size", "2", "--base_seed", "-1", "--json", "--save_file", str(tmp_path / "v")]
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    # A session of its own: whatever torchrun started ends with it, also after a failure.
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path.cwd(),
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err[-2000:]
    result = json.loads(out)  # one process speaks
    assert result["frames"] == 9
    assert 0 <= result["seed"] < 100_000_000
    assert len(list(tmp_path.glob("*.mp4"))) == 1


def test_a_log_gets_lines_instead_of_a_bar(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate_module, "LOG_S", -1.0)
    with generate_module.Bar() as bar:
        bar.show(Progress(stage="denoise", step=3, total=40, seconds_left=125.4, peak_bytes=3 << 30))
    assert capsys.readouterr().err.strip() == "denoise: 3/40 steps, 2:05 left, peak 3.0 GiB"


def test_interrupting_leaves_nothing(tiny_models: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle of a run: exit code 130, no video, no temporary folder."""
    write_wav(tmp_path / "long.wav", np.sin(np.arange(16_000 * 60) / 9))
    path = tmp_path / "job.json"
    audio = {"person1": str(tmp_path / "long.wav")}
    path.write_text(json.dumps({"prompt": "x", "cond_image": str(IMAGE), "cond_audio": audio}))
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    code = (
        "import os, signal, sys\n"
        "from multitalk_runtime import generate, generator\n"
        "inner = generator.VideoWriter.write\n"
        "def write(self, frames):\n"
        "    inner(self, frames)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "generator.VideoWriter.write = write\n"
        "sys.exit(generate.main(sys.argv[1:]))\n"
    )
    arguments = ["--models", str(tiny_models), "--input_json", str(path), *SMALL, "--mode", "streaming"]
    arguments += ["--motion_frame", "5", "--save_file", str(tmp_path / "v")]
    environment = {"PATH": "/usr/bin:/bin", "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "inductor")  # torch makes it when imported
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment, capture_output=True, text=True, check=False, timeout=240, cwd=Path.cwd(),
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert not list(temporary.iterdir())
    assert not list(tmp_path.glob("*.mp4"))
    assert not list(tmp_path.glob(".*"))
