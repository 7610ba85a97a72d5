"""The values that every Wan2.1 model shares, and the type that holds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

NEGATIVE_PROMPT_ZH = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    """File names, dtypes and sizes of one Wan2.1 task.

    dtypes are kept as names and resolved on use, so that reading a configuration does not load torch.
    The transformer's sizes describe the published checkpoint; a pipeline builds what `config.json` says.
    """

    name: str
    t5_model: str = "umt5_xxl"
    t5_dtype_name: str = "bfloat16"
    text_len: int = 512
    param_dtype_name: str = "bfloat16"
    num_train_timesteps: int = 1000
    sample_fps: int = 16
    sample_neg_prompt: str = NEGATIVE_PROMPT_ZH

    t5_checkpoint: str = "models_t5_umt5-xxl-enc-bf16.pth"
    t5_tokenizer: str = "google/umt5-xxl"
    vae_checkpoint: str = "Wan2.1_VAE.pth"
    vae_stride: tuple[int, int, int] = (4, 8, 8)

    clip_model: str | None = None
    clip_dtype_name: str = "float16"
    clip_checkpoint: str | None = None
    clip_tokenizer: str | None = None

    patch_size: tuple[int, int, int] = (1, 2, 2)
    dim: int = 5120
    ffn_dim: int = 13824
    freq_dim: int = 256
    num_heads: int = 40
    num_layers: int = 40
    window_size: tuple[int, int] = (-1, -1)
    qk_norm: bool = True
    cross_attn_norm: bool = True
    eps: float = 1e-6

    @property
    def t5_dtype(self) -> torch.dtype:
        return _dtype(self.t5_dtype_name)

    @property
    def param_dtype(self) -> torch.dtype:
        return _dtype(self.param_dtype_name)

    @property
    def clip_dtype(self) -> torch.dtype:
        return _dtype(self.clip_dtype_name)


def _dtype(name: str) -> torch.dtype:
    import torch

    return getattr(torch, name)


wan_shared_cfg = WanConfig(name="Wan shared")
