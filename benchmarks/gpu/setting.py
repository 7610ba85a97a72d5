"""What every GPU measurement shares: the real-width model with random weights, its inputs, the facts, the
clock.
"""

from __future__ import annotations

import math
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wan.modules.multitalk_model import WanModel

REAL = {
    "in_dim": 36,
    "dim": 5120,
    "ffn_dim": 13824,
    "num_heads": 40,
    "num_layers": 40,
}
TINY = {
    "in_dim": 36,
    "dim": 256,
    "ffn_dim": 512,
    "num_heads": 2,
    "num_layers": 3,
    "text_dim": 64,
    "text_len": 16,
    "context_tokens": 8,
    "intermediate_dim": 16,
}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What is run: model sizes, latent size [T, h, w] and how often."""

    config: dict[str, int]
    latent: tuple[int, int, int]
    repeats: int

    @property
    def grid(self) -> tuple[int, int, int]:
        frames, height, width = self.latent
        return frames, height // 2, width // 2

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def frames(self) -> int:
        return 4 * (self.latent[0] - 1) + 1


def scale(*, tiny: bool, repeats: int) -> Scale:
    if tiny:
        return Scale(config=TINY, latent=(3, 8, 8), repeats=repeats)
    return Scale(config=REAL, latent=(21, 80, 80), repeats=repeats)


def build(config: dict[str, int], device: torch.device, dtype: torch.dtype, seed: int = 0) -> WanModel:
    """The audio DiT with random weights made on the device: no file, no host copy.

    W ~ N(0, 1/fan_in), biases N(0, 0.02), norm weights 1 + N(0, 0.1), modulation N(0, 1)/√dim: activations
    keep their size through 40 blocks and the output is not zero.
    """
    with torch.device("meta"):
        model = WanModel(**config).to(dtype)
    model = model.to_empty(device=device).requires_grad_(False).eval()
    generator = torch.Generator(device).manual_seed(seed)
    for name, p in model.named_parameters():
        if "modulation" in name:
            p.normal_(0, config["dim"] ** -0.5, generator=generator)
        elif p.ndim == 1 and name.endswith("weight"):
            p.normal_(1, 0.1, generator=generator)
        elif name.endswith("bias"):
            p.normal_(0, 0.02, generator=generator)
        else:
            p.normal_(0, math.prod(p.shape[1:]) ** -0.5, generator=generator)
    return model


def inputs(
    model: WanModel, size: Scale, device: torch.device, dtype: torch.dtype, people: int = 1, seed: int = 1
) -> dict[str, Any]:
    """Arguments of `WanModel.forward`, random."""
    g = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=g, device=device).to(to)

    left = torch.zeros(size.latent[1:], device=device)
    left[2:-2, 2 : size.latent[2] // 2] = 1
    masks = torch.stack((left, left.flip(1), 1 - left - left.flip(1)))
    return {
        "x": [randn(16, *size.latent, to=torch.float32)],
        "t": torch.tensor([800.0], device=device),
        "context": [randn(min(100, model.text_len), model.text_dim)],
        "seq_len": size.tokens,
        "clip_fea": randn(1, 257, 1280),
        "y": randn(1, 20, *size.latent),
        "audio": randn(people, size.frames, 5, 12, 768),
        "ref_target_masks": masks,
    }


def first_layers(model: WanModel, layers: int, config: dict[str, int]) -> WanModel:
    """A model of the first `layers` blocks that shares every weight with `model`."""
    with torch.device("meta"):
        part = WanModel(**(config | {"num_layers": layers})).to(model.dtype)
    for name, child in model.named_children():
        setattr(part, name, nn.ModuleList(child[:layers]) if name == "blocks" else child)
    return part.eval()


def shadow(model: WanModel, config: dict[str, int]) -> WanModel:
    """A second model of the same weights in the same memory, whose modules can be changed on their own."""
    with torch.device("meta"):
        twin = WanModel(**config).to(model.dtype)
    twin.load_state_dict(model.state_dict(), assign=True)
    return twin.eval().requires_grad_(False)


def facts(device: torch.device) -> dict[str, Any]:
    """Versions, GPU, driver: what a figure means nothing without."""
    out: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import triton

        out["triton"] = triton.__version__
    except ImportError:
        out["triton"] = None
    if device.type != "cuda":
        return out | {"gpu": None, "cudnn": None}
    properties = torch.cuda.get_device_properties(device)
    query = "name,driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu"
    smi = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    return out | {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "nvidia_smi": smi.stdout.strip().splitlines()[:1],
    }


def timed(
    function: Callable[[], Any], device: torch.device, *, ahead: Callable[[], Any] | None = None
) -> float:
    """One call in milliseconds, between device events (a host clock on the CPU).

    ahead: work that keeps the device busy while the host launches what `function` holds, so that only the
    device's own time counts; it is not part of the result.
    """
    if device.type != "cuda":
        from time import perf_counter

        start = perf_counter()
        function()
        return (perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    if ahead is not None:
        ahead()
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def peak_gib(function: Callable[[], Any], device: torch.device, beside: int = 0) -> float | None:
    """The most memory allocated during a call, weights included, less `beside` bytes that are not its own."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return round((torch.cuda.max_memory_allocated(device) - beside) / 2**30, 2)


def error(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖ in fp64."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def forward_pflop(
    config: dict[str, int], tokens: int, text: int = 512, image: int = 257, audio: int = 32
) -> float:
    """Operations of one forward as the reference counts them, in PFLOP (1.895 at 33,600 tokens;
    performance.md §1.1).
    """
    d, f, layers = config["dim"], config["ffn_dim"], config["num_layers"]
    per_layer = (
        8 * tokens * d * d  # self-attention linears
        + 4 * tokens * tokens * d
        + 4 * tokens * d * d  # cross-attention q, o
        + 4 * (text + image) * d * d
        + 4 * tokens * (text + image) * d
        + 4 * tokens * d * d  # audio q, proj
        + 4 * tokens * audio * d
        + 4 * tokens * d * f
    )
    return layers * per_layer / 1e15
