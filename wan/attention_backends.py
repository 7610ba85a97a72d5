"""Which attention kernel runs: chosen once, by name, and reported. Nothing here falls back silently.

| name | what runs |
|---|---|
| `auto` (default) | on Hopper in bf16 flash-attn 3, if a package here carries it (`wan.flash3`): the |
|  | fastest exact one as measured (docs/performance.md); everywhere else what `sdpa` says |
| `sdpa` | PyTorch's own: cuDNN on Hopper if the loaded cuDNN is ≥ 9.15.1, else the flash kernel; |
|  | what flash can't do (fp32, heads wider than 256, GPUs before Ampere): the memory-efficient one; |
|  | on a CPU: the CPU's |
| `cudnn`, `flash`, `efficient`, `math` | exactly that kernel of PyTorch, or an error |
| `xformers`, `flash_attn` | that package (flash-attn 3 before 2), or an error |
| `sage` | SageAttention, int8 inside: lossy, therefore never chosen unless asked for by name |
| `fp8` | flash-attn 3 with queries, keys and values rounded to fp8: lossy, the same; fewer than 1024 keys, |
|  | where rounding would cost more than it saves, run as `auto` |

Layout everywhere: q [B, Lq, N, D], k and v [B, Lk, N, D or Dv] → [B, Lq, N, Dv] in q's dtype. Differing
lengths in one batch run sample by sample on the valid part, so that no kernel needs a mask and every kernel
gives the same answer.

cuDNN before 9.15.1 gave wrong results for lengths that 128 does not divide, hence the floor.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import flash3
from .quality import LOSSY_ATTENTION

NAMES = ("auto", "sdpa", "cudnn", "flash", "efficient", "math", "xformers", "flash_attn", "sage", "fp8")
LOSSY = LOSSY_ATTENTION
CUDNN_FLOOR = 91501

_SDPA = {
    "cudnn": "CUDNN_ATTENTION",
    "flash": "FLASH_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "math": "MATH",
}
_FLASH3 = ("flash_attn_3", "flash_attn", "fp8")  # kernels that may be flash-attn 3's
MANY_KEYS = 1024
_HALF = (torch.float16, torch.bfloat16)

Kernel = Callable[..., Tensor]


class AttentionBackendError(RuntimeError):
    """The requested attention backend can't run here; the message says why and what to choose instead."""


