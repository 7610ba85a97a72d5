"""With what a video was made: versions and switches, for replies and for the file itself."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multitalk_runtime.request import Request
    from wan.quality import Setting

__all__ = ["metadata", "versions"]

ATTENTION = ("xformers", "fa3-fwd", "flash-attn")  # what attention "auto" may take, besides torch


def versions() -> dict[str, str | None]:
    """Of everything whose change may change frames; None for what is not there."""
    import torch

    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    runtime = _version("multitalk-runtime")
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": None if cudnn is None else str(cudnn),
        "triton": _version("triton"),
        **{name: _version(name) for name in ATTENTION},
        "wan": runtime,
        "runtime": runtime,
    }


def metadata(request: Request, seed: int, setting: Setting) -> dict[str, Any]:
    """What is written into the video as its comment, so that it can be made again."""
    found = versions()
    return {
        "generator": "multitalk-runtime",
        "version": found["runtime"],
        "versions": found,
        "seed": seed,
        "size": request.size,
        "mode": request.mode,
        "frame_num": request.frame_num,
        "steps": request.steps,
        **setting.to_json(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # not installed, or run from a checkout
        return None
