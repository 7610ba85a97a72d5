"""The variants that are timed: what each turns on, and one forward of each. Setting one up never changes the
weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from plain import WithMapAndFlushes, plain_ops
from setting import Scale
from torch import Tensor

from wan.attention_backends import AttentionBackend
from wan.modules.multitalk_model import WanModel
from wan.modules.ops import EAGER
from wan.modules.runtime import Parallel, Runtime

Forward = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """name and tier as printed; `what` it does; attention backend; the rest are switches of the DiT."""

    name: str
    tier: str
    what: str
    attention: str
    plain: str | None = None  # "as is" | "tuned"
    fused: bool = False
    keep: bool = False
    absorb: bool = False
    people: int = 1
    extra: dict[str, Any] = field(default_factory=dict)


VARIANTS = (
    Variant(
        name="plain, flash",
        tier="reference",
        what="what the reference does; flash",
        attention="flash",
        plain="as is",
    ),
    Variant(
        name="plain, cuDNN",
        tier="reference",
        what="what the reference does; cuDNN",
        attention="cudnn",
        plain="as is",
    ),
    Variant(
        name="tuned, flash",
        tier="reference",
        what="GPU tables, no map, no flushes",
        attention="flash",
        plain="tuned",
    ),
    Variant(
        name="tuned, cuDNN", tier="reference", what="the same with cuDNN", attention="cudnn", plain="tuned"
    ),
    Variant(name="eager", tier="exact", what="our model, PyTorch ops, fp32 rotation", attention="sdpa"),
    Variant(
        name="eager, kept K/V", tier="exact", what="+ conditions embedded once", attention="sdpa", keep=True
    ),
    Variant(
        name="fused",
        tier="exact",
        what="+ Triton kernels, GELU epilogue",
        attention="sdpa",
        keep=True,
        fused=True,
    ),
    Variant(
        name="fused, absorbed",
        tier="exact",
        what="+ absorbed audio projections",
        attention="sdpa",
        keep=True,
        fused=True,
        absorb=True,
    ),
    Variant(
        name="fused, two speakers",
        tier="exact",
        what="two speakers: map, L-RoPE",
        attention="sdpa",
        keep=True,
        fused=True,
        people=2,
    ),
)
EXACT = "fused, absorbed"


def runtime(variant: Variant, model: WanModel, size: Scale, device: torch.device) -> Runtime:
    """The runtime a variant describes. On a CPU every backend is torch's own and no kernel is fused."""
    cuda = device.type == "cuda"
    ops, parallel = EAGER, Parallel()
    if variant.plain:
        as_is = variant.plain == "as is"
        ops = plain_ops(size.grid, model.dim // model.num_heads, cpu_tables=as_is)
        parallel = WithMapAndFlushes(size.grid) if as_is else parallel
    elif variant.fused and cuda:
        from wan.kernels import FUSED

        ops = FUSED
    return Runtime(
        attention=AttentionBackend(name=variant.attention if cuda else "sdpa"),
        ops=ops,
        parallel=parallel,
        absorb_audio=variant.absorb,
    )


def prepare(
    variant: Variant, model: WanModel, size: Scale, device: torch.device, call: dict[str, Any]
) -> tuple[Forward, Runtime]:
    """One forward of the variant, as a function. With `keep` conditions are embedded before, as in a job."""
    chosen = runtime(variant, model, size, device)
    if not variant.keep:

        def whole() -> Tensor:
            model.runtime = chosen
            return model(**call)

        return whole, chosen
    model.runtime = chosen
    latents = torch.cat((call["x"][0], call["y"][0]))[None]
    time = model.embed_time(call["t"])
    text = model.embed_text(call["context"], call["clip_fea"], keep=True)
    audio = model.embed_audio(call["audio"], call["ref_target_masks"], keep=True)

    def step() -> Tensor:
        model.runtime = chosen
        return model.predict(latents, time, text, audio)

    return step, chosen
