"""LoRA merges: the original's exactly, and ours, which honours all that a file says."""

from __future__ import annotations

import goldens
import pytest
import torch
from safetensors.torch import load_file, save_file

from wan.modules.multitalk_model import WanModel
from wan.wan_lora import LoraError, WanLoraWrapper

NAME = "lora"
FILE = goldens.GOLDEN / "lora_tiny.safetensors"


def model() -> WanModel:
    return goldens.fill(WanModel(**goldens.config(NAME)), "dit_single_fp32")


def test_official_merge(measured) -> None:
    entry, want = goldens.index(NAME), goldens.load(NAME)
    tuned, before = model(), dict(model().named_parameters())
    wrapper = WanLoraWrapper(tuned)
    changed = wrapper.apply_lora(
        wrapper.load_lora(FILE), entry["alpha"], param_dtype=torch.float32, official=True
    )
    after = dict(tuned.named_parameters())
    assert (
        sorted(changed)
        == sorted(entry["changed"])
        == sorted(k for k in after if not torch.equal(after[k], before[k]))
    )
    for key, value in want.items():
        measured(NAME, key, goldens.error(after[key], value), 1e-6)


def test_alpha_and_other_names_are_honoured() -> None:
    """Specification §9 D14: alpha / rank scales, and lora_A / lora_B are factors too."""
    tensors, tuned, before = load_file(FILE), model(), dict(model().named_parameters())
    wrapper = WanLoraWrapper(tuned)
    changed = wrapper.apply_lora(wrapper.load_lora(FILE), 0.7, param_dtype=torch.float32)
    assert "blocks.1.self_attn.k.weight" in changed
    key = "blocks.1.ffn.0"
    down, up, alpha = (
        tensors[f"diffusion_model.{key}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha")
    )
    want = before[f"{key}.weight"] + 0.7 * alpha / down.shape[0] * (up @ down)
    assert goldens.error(tuned.get_parameter(f"{key}.weight"), want) < 1e-6


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("diffusion_model.blocks.9.ffn.0.diff", (96, 48), "no such parameter"),
        ("diffusion_model.blocks.0.norm3.diff", (47,), r"shape \(47,\), the model has \(48,\)"),
        ("diffusion_model.blocks.0.ffn.0.lora_up.weight", (96, 4), "one of its two factors"),
        ("text_encoder.x.lora_up.weight", (1, 1), "unknown meaning"),
        ("diffusion_model.blocks.0.ffn.0.dora_scale", (1,), "unknown meaning"),
    ],
)
def test_what_does_not_fit_is_listed_and_nothing_changes(key, shape, message, tmp_path) -> None:
    good = "diffusion_model.blocks.0.norm3.diff_b"
    save_file({key: torch.ones(shape), good: torch.ones(48)}, tmp_path / "x.safetensors")
    tuned = model()
    wrapper = WanLoraWrapper(tuned)
    with pytest.raises(LoraError, match=message):
        wrapper.apply_lora(wrapper.load_lora(tmp_path / "x.safetensors"))
    assert torch.equal(tuned.blocks[0].norm3.bias, model().blocks[0].norm3.bias)


def test_missing_file_and_name_are_named(tmp_path) -> None:
    wrapper = WanLoraWrapper(model())
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        wrapper.load_lora(tmp_path / "none.safetensors")
    with pytest.raises(LoraError, match="not loaded"):
        wrapper.apply_lora("x")
