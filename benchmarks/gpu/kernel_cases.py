"""Each Triton kernel at the size of a real forward: error against fp64, time beside eager PyTorch, bytes per
second.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from setting import error, timed
from torch import Tensor

from wan.kernels import reference, registry
from wan.modules import ops

SAMPLES = 3  # input sets in rotation, so that a cache can't hold them


def cases(device: torch.device, tokens: int) -> list[dict[str, Any]]:
    """One row a kernel of the registry, on `tokens` rows (VAE: one chunk of a 640×640 decode)."""
    large = {
        "rms_norm_rope": registry._example_rope(tokens),
        "rope": registry._example_rope(tokens, norm=False),
        "rms_norm": registry._example_norm("rms_norm", tokens),
        "layer_norm": registry._example_norm("layer_norm", tokens),
        "layer_norm_modulate": registry._example_norm("layer_norm_modulate", tokens),
        "gate_residual": registry._example_norm("gate_residual", tokens),
        "gate_residual_norm": registry._example_norm("gate_residual_norm", tokens),
        "residual_modulate": registry._example_norm("residual_modulate", tokens),
        "rms_norm_silu": registry._example_vae(last=False, channels=96, size=640),
        "rms_norm_silu_last": registry._example_vae(last=True, channels=96, size=640),
    }
    eager: dict[str, Callable[..., Any]] = {
        "rms_norm_rope": ops.rms_norm_rope,
        "rope": ops.rope,
        "rms_norm": ops.rms_norm,
        "layer_norm": ops.layer_norm,
        "layer_norm_modulate": ops.layer_norm_modulate,
        "gate_residual": ops.gate_residual,
        "gate_residual_norm": ops.gate_residual_norm,
        "residual_modulate": ops.gate_residual_norm,
    }
    rows = []
    for spec in registry.KERNELS:
        generator = torch.Generator(device).manual_seed(11)
        checked = _check(spec, device)
        samples = [large[spec.name](device, generator) for _ in range(SAMPLES)]
        moved = _bytes(samples[0][0], _tuple(spec.launch(*samples[0][0], **samples[0][1])))
        ms = _median(spec.launch, samples, device)
        plain = eager.get(spec.name, reference.rms_norm_silu)
        eager_ms = _median(plain, samples, device)
        rows.append(
            {
                "kernel": spec.name,
                "shape": list(samples[0][0][0].shape),
                "dtype": str(samples[0][0][0].dtype).removeprefix("torch."),
                **checked,
                "ms": round(ms, 4),
                "bytes": moved,
                "tb_s": round(moved / ms / 1e9, 3),
                "eager_ms": round(eager_ms, 4),
            }
        )
        del samples
        torch.cuda.empty_cache()
    return rows


def _check(spec: Any, device: torch.device) -> dict[str, Any]:
    """Fresh inputs of the registry's own size, three draws; the worst error of the kernel and of its
    reference.
    """
    own, reference_error = 0.0, 0.0
    for seed in range(3):
        args, kwargs = spec.example(device, torch.Generator(device).manual_seed(seed))
        want = _tuple(spec.reference(*[a.double() if isinstance(a, Tensor) else a for a in args], **kwargs))
        got, same = _tuple(spec.launch(*args, **kwargs)), _tuple(spec.reference(*args, **kwargs))
        own = max(own, *(error(g, w) for g, w in zip(got, want, strict=True)))
        reference_error = max(reference_error, *(error(s, w) for s, w in zip(same, want, strict=True)))
    return {"error": own, "reference_error": reference_error}


def _median(
    function: Callable[..., Any], samples: list[Any], device: torch.device, repeats: int = 12
) -> float:
    for args, kwargs in samples:
        function(*args, **kwargs)
    times = []
    for i in range(repeats):
        args, kwargs = samples[i % len(samples)]
        times.append(timed(lambda: function(*args, **kwargs), device))  # noqa: B023
    return statistics.median(times)


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def _bytes(args: tuple[Any, ...], out: tuple[Tensor, ...]) -> int:
    """Each input read once, each output written once."""
    return sum(t.nbytes for t in (*args, *out) if isinstance(t, Tensor))
