"""Fused Triton kernels of the DiT and the VAE, each beside a PyTorch reference.

Importing this package needs neither triton nor a GPU: the kernels and `KERNELS` (the registry that the smoke
suite compiles ahead of time) load on first use.

    from wan.kernels import rms_norm_rope, KERNELS
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

_LAZY = {
    "KERNELS": "registry",
    "KernelSpec": "registry",
    "FUSED": "ops",
    "rms_norm_rope": "rotary",
    "rope": "rotary",
    "rms_norm": "norm",
    "layer_norm": "norm",
    "layer_norm_modulate": "norm",
    "gate_residual": "norm",
    "gate_residual_norm": "norm",
    "rms_norm_silu": "vae",
    "bias_softmax": "softmax",
}
__all__ = ["available", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def available() -> bool:
    """True where triton can be imported (it says nothing about a GPU or a C compiler)."""
    return find_spec("triton") is not None