@dataclass(frozen=True, kw_only=True)
class AttentionBackend:
    """A chosen backend. Call it with q, k, v; `kernel_for(q)` says what runs, `describe(q)` reports it."""

    name: str = "auto"

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            msg = f"unknown attention backend {self.name!r}; choose one of {', '.join(NAMES)}"
            raise AttentionBackendError(msg)
        if self.name in ("xformers", "flash_attn", "sage"):
            _package_kernel(self.name)
        if self.name in _SDPA and not hasattr(SDPBackend, _SDPA[self.name]):
            msg = f"attention backend {self.name!r} does not exist in torch {torch.__version__}; use 'sdpa'"
            raise AttentionBackendError(msg)

    def kernel_for(self, q: Tensor, v_dim: int | None = None) -> str:
        """The kernel that runs for queries like `q`: by the rule of `auto` or `sdpa`, or the name itself."""
        if self.name not in ("auto", "sdpa"):
            return self.name
        if q.device.type != "cuda":
            return "cpu" if q.device.type == "cpu" else "default"
        head_dim = q.shape[-1]
        same_width = v_dim in (None, head_dim)
        capability = _capability(q.device)
        if self.name == "auto" and flash3_takes(q) and same_width and flash3.find()[0] is not None:
            return "flash_attn_3"
        if q.dtype not in _HALF or capability < (8, 0) or head_dim > 256 or not same_width:
            return "efficient"
        if capability == (9, 0) and head_dim % 8 == 0 and head_dim <= 128 and _cudnn() >= CUDNN_FLOOR:
            return "cudnn"
        return "flash"

    def module_for(self, q: Tensor) -> str:
        """The module whose kernel that is: "torch" where it is PyTorch's own."""
        kernel = self.kernel_for(q)
        found = flash3.find()[0] if flash3_takes(q) and kernel in _FLASH3 else None
        if found and (found.descales or kernel == "flash_attn_3"):
            return found.source
        return {"xformers": "xformers", "flash_attn": "flash_attn", "sage": "sageattention"}.get(
            kernel, "torch"
        )

    def describe(self, q: Tensor) -> dict[str, object]:
        """For logs and evidence: the backend asked for, the kernel that runs for `q`, and the facts behind
        it.
        """
        return {
            "backend": self.name,
            "kernel": self.kernel_for(q),
            "module": self.module_for(q),
            "lossy": self.name in LOSSY,
            "flash_attn_3": self._flash3(q),
            "torch": torch.__version__,
            "cudnn": _cudnn() if q.device.type == "cuda" else None,
            "capability": ".".join(map(str, _capability(q.device))) if q.device.type == "cuda" else None,
        }

    def _flash3(self, q: Tensor) -> str | None:
        """The module that flash-attn 3 comes from, or why there is none; None where it doesn't matter."""
        if self.name not in ("auto", "fp8") or not flash3_takes(q):
            return None
        found, absent = flash3.find()
        return found.source if found else "; ".join(f"{name}: {why}" for name, why in absent.items())

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        q_lens: Tensor | list[int] | None = None,
        k_lens: Tensor | list[int] | None = None,
        scale: float | None = None,
        causal: bool = False,
        window: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        """softmax(q·kᵀ·scale)·v. Rows of q past `q_lens` are zero in the result; keys past `k_lens` are not
        seen.

        Raises AttentionBackendError when the backend was asked for by name and can't do this call.
        """
        if causal and self.name == "auto":  # flash-attn 3 aligns the mask of unequal lengths otherwise
            aligned = AttentionBackend(name="sdpa")
            return aligned(q, k, v, q_lens=q_lens, k_lens=k_lens, scale=scale, causal=True, window=window)
        kernel = self._kernel(q, v.shape[-1], window)
        if q_lens is None and k_lens is None:
            return kernel(q, k, v, scale=scale, causal=causal)
        out = q.new_zeros(*q.shape[:-1], v.shape[-1])
        q_sizes = _sizes(q_lens, q.shape[0], q.shape[1])
        k_sizes = _sizes(k_lens, k.shape[0], k.shape[1])
        for i, (rows, keys) in enumerate(zip(q_sizes, k_sizes, strict=True)):
            part = kernel(
                q[i : i + 1, :rows], k[i : i + 1, :keys], v[i : i + 1, :keys], scale=scale, causal=causal
            )
            out[i, :rows] = part[0]
        return out

    def _kernel(self, q: Tensor, v_dim: int, window: tuple[int, int]) -> Kernel:
        name = self.kernel_for(q, v_dim)
        if name == "flash_attn":
            return partial(_package_kernel(name), window=window)
        if name == "cudnn" and _cudnn() < CUDNN_FLOOR:
            msg = f"attention backend 'cudnn': cuDNN {_cudnn()} gives wrong results, {CUDNN_FLOOR} does not"
            raise AttentionBackendError(msg)
        if tuple(window) != (-1, -1):
            msg = f"attention backend {self.name!r} has no sliding window {tuple(window)}; use 'flash_attn'"
            raise AttentionBackendError(msg)
        if name in ("xformers", "sage"):
            return _package_kernel(name)
        if name == "fp8":
            return _fp8
        if name == "flash_attn_3":
            found = flash3.find()[0]
            assert found is not None  # kernel_for has looked
            return found
        return partial(_sdpa, name, self.name)


def flash3_takes(q: Tensor) -> bool:
    """Whether flash-attn 3 from any source can compute queries like `q` [B, L, N, D] on their device."""
    on_hopper = q.device.type == "cuda" and _capability(q.device) == (9, 0)
    return on_hopper and q.dtype == torch.bfloat16 and q.shape[-1] in (64, 128, 256)


