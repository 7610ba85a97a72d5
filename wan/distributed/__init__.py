"""Several processes, by `torch.distributed` alone: sequence parallel, branch (CFG) parallel, their hybrid,
FSDP.

torchrun --nproc-per-node 2 …   then   init_from_environment(); model.use(parallel=UlyssesParallel())
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_LAZY = {
    "init_from_environment": "launch",
    "Launch": "launch",
    "UlyssesParallel": "xdit_context_parallel",
    "BranchParallel": "branches",
    "plan_rounds": "branches",
    "shard_model": "fsdp",
    "free_model": "fsdp",
}
__all__ = [*_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
