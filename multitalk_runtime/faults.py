"""From what the model, torch and the file system raise to what a caller can act on."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from multitalk_runtime.errors import CancelledFault, CudaFault, Fault, InternalFault, JobFault, ModelFault

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["as_faults", "to_fault"]

# What torch and its libraries write into a plain RuntimeError when the GPU fails.
_GPU_WORDS = ("CUDA error", "cuBLAS", "CUBLAS", "cuDNN", "CUDNN", "NCCL", "device-side assert", "CUDA driver")


@contextmanager
def as_faults() -> Iterator[None]:
    """Raise a Fault for every exception that means something to a caller; others pass as they are."""
    try:
        yield
    except Exception as error:
        fault = to_fault(error)
        if fault is None or fault is error:
            raise
        raise fault from error


def to_fault(error: Exception) -> Fault | None:
    """The fault that stands for `error`; None if it means nothing to a caller (the core says `internal`)."""
    import torch

    from wan.attention_backends import AttentionBackendError
    from wan.progress import Cancelled
    from wan.quality import QualityError
    from wan.tensor_files import CheckpointError

    if isinstance(error, Fault):
        return error
    if isinstance(error, Cancelled):
        return CancelledFault("cancelled.by_caller", str(error))
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return CudaFault("cuda.out_of_memory", "the GPU's memory was not enough")
    if isinstance(error, MemoryError):
        return ModelFault("model.memory", "the machine's memory was not enough")
    if isinstance(error, CheckpointError):
        code = "model.missing" if "no such" in error.problem else "model.invalid"
        return ModelFault(code, f"{error.path.name}: {error.problem.partition(chr(10))[0]}")
    if isinstance(error, AttentionBackendError):
        return JobFault("job.invalid", str(error), field="attention")
    if isinstance(error, QualityError):
        return JobFault("job.quality", str(error), field="quality")
    if isinstance(error, RuntimeError) and any(word in str(error) for word in _GPU_WORDS):
        return CudaFault("cuda.error", "the GPU reported an error")
    if isinstance(error, ValueError | FileNotFoundError):
        return JobFault("job.invalid", str(error).partition("\n")[0])
    if isinstance(error, OSError) and error.errno == 28:  # ENOSPC
        return InternalFault("internal", "the worker's disk is full", hint="tell the operator")
    return None
