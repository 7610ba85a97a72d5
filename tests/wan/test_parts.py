"""The pipeline's constructor: all read from a checkpoint folder (sizes cut down, the path whole)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import goldens
import pytest
import tiny_parts
import torch
from PIL import Image
from safetensors.torch import save_file

from wan import parts as parts_module
from wan.attention_backends import AttentionBackendError
from wan.loading import KeyMismatchError
from wan.modules import clip as clip_module
from wan.modules import t5 as t5_module
from wan.modules import vae as vae_module
from wan.modules.multitalk_model import WanModel
from wan.multitalk import MultiTalkPipeline
from wan.quant import quantize

SIZES = {
    **tiny_parts.DIT,
    "model_type": "i2v",
    "in_dim": 36,
    "context_tokens": 4,
    "intermediate_dim": 8,
    "output_dim": 12,
}
CONFIG = tiny_parts.CONFIG
BUCKETS = {"multitalk-480": {"1.00": (32, 32)}}
SMALL = {"frame_num": 5, "motion_frame": 1, "sampling_steps": 2, "seed": 3, "progress": False}


def dit() -> WanModel:
    model = WanModel(**SIZES)
    goldens.seeded.fill(model, "tiny.audio:")
    return model.eval().requires_grad_(False)


def is_audio(key: str) -> bool:
    return any(part in key for part in ("audio", "norm_x"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint folder as published: base shards, T5, VAE, CLIP; the audio weights in a folder of their
    own.
    """
    for name, value in tiny_parts.T5.items():
        monkeypatch.setitem(t5_module.UMT5_XXL, name, value)
    monkeypatch.setattr(t5_module, "UMT5_XXL_LAYERS", 1)
    video_vae, tower = vae_module.VideoVAE, clip_module.VisionTransformer
    monkeypatch.setattr(vae_module, "VideoVAE", lambda z_dim: video_vae(**tiny_parts.VAE, z_dim=z_dim))
    monkeypatch.setattr(clip_module, "feature_tower", lambda: tower(**tiny_parts.CLIP, features_only=True))
    base, audio = tmp_path / "base", tmp_path / "audio"
    base.mkdir()
    audio.mkdir()
    state = dit().state_dict()
    save_file(
        {k: v for k, v in state.items() if not is_audio(k)}, base / "diffusion_pytorch_model.safetensors"
    )
    save_file({k: v for k, v in state.items() if is_audio(k)}, audio / "multitalk.safetensors")
    (base / "config.json").write_text(json.dumps({"_class_name": "WanModel", **SIZES}))
    encoder = tiny_parts.text_encoder(base / CONFIG.t5_tokenizer)
    torch.save(encoder.model.state_dict(), base / CONFIG.t5_checkpoint)
    torch.save(tiny_vae(video_vae).state_dict(), base / CONFIG.vae_checkpoint)
    image_encoder = tower(**tiny_parts.CLIP, features_only=True)
    goldens.seeded.fill(image_encoder, "tiny.clip:")
    visual = {f"visual.{k}": v for k, v in image_encoder.state_dict().items()}
    torch.save(visual, base / CONFIG.clip_checkpoint)
    return tmp_path


def tiny_vae(cls: type) -> torch.nn.Module:
    model = cls(**tiny_parts.VAE)
    goldens.seeded.fill(model, "tiny.vae:")
    return model


def job() -> dict:
    speech = goldens.seeded.randn("parts.speech", (7, 12, 768))
    return {
        "prompt": "a cat",
        "cond_image": Image.new("RGB", (40, 40), (90, 60, 30)),
        "cond_audio": {"person1": speech},
    }


def load(folder: Path, **options) -> MultiTalkPipeline:
    given = {"audio_dir": folder / "audio", "device": "cpu", **options}
    pipeline = MultiTalkPipeline(CONFIG, folder / "base", **given)
    pipeline.buckets = BUCKETS
    return pipeline


def test_from_a_checkpoint_folder(folder: Path) -> None:
    before = sorted(p.name for p in folder.rglob("*"))
    pipeline = load(folder)
    assert all(torch.equal(v, pipeline.model.state_dict()[k]) for k, v in dit().state_dict().items())
    video = pipeline.generate(job(), **SMALL)
    assert video.shape == (3, 7, 32, 32)
    assert torch.isfinite(video).all()
    assert video.std() > 0.01
    assert sorted(p.name for p in folder.rglob("*")) == before  # the folder is only read
    # Specification §9 D1: the original crashes with T5 on the CPU.
    assert torch.equal(load(folder, t5_cpu=True).generate(job(), **SMALL), video)


def test_missing_audio_weights_are_named(folder: Path) -> None:
    with pytest.raises(KeyMismatchError, match=r"multitalk\.safetensors"):
        load(folder, audio_dir=None)


def test_loras_are_merged(folder: Path) -> None:
    down, up = torch.ones(2, 48), torch.ones(48, 2)
    key = "diffusion_model.blocks.0.self_attn.q"
    for i, scale in enumerate((1.0, 3.0)):
        tensors = {f"{key}.lora_down.weight": down * scale, f"{key}.lora_up.weight": up}
        save_file(tensors, folder / f"{i}.safetensors")
    files = [str(folder / f"{i}.safetensors") for i in range(2)]
    got = load(folder, lora_dir=files, lora_scales=[0.5, 0.1]).model.blocks[0].self_attn.q.weight
    want = dit().blocks[0].self_attn.q.weight + (0.5 * 2 + 0.1 * 6)
    assert goldens.error(got, want) < 1e-6
    with pytest.raises(ValueError, match="2 LoRA files and 1 scales"):  # specification §9 D14
        load(folder, lora_dir=files, lora_scales=[1.0])


def test_official_quantised_layout(folder: Path) -> None:
    model = dit()
    quant_map = quantize(model, "int8")
    models = folder / "quant" / "quant_models"
    models.mkdir(parents=True)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, models / "dit_model_int8.safetensors"
    )
    (models / "dit_model_map_int8.json").write_text(json.dumps(quant_map))
    parts = parts_module._quantised(folder / "base", "int8", folder / "quant", [])
    want = dit().blocks[0].ffn[0].weight
    got = parts.blocks[0].ffn[0].weight.dequantized(torch.float32)
    assert goldens.error(got, want) < 0.01
    with pytest.raises(FileNotFoundError, match="dit_model_fp8"):
        parts_module._quantised(folder / "base", "fp8", folder / "quant", [])
    with pytest.raises(ValueError, match="quant_dir"):
        parts_module._quantised(folder / "base", "int8", None, [])


def test_choices_are_checked_before_anything_is_read(folder: Path) -> None:
    empty = replace(CONFIG, t5_checkpoint="nowhere")
    with pytest.raises(AttentionBackendError, match="unknown"):
        MultiTalkPipeline(empty, folder / "none", device="cpu", attention="fast")
    with pytest.raises(ValueError, match="kernels 'x'"):
        MultiTalkPipeline(empty, folder / "none", device="cpu", kernels="x")
    with pytest.raises(ValueError, match="exclude each other"):
        MultiTalkPipeline(empty, folder / "none", device="cpu", quant="int8", dit_fsdp=True)


def test_travelling_blocks_change_nothing(folder: Path) -> None:
    want = load(folder).generate(job(), **SMALL)
    pipeline = load(folder)
    pipeline.enable_vram_management(0)
    assert torch.equal(pipeline.generate(job(), **SMALL), want)
