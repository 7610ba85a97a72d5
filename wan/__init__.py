"""MultiTalk on Wan2.1: audio-driven talking-person video, in pure PyTorch.

Every public name is loaded at first use, so that `import wan` needs no torch, no GPU and no network.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import configs, distributed, modules
    from .first_last_frame2video import WanFLF2V
    from .image2video import WanI2V
    from .multitalk import MultiTalkPipeline
    from .text2video import WanT2V
    from .vace import WanVace, WanVaceMP

__all__ = [
    "MultiTalkPipeline",
    "WanFLF2V",
    "WanI2V",
    "WanT2V",
    "WanVace",
    "WanVaceMP",
    "configs",
    "distributed",
    "modules",
]

_HOME = {
    "MultiTalkPipeline": "multitalk",
    "WanFLF2V": "first_last_frame2video",
    "WanI2V": "image2video",
    "WanT2V": "text2video",
    "WanVace": "vace",
    "WanVaceMP": "vace",
}
_SUBPACKAGES = ("configs", "distributed", "modules", "utils")


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    if name in _SUBPACKAGES:
        return importlib.import_module(f".{name}", __name__)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
