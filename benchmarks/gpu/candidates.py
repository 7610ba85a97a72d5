"""Ways to compute self-attention that the card offers beside the one in use; each absent one with its reason.

Every candidate is called as a backend of `wan.attention_backends`: q [B, Lq, N, D], k, v [B, Lk, N, D] →
[B, Lq, N, D]. Nothing here is part of `wan` until it has won.
"""

from __future__ import annotations

import ctypes
import importlib
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from setting import timed
from torch import Tensor
from torch.nn import functional

from wan.attention_backends import AttentionBackend
from wan.flash3 import PACKAGES

Attend = Callable[..., Tensor]
LOSSY = ("fp8",)
LONG = 4096  # keys from which attention is self-attention, the only one that candidates take over


class Candidate:
    """Self-attention by `attend`; what is shorter (text, image, audio) by PyTorch's choice, cuDNN."""

    def __init__(self, name: str, attend: Attend) -> None:
        self.name, self.attend, self.short = name, attend, AttentionBackend(name="sdpa")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if k.shape[1] < LONG or any(options.values()):
            return self.short(q, k, v, **options)
        return self.attend(q, k, v)

    def kernel_for(self, q: Tensor, v_dim: int | None = None) -> str:
        return self.name


def in_parts(attend: Attend, parts: int) -> Attend:
    """Heads in `parts` launches: fewer keys and values at once compete for the L2 cache."""

    def split(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        cut = [t.chunk(parts, dim=2) for t in (q, k, v, out)]
        for a, b, c, o in zip(*cut, strict=True):
            o.copy_(attend(a, b, c))
        return out

    return split


def heads_as_batch(attend: Attend) -> Attend:
    """Each head a sample of its own: [B·N, L, 1, D], by views."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(*(t[0].transpose(0, 1)[:, :, None] for t in (q, k, v)))  # [N, L, 1, D]
        return out[:, :, 0].transpose(0, 1)[None]

    return call


class CudnnPlans:
    """cuDNN's own graph API (nvidia-cudnn-frontend): every plan that its heuristics know, timed, the fastest
    kept for each shape and strides. `plans` lists (name, ms or why not), fastest first.

    PyTorch asks the same library, but takes its first suggestion.
    """

    def __init__(self, rounds: int = 3) -> None:
        import cudnn  # after torch, so that both use one libcudnn

        self.cudnn, self.rounds = cudnn, rounds
        self.handle = cudnn.create_handle()
        self.version = f"{cudnn.__version__}, cuDNN {cudnn.backend_version()}"
        self.plans: list[dict[str, Any]] = []
        self._built: dict[Any, Any] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        key = tuple((t.shape, t.stride()) for t in (q, k, v))
        if key not in self._built:
            self._built[key] = self._choose(q, k, v, out)
        self._run(self._built[key], (q, k, v, out))
        return out

    def _choose(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Any:
        graph, names = self._graph((q, k, v, out))
        found = []
        for index in range(graph.get_execution_plan_count()):
            name = graph.get_plan_name_at_index(index)
            try:
                graph.build_plan_at_index(index)
                size = graph.get_workspace_size_plan_at_index(index)
                space = torch.empty(max(size, 1), dtype=torch.uint8, device=q.device)
                plan = (graph, names, index, space)
                self._run(plan, (q, k, v, out))
                ms = statistics.median(
                    timed(lambda p=plan: self._run(p, (q, k, v, out)), q.device) for _ in range(self.rounds)
                )
                found.append({"plan": name, "ms": round(ms, 3), "built": plan})
            except Exception as error:  # noqa: BLE001  (a plan that can't be built is a result, too)
                self.plans.append({"plan": name, "error": str(error)[:120]})
        if not found:
            msg = f"cuDNN has no plan for {tuple(q.shape)}: {self.plans}"
            raise RuntimeError(msg)
        found.sort(key=lambda row: row["ms"])
        self.plans = [{k: row[k] for k in ("plan", "ms")} for row in found] + self.plans
        return found[0]["built"]

    def _graph(self, tensors: tuple[Tensor, ...]) -> tuple[Any, list[Any]]:
        cudnn = self.cudnn
        cudnn.set_stream(self.handle, torch.cuda.current_stream().cuda_stream)
        kind = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float16: cudnn.data_type.HALF}
        graph = cudnn.pygraph(
            io_data_type=kind[tensors[0].dtype],
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            handle=self.handle,
        )
        heads_first = [t.transpose(1, 2) for t in tensors]  # [B, N, L, D], as cuDNN counts dimensions
        q, k, v = (
            graph.tensor(name=n, dim=list(t.shape), stride=list(t.stride()), data_type=kind[tensors[0].dtype])
            for n, t in zip("qkv", heads_first[:3], strict=True)
        )
        out, _ = graph.sdpa(name="sdpa", q=q, k=k, v=v, is_inference=True, attn_scale=q_scale(tensors[0]))
        out.set_output(True).set_dim(list(heads_first[3].shape)).set_stride(list(heads_first[3].stride()))
        graph.validate()
        graph.build_operation_graph()
        modes = cudnn.heur_mode
        graph.create_execution_plans([modes.A, modes.B, modes.FALLBACK])
        return graph, [q, k, v, out]

    def _run(self, plan: Any, tensors: tuple[Tensor, ...]) -> None:
        graph, names, index, space = plan
        self.cudnn.set_stream(self.handle, torch.cuda.current_stream().cuda_stream)
        pack = dict(zip(names, tensors, strict=True))
        graph.execute_plan_at_index(pack, space, index, handle=self.handle)


def q_scale(q: Tensor) -> float:
    return q.shape[-1] ** -0.5


def package(name: str) -> Attend:
    """flash-attn 3 (`PACKAGES` of wan.flash3) or 4 (`flash_attn.cute`); ImportError where absent."""
    func = importlib.import_module(name).flash_attn_func

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = func(q, k, v, softmax_scale=q_scale(q))
        return out[0] if isinstance(out, tuple) else out

    return call


def flash_3() -> Attend:
    """flash-attn 3 by a package of its own, or the copy that xformers carries (0.0.31 to 0.0.34; CUDA 12).

    The library of xformers 0.0.34 uses PyTorch's stable ABI, so it loads under newer PyTorch, too, with a
    libcudart.so.12 (nvidia-cuda-runtime-cu12) beside it: only `xformers/flash_attn_3/_C.so` need be there.
    With two libcudart in one process cuDNN's own API refuses to work.
    """
    for name in PACKAGES:
        try:
            return package(name)
        except (ImportError, OSError):
            continue
    for place in map(Path, sys.path):
        library = place / "xformers/flash_attn_3/_C.so"
        if not library.is_file():
            continue
        for runtime in place.glob("nvidia/cuda_runtime/lib/libcudart.so.12"):
            ctypes.CDLL(str(runtime), ctypes.RTLD_GLOBAL)
        torch.ops.load_library(str(library))

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.ops.flash_attn_3.fwd(q, k, v, softmax_scale=q_scale(q), num_splits=1)[0]

        return call
    msg = f"none of {', '.join(PACKAGES)} and xformers/flash_attn_3/_C.so"
    raise ImportError(msg)


def torch_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own choice: on a CPU the only candidate there is."""
    return functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def candidates(device: torch.device) -> tuple[dict[str, Attend], dict[str, str]]:
    """(name → attention, name → why it is absent)."""
    if device.type != "cuda":
        return {"sdpa": torch_sdpa, "sdpa, 2 launches": in_parts(torch_sdpa, 2)}, {"cuDNN plans": "no GPU"}
    cudnn = AttentionBackend(name="cudnn")
    found: dict[str, Attend] = {
        "cuDNN": cudnn,
        "cuDNN, 4 launches": in_parts(cudnn, 4),
        "cuDNN, 8 launches": in_parts(cudnn, 8),
        "cuDNN, heads as batch": heads_as_batch(cudnn),
        "flash": AttentionBackend(name="flash"),
        "efficient": AttentionBackend(name="efficient"),
    }
    absent: dict[str, str] = {}
    makers: dict[str, Callable[[], Attend]] = {
        "cuDNN plans": CudnnPlans,
        "flash-attn 3": flash_3,
        "fp8": lambda: AttentionBackend(name="fp8"),
        "flash-attn 4": lambda: package("flash_attn.cute"),
    }
    for name, make in makers.items():
        try:
            found[name] = make()
        except Exception as error:  # noqa: BLE001  (whatever a package does when it can't run here)
            absent[name] = f"{type(error).__name__}: {error}"[:200]
    return found, absent
