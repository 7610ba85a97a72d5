"""What can be known before anything is loaded: device, attention backend, whether results can be kept.

A model that takes minutes to load and a video that takes hours to make must not end at a name.
"""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING

from multitalk_runtime.errors import JobFault

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    import torch

__all__ = ["check_run", "check_writable", "usable_device"]


def usable_device(name: str | torch.device, *, field: str = "device") -> torch.device:
    """A CPU or a GPU that is here. Raises JobFault for everything else that has a name."""
    import torch

    try:
        device = torch.device(name)
    except (RuntimeError, ValueError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        msg = f"there is no device {str(name)!r}"
        raise JobFault("job.invalid", msg, field=field, hint="use cuda, cuda:1 or cpu")
    count = torch.cuda.device_count() if device.type == "cuda" and torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        seen = f"{count} GPUs are seen" if count else "no GPU is seen (or torch is built without CUDA)"
        msg = f"there is no device {str(name)!r}: {seen}"
        hint = f"use cuda:0 to cuda:{count - 1}" if count else "use cpu, or see to the driver"
        raise JobFault("job.invalid", msg, field=field, hint=hint)
    return device


def check_run(flags: argparse.Namespace, output: Path, attention: str) -> None:
    """All of it for a command line. Nothing is made for `--dry-run`, and its device may be elsewhere.

    Raises JobFault with the flag.
    """
    from wan.attention_backends import NAMES

    if attention not in NAMES:
        msg = f"there is no backend {attention!r}"
        raise JobFault("job.invalid", msg, field="--attention", hint=f"use one of {', '.join(NAMES)}")
    if output.is_dir():
        msg = f"{str(output)!r} is a folder"
        raise JobFault("job.invalid", msg, field="--save_file", hint="name a file, without .mp4")
    if flags.dry_run:
        return
    device = usable_device(flags.device, field="--device") if flags.device else None
    on_cpu = device is not None and device.type == "cpu"
    if flags.kernels == "fused" and on_cpu and os.environ.get("TRITON_INTERPRET") != "1":
        msg = "the fused kernels need a GPU"
        raise JobFault("job.invalid", msg, field="--kernels", hint="leave it out on a CPU")
    if os.environ.get("RANK", "0") == "0":  # of several processes only the first one writes
        check_writable(output.parent, field="--save_file")
        if flags.audio_save_dir is not None:
            check_writable(flags.audio_save_dir, field="--audio_save_dir")


def check_writable(folder: Path, *, field: str) -> None:
    """Make the folder if it is not there, and a file in it, which is gone at once. Raises JobFault."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        msg = f"nothing can be written to {str(folder)!r}: {error.strerror}"
        raise JobFault("job.invalid", msg, field=field, hint="name another folder") from error
