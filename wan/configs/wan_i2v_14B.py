"""Wan2.1 image-to-video, 14B."""

from __future__ import annotations

from .shared_config import WanConfig

i2v_14B = WanConfig(
    name="Wan I2V 14B",
    clip_model="clip_xlm_roberta_vit_h_14",
    clip_checkpoint="models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    clip_tokenizer="xlm-roberta-large",
)
