"""The networks. Names load at first use."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = [
    "HuggingfaceTokenizer",
    "T5Decoder",
    "T5Encoder",
    "T5EncoderModel",
    "T5Model",
    "VaceWanModel",
    "WanModel",
    "WanVAE",
    "flash_attention",
]

_HOME = {
    "HuggingfaceTokenizer": "tokenizers",
    "T5Decoder": "t5",
    "T5Encoder": "t5",
    "T5EncoderModel": "t5",
    "T5Model": "t5",
    "VaceWanModel": "vace_model",
    "WanModel": "model",
    "WanVAE": "vae",
    "flash_attention": "attention",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    try:
        return importlib.import_module(f".{name}", __name__)
    except ModuleNotFoundError as e:
        if e.name != f"{__name__}.{name}":
            raise
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
