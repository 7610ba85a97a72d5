"""`quality` from the job and the command line to the reply and the file."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from multitalk_runtime import core
from multitalk_runtime.defaults import AUDIO, IMAGE
from multitalk_runtime.errors import Fault
from multitalk_runtime.generate import main
from multitalk_runtime.generator import Generator
from multitalk_runtime.job import parse_job
from multitalk_runtime.model_dirs import ModelDirs
from multitalk_runtime.provenance import metadata
from multitalk_runtime.request import Request
from multitalk_runtime.settings import Lora, Settings, SettingsError
from wan.quality import Machine

if TYPE_CHECKING:
    from collections.abc import Callable


EXACT_RUN = """
import sys
from pathlib import Path
from multitalk_runtime.defaults import AUDIO, IMAGE
from multitalk_runtime.generator import Generator
from multitalk_runtime.model_dirs import ModelDirs
from multitalk_runtime.request import Request

folder = Path(sys.argv[1])
generator = Generator.load(ModelDirs.under(folder), device="cpu")
result = generator.run(Request(
    prompt="x", image=IMAGE, tracks=(AUDIO,), output=Path(sys.argv[2]), frame_num=5, sample_steps=1, seed=1,
))
assert (result.quality, result.overrides) == ("exact", ("steps",)), result
lossy = ("quant", "teacache", "fp8", "int8", "sage", "wan_lora")
print(sorted(n for n in sys.modules if n.startswith(("wan", "sage")) and any(w in n for w in lossy)))
"""


def ask(output: Path, **changes: Any) -> Request:
    values = {"prompt": "x", "image": IMAGE, "tracks": (AUDIO,), "output": output, "frame_num": 5,
              "sample_steps": 2, "seed": 1}  # fmt: skip
    return Request(**values | changes)


def comment(video: Path) -> dict[str, Any]:
    """What ffprobe reads of the file."""
    command = ["ffprobe", "-v", "error", "-show_entries", "format_tags=comment", "-of", "json", str(video)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)
    return json.loads(found["format"]["tags"]["comment"])


def test_the_switches_are_in_the_result_and_in_the_file(tiny_generator: Generator, tmp_path: Path) -> None:
    exact = tiny_generator.run(ask(tmp_path / "exact.mp4"))
    model, seen = tiny_generator.pipeline.model, []
    near = tiny_generator.run(
        ask(tmp_path / "near.mp4", quality="near"),
        progress=lambda now: seen.append((now.stage, model.runtime.absorb_audio)),
    )
    assert (exact.quality, near.quality) == ("exact", "near")
    assert exact.overrides == near.overrides == ("steps",)
    assert near.switches["vae_decode"] == "bf16"
    assert near.switches["absorb_audio"] == "all"
    assert {absorbed for stage, absorbed in seen if stage == "denoise"} == {True}
    assert not model.runtime.absorb_audio  # of that call alone
    assert near.sha256 != exact.sha256
    told = json.loads(json.dumps(near.to_json()))
    written = comment(near.video)
    same = ("quality", "switches", "overrides", "versions", "seed", "attention_kernel", "attention_module")
    for key in same:
        assert written[key] == told[key], key
    attention = {"xformers", "fa3-fwd", "flash-attn"}
    assert set(written["versions"]) == {"torch", "cuda", "cudnn", "triton", "wan", "runtime"} | attention
    assert (written["attention_kernel"], written["attention_module"]) == ("cpu", "torch")
    assert written["switches"]["attention"] == "auto"
    assert written["lossy"] == ["vae_decode"]
    assert (written["motion_frame"], written["apg"], written["bbox"]) == (1, None, None)
    assert not {"prompt", "image", "tracks"} & set(written)  # the caller's own
    again = tiny_generator.run(ask(tmp_path / "again.mp4"))
    assert again.sha256 == exact.sha256  # the one in between left nothing


def test_what_steers_sampling_is_in_the_file(tmp_path: Path) -> None:
    box = {"person1": (0, 0, 8, 4), "person2": (0, 4, 8, 8)}
    request = ask(tmp_path / "v.mp4", mode="streaming", motion_frame=9, frame_num=17, use_apg=True, bbox=box)
    kernel = {"kernel": "flash_attn_3", "module": "fa3_fwd_interface"}
    written = json.loads(json.dumps(metadata(request, 3, request.setting(), kernel)))
    assert (written["motion_frame"], written["mode"], written["seed"]) == (9, "streaming", 3)
    assert written["apg"] == {"momentum": -0.75, "norm_threshold": 55.0}
    assert written["bbox"]["person2"] == [0, 4, 8, 8]
    assert written["attention_module"] == "fa3_fwd_interface"


def test_a_pipelines_own_weights_are_said(
    tiny_generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it was made: nobody gave the generator a `quant`."""
    large = Machine(memory=140 << 30)
    monkeypatch.setattr(Machine, "here", lambda device, **_: large)
    switches = tiny_generator.setting(ask(tmp_path / "v.mp4")).switches
    assert (switches.weights, switches.absorb_audio) == ("bf16", "all")
    monkeypatch.setattr(type(tiny_generator.pipeline), "weights", "int8")
    switches = tiny_generator.setting(ask(tmp_path / "v.mp4")).switches
    assert (switches.weights, switches.absorb_audio) == ("int8", "all")
    assert switches.lossy == ("weights",)


