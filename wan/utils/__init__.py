"""Samplers, preprocessing, guidance and saving. Names load at first use."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = [
    "FlowDPMSolverMultistepScheduler",
    "FlowUniPCMultistepScheduler",
    "VaceVideoProcessor",
    "get_sampling_sigmas",
    "retrieve_timesteps",
]

_HOME = {
    "FlowDPMSolverMultistepScheduler": "fm_solvers",
    "FlowUniPCMultistepScheduler": "fm_solvers_unipc",
    "VaceVideoProcessor": "vace_processor",
    "get_sampling_sigmas": "fm_solvers",
    "retrieve_timesteps": "fm_solvers",
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
