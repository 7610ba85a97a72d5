"""With what a video was made: versions and switches, for replies and for the file itself."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from multitalk_runtime.request import Request
    from wan.quality import Setting

__all__ = ["attention", "metadata", "versions"]

PACKAGES = ("xformers", "fa3-fwd", "flash-attn")  # what attention "auto" may take, besides torch


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
        **{name: _version(name) for name in PACKAGES},
        "wan": runtime,
        "runtime": runtime,
    }


def attention(backend: str, head_dim: int, device: torch.device) -> dict[str, str]:
    """What computes self-attention in bf16 with heads of `head_dim`: the kernel, and the module it is from.

    `auto` names a rule and not a kernel: on one GPU it is cuDNN's, on the next flash-attn 3 of some package.
    """
    import torch

    from wan.attention_backends import AttentionBackend

    query = torch.empty(1, 1, 1, head_dim, dtype=torch.bfloat16, device=device)
    found = AttentionBackend(name=backend).describe(query)
    return {name: str(found[name]) for name in ("kernel", "module")}


def metadata(request: Request, seed: int, setting: Setting, kernel: dict[str, str]) -> dict[str, Any]:
    """What is written into the video as its comment, so that it can be made again.

    Prompt, picture and sound are the caller's own and stay out of a file that is handed on.
    """
    found = versions()
    return {
        "generator": "multitalk-runtime",
        "version": found["runtime"],
        "versions": found,
        "attention_kernel": kernel["kernel"],
        "attention_module": kernel["module"],
        "seed": seed,
        "size": request.size,
        "mode": request.mode,
        "frame_num": request.frame_num,
        "motion_frame": request.overlap,
        "steps": request.steps,
        "audio_type": request.audio_type,
        "bbox": None if request.bbox is None else {name: list(box) for name, box in request.bbox.items()},
        "apg": {"momentum": request.apg_momentum, "norm_threshold": request.apg_norm_threshold}
        if request.use_apg
        else None,
        "color_correction_strength": request.color_correction_strength,
        **setting.to_json(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # not installed, or run from a checkout
        return None
