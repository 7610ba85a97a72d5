"""Configurations by task name, and the sizes each task supports."""

from __future__ import annotations

from dataclasses import replace

from .shared_config import WanConfig
from .wan_i2v_14B import i2v_14B
from .wan_multitalk_14B import multitalk_14B
from .wan_t2v_1_3B import t2v_1_3B
from .wan_t2v_14B import t2v_14B

__all__ = ["MAX_AREA_CONFIGS", "SIZE_CONFIGS", "SUPPORTED_SIZES", "WAN_CONFIGS", "WanConfig"]

WAN_CONFIGS: dict[str, WanConfig] = {
    "t2v-14B": t2v_14B,
    "t2v-1.3B": t2v_1_3B,
    "i2v-14B": i2v_14B,
    "t2i-14B": replace(t2v_14B, name="Wan T2I 14B"),
    "flf2v-14B": replace(
        i2v_14B, name="Wan FLF2V 14B", sample_neg_prompt="镜头切换，" + i2v_14B.sample_neg_prompt
    ),
    "vace-1.3B": replace(t2v_1_3B, name="Wan VACE 1.3B"),
    "vace-14B": replace(t2v_14B, name="Wan VACE 14B"),
    "multitalk-14B": multitalk_14B,
}

SIZE_CONFIGS: dict[str, tuple[int, int]] = {
    "720*1280": (720, 1280),
    "1280*720": (1280, 720),
    "480*832": (480, 832),
    "832*480": (832, 480),
    "1024*1024": (1024, 1024),
    "multitalk-480": (640, 640),
    "multitalk-720": (960, 960),
}

MAX_AREA_CONFIGS: dict[str, int] = {
    "720*1280": 720 * 1280,
    "1280*720": 1280 * 720,
    "480*832": 480 * 832,
    "832*480": 832 * 480,
    "multitalk-480": 640 * 640,
    "multitalk-720": 960 * 960,
}

_14B = ("720*1280", "1280*720", "480*832", "832*480")
_1_3B = ("480*832", "832*480")

SUPPORTED_SIZES: dict[str, tuple[str, ...]] = {
    "t2v-14B": _14B,
    "t2v-1.3B": _1_3B,
    "i2v-14B": _14B,
    "t2i-14B": tuple(SIZE_CONFIGS)[:5],
    "flf2v-14B": _14B,
    "vace-1.3B": _1_3B,
    "vace-14B": _14B,
    "multitalk-14B": ("multitalk-480", "multitalk-720"),
}
