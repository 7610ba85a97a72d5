"""The tiny model: the official layout, the same bytes for the same seed, loaded by the production code."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import pytest
import torch

from multitalk_runtime.model_dirs import ModelDirs
from multitalk_runtime.settings import Settings
from multitalk_runtime.tiny import main, write_tiny
from wan.modules.multitalk_model import WanModel
from wan.modules.tokenizers import HuggingfaceTokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from multitalk_runtime.generator import Generator


def hashes(folder: Path) -> dict[str, str]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_the_layout_is_the_published_one(tiny_models: Path) -> None:
    names = set(hashes(tiny_models))
    wan = "Wan2.1-I2V-14B-480P"
    assert {
        f"{wan}/config.json",
        f"{wan}/models_t5_umt5-xxl-enc-bf16.pth",
        f"{wan}/models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
        f"{wan}/Wan2.1_VAE.pth",
        f"{wan}/google/umt5-xxl/tokenizer.json",
        f"{wan}/xlm-roberta-large/tokenizer.json",
        f"{wan}/diffusion_pytorch_model-00001-of-00002.safetensors",
        f"{wan}/diffusion_pytorch_model.safetensors.index.json",
        "MeiGen-MultiTalk/multitalk.safetensors",
        "MeiGen-MultiTalk/diffusion_pytorch_model.safetensors.index.json",
        "chinese-wav2vec2-base/pytorch_model.bin",
        "chinese-wav2vec2-base/preprocessor_config.json",
    } <= names
    index = json.loads(
        (tiny_models / "MeiGen-MultiTalk" / "diffusion_pytorch_model.safetensors.index.json").read_text()
    )
    assert set(index["weight_map"].values()) >= {"multitalk.safetensors"}
    audio = {k for k, v in index["weight_map"].items() if v == "multitalk.safetensors"}
    assert all("audio" in k or "norm_x" in k for k in audio)


def test_the_same_seed_writes_the_same_bytes(tiny_models: Path, tmp_path: Path) -> None:
    assert main([str(tmp_path / "again")]) == 0
    assert hashes(tmp_path / "again") == hashes(tiny_models)
    write_tiny(tmp_path / "other", seed=5)
    first, other = hashes(tiny_models), hashes(tmp_path / "other")
    changed = {name for name in first if first[name] != other[name]}
    assert {n for n in first if n.endswith((".safetensors", ".pth", ".bin"))} == changed


def test_a_full_folder_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("x")
    assert main([str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_production_code_loads_it(tiny_generator: Generator) -> None:
    model = tiny_generator.pipeline.model
    assert isinstance(model, WanModel)
    assert model.dim // model.num_heads == 128  # what the production kernels are made for
    assert (model.dim, model.num_heads, model.ffn_dim, model.num_layers) == (256, 2, 512, 2)
    assert next(model.parameters()).dtype == torch.bfloat16
    assert tiny_generator.pipeline.buckets["multitalk-480"]["1.00"] == [80, 80]


def test_tokenizers_split_words(tiny_models: Path) -> None:
    folder = ModelDirs.under(tiny_models).wan / "google" / "umt5-xxl"
    tokenizer = HuggingfaceTokenizer(folder, seq_len=512, clean="whitespace")
    ids, mask = tokenizer(["A person is talking.", "Something else entirely"], return_mask=True)
    assert ids.shape == (2, 512)
    assert int(ids.max()) < 512
    assert not torch.equal(ids[0], ids[1])
    assert ids[0, int(mask[0].sum()) - 1] == 1  # </s>


def test_folders_by_environment_and_layout(tmp_path: Path) -> None:
    found = ModelDirs.from_settings(Settings(model_path=tmp_path, wav2vec_dir=tmp_path / "speech"))
    assert found.wan == tmp_path / "Wan2.1-I2V-14B-480P"
    assert found.wav2vec == tmp_path / "speech"
    assert found.audio == tmp_path / "MeiGen-MultiTalk"
    (tmp_path / "config.json").write_text("{}")  # as `mtmodels convert` writes: one folder
    assert ModelDirs.under(tmp_path).audio is None
