"""What a video will cost, before anything is loaded: tokens, passes, seconds and memory.

FLOPs as multitalk.md §3.13 counts them; seconds by the rates that were measured (docs/performance.md for
Hopper, the original's published figures for the A100).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from multitalk_runtime.request import Request
    from wan.clips import ClipPlan

__all__ = ["Estimate", "estimate"]

RATES = {"h200": 590e12, "h100": 590e12, "h800": 590e12, "a100": 164e12, "a800": 164e12}
"""FLOP/s inside a forward, by a word of the GPU's name."""
VAE_BYTES_PER_PIXEL = 96 * 4 * 4  # of the widest layer, a piece of four frames in fp32
BYTES = {"dit": 2, "t5": 2, "clip": 2, "vae": 4, "wav2vec": 4}  # a parameter, as loaded
PUBLISHED = {"dit": 18_882_046_784, "t5": 5_680_910_336, "clip": 612_000_000, "vae": 126_892_531,
             "wav2vec": 94_371_712}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Sizes in bytes, times in seconds; `seconds` is None on hardware without a measured rate."""

    bucket: tuple[int, int]
    frames: int
    clips: int
    steps: int
    passes: int
    tokens: int
    flops: float
    weights_bytes: int
    activation_bytes: int
    seconds: float | None
    device: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def estimate(
    request: Request,
    plan: ClipPlan,
    bucket: tuple[int, int],
    config: Mapping[str, Any],
    *,
    device: str,
    parameters: Mapping[str, int] | None = None,
) -> Estimate:
    """`config` is the DiT's config.json; `parameters` counts of each network (default: the published ones);
    `device` a GPU's name or "cpu".
    """
    height, width = bucket
    latent_frames = 1 + (request.frame_num - 1) // 4
    tokens = latent_frames * (height // 16) * (width // 16)
    dim, layers, ffn = config.get("dim", 5120), config.get("num_layers", 40), config.get("ffn_dim", 13824)
    people = len(request.tracks)
    context, spoken = 512 + 257, latent_frames * 32 * people
    # 2 FLOP for each weight and token: q, k, v, o; q, o of the two other attentions; the FFN.
    linears = 2 * tokens * layers * (4 * dim**2 + 4 * dim**2 + 2 * dim * ffn)
    attention = 4 * tokens * layers * dim * (tokens + context + 32 * people)
    forward = float(linears + attention)
    flops = forward * request.passes * request.steps * len(plan.clips)
    counts = PUBLISHED | dict(parameters or {})
    kept = 2 * dim * 2 * layers * (context * (request.passes - 1) + spoken)
    hidden = tokens * (2 * ffn + 6 * dim) * 2
    activations = kept + max(hidden, height * width * VAE_BYTES_PER_PIXEL)
    rate = next((r for word, r in RATES.items() if word in device.lower()), None)
    return Estimate(
        bucket=bucket,
        frames=plan.frames,
        clips=len(plan.clips),
        steps=request.steps,
        passes=request.passes,
        tokens=tokens,
        flops=flops,
        weights_bytes=sum(counts[name] * size for name, size in BYTES.items()),
        activation_bytes=activations,
        seconds=None if rate is None else flops / rate,
        device=device,
    )
