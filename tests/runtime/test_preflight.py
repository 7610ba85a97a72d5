"""What would end a run after hours is told before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from multitalk_runtime import generator as generator_module
from multitalk_runtime.defaults import AUDIO, IMAGE
from multitalk_runtime.errors import Fault
from multitalk_runtime.generate import main
from multitalk_runtime.generator import Generator
from multitalk_runtime.model_dirs import ModelDirs
from multitalk_runtime.preflight import check_writable, usable_device

GPUS = torch.cuda.device_count()


@pytest.fixture
def arguments(tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(
        generator_module.Generator, "load", lambda *_, **__: pytest.fail("a model was loaded")
    )
    job = tmp_path / "job.json"
    audio = {"person1": str(AUDIO)}
    job.write_text(json.dumps({"prompt": "x", "cond_image": str(IMAGE), "cond_audio": audio}))
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    return ["--models", str(tiny_models), "--input_json", str(job), "--frame_num", "5"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--device", "gpu0"], "--device: there is no device 'gpu0'"),
        (["--device", "meta"], "--device: there is no device 'meta'"),
        (["--device", f"cuda:{GPUS}"], f"--device: there is no device 'cuda:{GPUS}'"),
        (["--attention", "fast"], "--attention: there is no backend 'fast'"),
        (["--attention", "fast", "--dry-run"], "--attention: there is no backend 'fast'"),
        (["--device", "cpu", "--kernels", "fused"], "--kernels: the fused kernels need a GPU"),
        (["--save_file", "file/video"], "--save_file: nothing can be written to 'file'"),
        (["--save_file", "/proc/here/video"], "--save_file: nothing can be written to '/proc/here'"),
        (["--audio_save_dir", "file/sound"], "--audio_save_dir: nothing can be written"),
        (["--base_seed", "4294967296"], "--base_seed: 4294967296 is too large"),
    ],
)
def test_before_loading(arguments: list[str], capsys: Any, flags: list[str], words: str) -> None:
    assert main([*arguments, *flags]) == 2
    shown = capsys.readouterr().err
    assert words in shown
    assert "fix: " in shown


def test_a_folder_is_no_video(arguments: list[str], capsys: Any, tmp_path: Path) -> None:
    (tmp_path / "v.mp4").mkdir()
    assert main([*arguments, "--save_file", "v"]) == 2
    assert "'v.mp4' is a folder" in capsys.readouterr().err


def test_a_dry_run_writes_nothing_and_plans_for_a_gpu_that_is_elsewhere(
    arguments: list[str], tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    assert main([*arguments, "--device", "h200", "--save_file", "new/v", "--dry-run"]) == 0
    assert sorted(tmp_path.iterdir()) == before


def test_a_worker_with_a_device_that_is_not_there(tiny_models: Path) -> None:
    for name in ("gpu0", f"cuda:{GPUS}"):
        with pytest.raises(Fault, match=name) as caught:
            Generator.load(ModelDirs.under(tiny_models), device=name)
        assert caught.value.field == "device"
    assert usable_device("cpu") == torch.device("cpu")


def test_a_new_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b", field="--save_file")
    assert list((tmp_path / "a" / "b").iterdir()) == []
