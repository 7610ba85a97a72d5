"""Wan2.1 text-to-video, 14B."""

from __future__ import annotations

from .shared_config import WanConfig

t2v_14B = WanConfig(name="Wan T2V 14B")
