"""Wan2.1 text-to-video, 1.3B."""

from __future__ import annotations

from .shared_config import WanConfig

t2v_1_3B = WanConfig(name="Wan T2V 1.3B", dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
