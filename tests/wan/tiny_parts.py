"""Real networks of tiny sizes, with seeded weights, for pipelines on the CPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from goldens import seeded
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from wan.configs import WAN_CONFIGS
from wan.modules.clip import CLIPModel, VisionTransformer
from wan.modules.model import WanModel
from wan.modules.t5 import T5Encoder, T5EncoderModel
from wan.modules.vace_model import VaceWanModel
from wan.modules.vae import VideoVAE, WanVAE
from wan.stock import Parts

T5 = {"vocab": 64, "dim": 20, "dim_attn": 16, "dim_ffn": 32, "num_heads": 2, "num_buckets": 8}
VAE = {"dim": 4}
CLIP = {"dim": 1280, "num_layers": 1, "mlp_ratio": 0.05, "num_heads": 16}
DIT = {
    "dim": 48,
    "ffn_dim": 64,
    "num_heads": 4,
    "num_layers": 2,
    "freq_dim": 16,
    "text_dim": 20,
    "text_len": 16,
}
CONFIG = replace(WAN_CONFIGS["i2v-14B"], text_len=16, t5_dtype_name="float32", param_dtype_name="float32",
                 clip_dtype_name="float32")  # fmt: skip
WORDS = ("▁", "▁a", "▁cat", "▁dog", "▁runs", "▁Talk", "ing", "s", "é", ",", ".")


def write_tokenizer(folder: Path) -> Path:
    """A Unigram tokenizer laid out like umT5's: `<pad>` 0, `</s>` 1 at the end of every text, `<unk>` 2."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0)]
    vocabulary += [(word, -1.0 - i / 10) for i, word in enumerate(WORDS)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def text_encoder(folder: Path) -> T5EncoderModel:
    model = T5Encoder(**T5, num_layers=1, shared_pos=False)
    seeded.fill(model, "tiny.t5:")
    return T5EncoderModel(
        CONFIG.text_len, torch.float32, "cpu", tokenizer_path=write_tokenizer(folder), model=model
    )


def vae() -> WanVAE:
    model = VideoVAE(**VAE)
    seeded.fill(model, "tiny.vae:")
    return WanVAE(model=model, device="cpu")


def clip() -> CLIPModel:
    model = VisionTransformer(**CLIP, features_only=True)
    seeded.fill(model, "tiny.clip:")
    return CLIPModel(torch.float32, "cpu", model=model)


def dit(kind: str) -> WanModel:
    if kind == "vace":
        model: WanModel = VaceWanModel(vace_layers=(0,), vace_in_dim=96, **DIT)
    else:
        model = WanModel(model_type=kind, in_dim=16 if kind == "t2v" else 36, **DIT)
    seeded.fill(model, f"tiny.{kind}:")
    return model.eval().requires_grad_(False)


def parts(kind: str, folder: Path) -> Parts:
    image = clip() if kind in ("i2v", "flf2v") else None
    return Parts(text_encoder=text_encoder(folder), vae=vae(), model=dit(kind), clip=image)


def build_vace(rank: int, folder: str, use_usp: bool) -> object:
    """A worker's pipeline (importable, so that it can be sent to a process)."""
    from wan.vace import WanVace

    torch.set_num_threads(1)
    return WanVace.from_parts(CONFIG, parts("vace", Path(folder) / str(rank)), rank=rank, use_usp=use_usp)


def vace_builder(folder: Path, use_usp: bool) -> partial[object]:
    return partial(build_vace, folder=str(folder), use_usp=use_usp)
