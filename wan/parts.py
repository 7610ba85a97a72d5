"""The four networks of a pipeline, loaded. Specification §5 and §6."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .attention_backends import AttentionBackend
from .configs import WanConfig
from .fuse import join_qkv
from .modules.multitalk_model import WanModel
from .modules.ops import EAGER, Ops


@dataclass(kw_only=True)
class Parts:
    """model: the DiT; vae: `.encode`, `.decode`; text_encoder: (texts, device) → states; image_encoder:
    `.visual`.
    """

    model: nn.Module
    vae: Any
    text_encoder: Any
    image_encoder: Any
    t5_cpu: bool = False

    @property
    def encoders(self) -> tuple[Any, Any, Any]:
        return self.vae, self.text_encoder, self.image_encoder


def load_parts(
    config: WanConfig,
    checkpoint_dir: str | Path,
    *,
    device: torch.device,
    audio_dir: str | Path | None = None,
    quant: str | None = None,
    quant_dir: str | Path | None = None,
    lora_files: Sequence[str | Path] = (),
    lora_scales: Sequence[float] | None = None,
    t5_cpu: bool = False,
    t5_fsdp: bool = False,
    dit_fsdp: bool = False,
    attention: str = "auto",
    kernels: str = "eager",
    linears: str = "bf16",
) -> Parts:
    """Read everything from `checkpoint_dir` (audio weights also from `audio_dir`), in `config`'s dtypes.

    kernels: "eager" is plain PyTorch; "fused" runs `wan.kernels` and joins the linears of self-attention.
    linears: "fp8" multiplies in fp8 those of the blocks that see every token (lossy; `wan.quant.speed_up`).

    Raises ValueError for options that exclude each other and `wan.loading.CheckpointError` for files.
    """
    from .modules.clip import CLIPModel
    from .modules.t5 import T5EncoderModel
    from .modules.vae import WanVAE

    # Before minutes of reading, not after.
    backend, ops = AttentionBackend(name=attention), _ops(kernels)
    if linears == "fp8" and (dit_fsdp or quant not in (None, "fp8")):
        msg = "linears='fp8' excludes dit_fsdp and int8 weights"
        raise ValueError(msg)
    if quant and (dit_fsdp or t5_fsdp):
        msg = f"quant={quant!r} and FSDP exclude each other: quantised weights are not sharded"
        raise ValueError(msg)
    folder = Path(checkpoint_dir)
    text_encoder = T5EncoderModel(
        text_len=config.text_len,
        dtype=config.t5_dtype,
        device=torch.device("cpu") if t5_cpu or t5_fsdp else device,
        checkpoint_path=folder / config.t5_checkpoint,
        tokenizer_path=folder / config.t5_tokenizer,
        shard_fn=partial(_shard, device=device) if t5_fsdp else None,
        quant=quant,
        quant_dir=quant_dir,
    )
    vae = WanVAE(vae_pth=folder / config.vae_checkpoint, device=device)
    if kernels == "fused":
        from .kernels import rms_norm_silu

        vae.model.use(norm_silu=rms_norm_silu, channels_last=True)
    image_encoder = CLIPModel(
        dtype=config.clip_dtype,
        device=device,
        checkpoint_path=folder / config.clip_checkpoint,
        tokenizer_path=folder / config.clip_tokenizer,
    )
    if quant:
        model = _quantised(folder, quant, quant_dir, lora_files).to(device)
    else:
        extra = [] if audio_dir is None else [audio_dir]
        target = torch.device("cpu") if dit_fsdp else device
        model = WanModel.from_pretrained(folder, extra=extra, dtype=config.param_dtype, device=target)
        _merge(model, lora_files, lora_scales, config.param_dtype)
    model = model.eval().requires_grad_(False).use(attention=backend, ops=ops)
    if linears == "fp8":
        from .quant import speed_up

        speed_up(model, fused=kernels == "fused")
    if dit_fsdp:
        model = _shard(model, device=device)
    elif kernels == "fused":
        join_qkv(model)
    return Parts(model=model, vae=vae, text_encoder=text_encoder, image_encoder=image_encoder, t5_cpu=t5_cpu)


def _ops(kernels: str) -> Ops:
    if kernels == "eager":
        return EAGER
    if kernels != "fused":
        msg = f"kernels {kernels!r} is neither 'eager' nor 'fused'"
        raise ValueError(msg)
    from .kernels.ops import FUSED

    return FUSED


def _shard(model: nn.Module, device: torch.device) -> nn.Module:
    from .distributed import shard_model

    return shard_model(model, device)


def _quantised(
    folder: Path, quant: str, quant_dir: str | Path | None, lora_files: Sequence[str | Path]
) -> nn.Module:
    """The official quantised DiT; one LoRA "file" is then a complete model with FusionX merged (specification
    §6.2).
    """
    from .loading import build_on_meta, read_config
    from .quant import load_quantized

    if quant_dir is None:
        msg = f"quant={quant!r} needs quant_dir, the folder that holds quant_models/"
        raise ValueError(msg)
    if len(lora_files) > 1:
        msg = f"with quant one complete model file can be given as LoRA, got {len(lora_files)}"
        raise ValueError(msg)
    models = Path(quant_dir) / "quant_models"
    if lora_files:
        weights, quant_map = Path(lora_files[0]), models / f"quantization_map_{quant}_FusionX.json"
    else:
        weights, quant_map = models / f"dit_model_{quant}.safetensors", models / f"dit_model_map_{quant}.json"
    for path in (weights, quant_map):
        if not path.is_file():
            msg = f"quant={quant!r}: no file {str(path)!r}"
            raise FileNotFoundError(msg)
    names = set(WanModel.__init__.__annotations__)
    sizes = {k: v for k, v in read_config(folder).items() if k in names}
    return load_quantized(build_on_meta(lambda: WanModel(**sizes)), weights, quant_map)


def _merge(
    model: nn.Module, files: Sequence[str | Path], scales: Sequence[float] | None, dtype: torch.dtype
) -> None:
    scales = [1.2] * len(files) if scales is None else list(scales)
    if len(scales) != len(files):
        msg = f"{len(files)} LoRA files and {len(scales)} scales; give one scale for each file"
        raise ValueError(msg)
    if not files:
        return
    from .wan_lora import WanLoraWrapper

    wrapper = WanLoraWrapper(model)
    for file, scale in zip(files, scales, strict=True):
        wrapper.apply_lora(
            wrapper.load_lora(file), scale, param_dtype=dtype, device=next(model.parameters()).device
        )
