"""Each Triton kernel at the size of a real forward: error against fp64, time beside eager PyTorch, bytes per
second.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from setting import error, timed
from sheet import say
from torch import Tensor

from wan.kernels import registry
from wan.modules import ops

SAMPLES = 3  # input sets in rotation, so that a cache can't hold them
SIDE = 640  # of a VAE chunk
AHEAD_BYTES, AHEAD_FILLS = 2**30, 12  # 3 ms on an H200; nothing of a sample is left in a cache
Maker = Callable[[int, int], registry.Example]  # rows, side of a VAE chunk → inputs of that size


def _norm(kind: str) -> Maker:
    return lambda rows, _: registry._example_norm(kind, rows)


def _fp8(kind: str) -> Maker:
    return lambda rows, _: registry._example_fp8(kind, rows)


LARGE: dict[str, Maker] = {
    "rms_norm_rope": lambda rows, _: registry._example_rope(rows),
    "rope": lambda rows, _: registry._example_rope(rows, norm=False),
    "rms_norm": _norm("rms_norm"),
    "layer_norm": _norm("layer_norm"),
    "layer_norm_modulate": _norm("layer_norm_modulate"),
    "gate_residual": _norm("gate_residual"),
    "gate_residual_norm": _norm("gate_residual_norm"),
    "residual_modulate": _norm("residual_modulate"),
    "bias_softmax": lambda rows, _: registry._example_softmax(max(1, rows // 21), frames=21),
    "rms_norm_silu": lambda _, side: registry._example_vae(last=False, channels=96, size=side),
    "rms_norm_silu_last": lambda _, side: registry._example_vae(last=True, channels=96, size=side),
    "quantize_rows": _fp8("rows"),
    "gelu_quantize_rows": _fp8("gelu"),
    "layer_norm_modulate_quantize": _fp8("modulate"),
    "gate_residual_norm_quantize": _fp8("affine"),
    "head_extremes": lambda rows, _: registry._example_heads(rows, quantize=False),
    "quantize_heads": lambda rows, _: registry._example_heads(rows),
}
LEFT_OUT: dict[str, str] = {}  # kernels of the registry without a case, each with the reason
EAGER: dict[str, Callable[..., Any]] = {  # what the model calls without kernels; of others the reference
    "rms_norm_rope": ops.rms_norm_rope,
    "rope": ops.rope,
    "rms_norm": ops.rms_norm,
    "layer_norm": ops.layer_norm,
    "layer_norm_modulate": ops.layer_norm_modulate,
    "gate_residual": ops.gate_residual,
    "gate_residual_norm": ops.gate_residual_norm,
    "residual_modulate": ops.gate_residual_norm,
}


def cases(device: torch.device, tokens: int, side: int = SIDE, repeats: int = 12) -> list[dict[str, Any]]:
    """One row a kernel of the registry, on `tokens` rows (VAE: one chunk of a decode of that side). A kernel
    that fails has the reason in its row.
    """
    rows = []
    for spec in registry.KERNELS:
        if spec.name in LEFT_OUT:
            continue
        try:
            rows.append(_case(spec, device, LARGE[spec.name](tokens, side), repeats))
        except Exception as problem:  # noqa: BLE001  (the other kernels are still worth measuring)
            reason = f"{type(problem).__name__}: {problem}"[:300]
            rows.append({"kernel": spec.name, "failed": reason})
            say(f"{spec.name}: {reason}")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def _case(spec: Any, device: torch.device, example: registry.Example, repeats: int) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(11)
    checked = _check(spec, device)
    samples = [example(device, generator) for _ in range(SAMPLES)]
    args, kwargs = samples[0]
    moved = _bytes(args, _tuple(spec.launch(*args, **kwargs)))
    ms = _median(spec.launch, samples, device, repeats)
    eager_ms = _median(EAGER.get(spec.name, spec.reference), samples, device, repeats)
    return {
        "kernel": spec.name,
        "shape": list(args[0].shape),
        "dtype": str(args[0].dtype).removeprefix("torch."),
        **checked,
        "ms": round(ms, 4),
        "bytes": moved,
        "tb_s": round(moved / ms / 1e9, 3),
        "eager_ms": round(eager_ms, 4),
    }


def _check(spec: Any, device: torch.device) -> dict[str, Any]:
    """Fresh inputs of the registry's own size, three draws; the worst error of the kernel and of its
    reference.
    """
    own, reference_error = 0.0, 0.0
    for seed in range(3):
        args, kwargs = spec.example(device, torch.Generator(device).manual_seed(seed))
        wide = [a.double() if isinstance(a, Tensor) else a for a in args]
        want = _decoded(spec.reference(*wide, **kwargs))
        got, same = _decoded(spec.launch(*args, **kwargs)), _decoded(spec.reference(*args, **kwargs))
        own = max(own, *(error(g, w) for g, w in zip(got, want, strict=True)))
        reference_error = max(reference_error, *(error(s, w) for s, w in zip(same, want, strict=True)))
    return {"error": own, "reference_error": reference_error}


def _median(function: Callable[..., Any], samples: list[Any], device: torch.device, repeats: int) -> float:
    """A call's milliseconds, the samples one after the other, behind fills of a buffer: launching takes the
    host longer than the smallest kernels run.
    """

    def all_samples() -> None:
        for args, kwargs in samples:
            function(*args, **kwargs)

    all_samples()
    ahead = torch.empty(AHEAD_BYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    times = [
        timed(all_samples, device, ahead=lambda: [ahead.zero_() for _ in range(AHEAD_FILLS)])
        for _ in range(repeats)
    ]
    return statistics.median(times) / len(samples)


def _decoded(value: Any) -> tuple[Tensor, ...]:
    """The outputs, fp8 rows times their scales; fp8 without them as it is."""
    found = _tuple(value)
    if len(found) < 2 or found[-2].dtype != torch.float8_e4m3fn:
        return found
    *before, data, scale = found
    return *before, data.double() * scale.double()


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def _bytes(args: tuple[Any, ...], out: tuple[Tensor, ...]) -> int:
    """Each input read once, each output written once."""
    return sum(t.nbytes for t in (*args, *out) if isinstance(t, Tensor))