def _sdpa(
    kernel: str, asked: str, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, causal: bool
) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # views: the kernels take the strides
    if kernel in ("cpu", "default"):
        out = F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=causal)
    else:
        try:
            with sdpa_kernel(getattr(SDPBackend, _SDPA[kernel])):
                out = F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=causal)
        except RuntimeError as e:
            if "No available kernel" not in str(e) and "No viable backend" not in str(e):
                raise
            msg = (
                f"attention backend {asked!r} means kernel {kernel!r}, which refuses q {tuple(q.shape)} "
                f"{q.dtype} on {q.device} (torch {torch.__version__}, cuDNN {_cudnn()}); choose another"
            )
            raise AttentionBackendError(msg) from e
    return out.transpose(1, 2)


def _fp8(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, causal: bool) -> Tensor:
    if k.shape[1] < MANY_KEYS:
        return AttentionBackend()(q, k, v, scale=scale, causal=causal)
    if not flash3_takes(q):
        need = "bf16 on a GPU of compute capability 9.0"
        msg = f"attention backend 'fp8' needs {need}; got {q.dtype} on {q.device}. Use 'auto'"
        raise AttentionBackendError(msg)
    found, absent = flash3.find()
    if found is None or not found.descales:
        have = f"{found.source} has it for bf16 alone" if found else f"there is none: {absent}"
        msg = (
            f"attention backend 'fp8' needs flash-attn 3 built for fp8; {have}. Install fa3-fwd or use 'auto'"
        )
        raise AttentionBackendError(msg)
    return found.fp8(q, k, v, scale=scale, causal=causal)


@cache
def _package_kernel(name: str) -> Kernel:
    if name == "xformers":
        ops = _import("xformers.ops", name)

        def xformers(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, causal: bool) -> Tensor:
            bias = ops.LowerTriangularMask() if causal else None
            return ops.memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale)

        return xformers
    if name == "sage":
        module = _import("sageattention", name)

        def sage(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, causal: bool) -> Tensor:
            half = (
                q.dtype if q.dtype in _HALF else torch.bfloat16
            )  # it computes garbage on mixed or wide dtypes
            q16, k16, v16 = (t.to(half) for t in (q, k, v))
            out = module.sageattn(q16, k16, v16, tensor_layout="NHD", is_causal=causal, sm_scale=scale)
            return out.to(q.dtype)

        return sage
    return _flash_attn_kernel()


def _flash_attn_kernel() -> Kernel:
    found = flash3.find()[0]
    if found is None or not found.descales:
        _import("flash_attn", "flash_attn")  # else asked for when flash-attn 3 can't do a call

    def flash_attn(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None,
        causal: bool,
        window: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        if q.dtype not in _HALF:
            msg = f"attention backend 'flash_attn' needs fp16 or bf16, got {q.dtype}; use 'sdpa'"
            raise AttentionBackendError(msg)
        # On another GPU flash-attn 3 would end the process, and not every build of it has windows.
        if found and found.descales and flash3_takes(q) and tuple(window) == (-1, -1):
            return found(q, k, v, scale=scale, causal=causal)
        func = _import("flash_attn", "flash_attn").flash_attn_func
        out = func(q, k, v, softmax_scale=scale, causal=causal, window_size=tuple(window))
        return out[0] if isinstance(out, tuple) else out  # version 3 also returns the log-sum-exp

    return flash_attn


def _import(module: str, name: str) -> object:
    try:
        return importlib.import_module(module)
    except ImportError as e:
        msg = f"attention backend {name!r}: {module} can't be imported ({e}); install it or use 'sdpa'"
        raise AttentionBackendError(msg) from e


def _sizes(lens: Tensor | list[int] | None, batch: int, full: int) -> list[int]:
    if lens is None:
        return [full] * batch
    sizes = [int(n) for n in lens]
    if len(sizes) != batch or max(sizes) > full or min(sizes) < 1:
        msg = f"lengths {sizes} do not fit a batch of {batch} with {full} rows"
        raise ValueError(msg)
    return sizes


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _cudnn() -> int:
    return torch.backends.cudnn.version() or 0