def test_an_exact_video_imports_nothing_lossy(tiny_models: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", EXACT_RUN, str(tiny_models), str(tmp_path / "v.mp4")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[]"


def test_what_the_models_were_not_loaded_for(tiny_generator: Generator, tmp_path: Path) -> None:
    for quality, code in (("fast", "forbidden.option"), ("turbo", "job.quality")):
        with pytest.raises(Fault) as caught:
            tiny_generator.run(ask(tmp_path / "v.mp4", quality=quality))
        assert (caught.value.code, caught.value.field) == (code, "quality")
        assert "exact, near" in f"{caught.value.message} {caught.value.hint}"
    assert not list(tmp_path.iterdir())


def test_turbo_with_a_lora_makes_a_video(tiny_models: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    name, file = "diffusion_model.blocks.0.self_attn.q", tmp_path / "lora.safetensors"
    factors = {f"{name}.lora_down.weight": torch.randn(4, 256), f"{name}.lora_up.weight": torch.randn(256, 4)}
    save_file(factors, file)
    generator = Generator.load(
        ModelDirs.under(tiny_models), device="cpu", quality="turbo", loras=[Lora(file=file, scale=0.1)]
    )
    result = generator.run(ask(tmp_path / "v.mp4", quality="turbo", sample_steps=1))
    assert (result.quality, result.steps, result.overrides) == ("turbo", 1, ("steps",))
    assert (result.switches["lora"], result.switches["text_guide_scale"]) == (True, 1.0)
    assert comment(result.video)["lossy"] == ["vae_decode", "lora"]
    exact = generator.run(ask(tmp_path / "e.mp4"))
    assert exact.overrides == ("steps", "lora")  # an explicit LoRA wins over the word, and is told


def test_fp8_on_a_cpu_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    dirs = ModelDirs.under(tmp_path)  # empty: reading would be another error
    with pytest.raises(Fault, match=r"a CPU has no fp8.*works here: exact, near") as caught:
        Generator.load(dirs, device="cpu", quality="fast")
    assert caught.value.code == "job.quality"


def test_a_job_gets_what_it_names_or_the_workers_own() -> None:
    paths = {"image": IMAGE, "tracks": (AUDIO,), "output": Path("v.mp4")}
    open_job, exact = parse_job({})[0], parse_job({"quality": "exact"})[0]
    assert Request.from_job(open_job, **paths).quality == "exact"
    assert Request.from_job(open_job, **paths, default_quality="near").quality == "near"
    assert Request.from_job(exact, **paths, default_quality="near").quality == "exact"
    turbo = Request.from_job(parse_job({"turbo": True, "text_guide_scale": 5.0})[0], **paths)
    assert (turbo.steps, turbo.shift, turbo.text_guide_scale, turbo.audio_guide_scale) == (8, 2.0, 5.0, 2.0)
    assert turbo.setting(lora=True).overrides == ("text_guide_scale",)
    assert replace(turbo, seed=3).setting(lora=True) == turbo.setting(lora=True)


@pytest.mark.parametrize(
    ("worker", "job", "code"),
    [
        ({}, {}, None),
        ({}, {"quality": "near"}, None),
        ({}, {"quality": "fast"}, "forbidden.option"),
        ({}, {"quality": "turbo"}, "job.quality"),
        ({"quality": "fast"}, {}, None),
        ({"quality": "fast"}, {"quality": "exact"}, "forbidden.option"),
        ({"quality": "fast", "loras": (Lora(file=Path("x")),)}, {"turbo": True}, None),
        ({"quality": "turbo"}, {}, "job.quality"),
        ({"attention": "sage"}, {"quality": "exact"}, "forbidden.option"),
        ({"attention": "sage"}, {}, None),
    ],
)
def test_a_worker_refuses_before_fetching(
    worker: dict[str, Any], job: dict[str, Any], code: str | None
) -> None:
    settings, parsed = Settings(**worker), parse_job(job)[0]
    if code is None:
        core.check_quality(parsed, settings)
        return
    with pytest.raises(Fault) as caught:
        core.check_quality(parsed, settings)
    assert (caught.value.code, caught.value.field) == (code, "quality")


def test_the_environment() -> None:
    settings = Settings.from_environment({"MT_QUALITY": "fast", "MT_ATTENTION": "cudnn"})
    assert (settings.quality, settings.attention) == ("fast", "cudnn")
    with pytest.raises(SettingsError, match="MT_QUALITY='best' is not one of exact, near, fast, turbo"):
        Settings.from_environment({"MT_QUALITY": "best"})


@pytest.fixture
def job(tmp_path: Path) -> str:
    file = tmp_path / "job.json"
    content = {"prompt": "x", "cond_image": str(IMAGE), "cond_audio": {"person1": str(AUDIO)}}
    file.write_text(json.dumps(content))
    return str(file)


def test_the_command_line(
    tiny_models: Path, job: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["--models", str(tiny_models), "--input_json", job, "--frame_num", "5", "--device", "cpu"]
    plan: Callable[..., int] = lambda *more: main([*common, "--dry-run", *more])  # noqa: E731
    assert plan("--quality", "fast", "--sample_steps", "2", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["switches"]["linears"] == "fp8"
    assert shown["overrides"] == ["steps"]
    assert shown["seconds"] is None
    assert "fp8" in shown["lacks"][0]
    assert shown["versions"]["torch"]
    assert plan("--quality", "near", "--vae_decode", "fp32") == 0
    assert "near: attention auto, weights bf16, linears bf16, vae_decode* fp32" in capsys.readouterr().out
    assert plan("--quality", "turbo") == 2
    assert "turbo needs a distilled LoRA (job.quality)" in capsys.readouterr().err
    assert main([*common, "--quality", "fast", "--save_file", str(tmp_path / "v")]) == 2
    told = capsys.readouterr().err
    assert "job.quality" in told
    assert "What works here: exact, near" in told
    assert not (tmp_path / "v.mp4").exists()
