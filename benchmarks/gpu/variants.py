"""The variants that are timed: what each turns on, and one forward of each. Setting one up never changes the
weights: a variant with other modules gets a second model in the same memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from candidates import Candidate, CudnnPlans, flash_3, in_parts
from compiled import CompiledBlocks
from plain import WithMapAndFlushes, plain_ops
from setting import Scale, shadow
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
    cross: bool = False  # text and image cross-attention in one kernel (cross.py)
    compiled: bool = False
    graph: bool = False  # the whole forward as one CUDA graph
    quant: str | None = None
    lossy: bool = False  # its error is reported, not bounded
    default: bool = True  # without --only


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
        what="+ Triton kernels, GELU epilogue, the fastest exact attention here",
        attention="auto",
        keep=True,
        fused=True,
    ),
    Variant(
        name="fused, cuDNN",
        tier="exact",
        what="the same with cuDNN",
        attention="cudnn",
        keep=True,
        fused=True,
    ),
    Variant(
        name="fused, absorbed",
        tier="exact",
        what="+ absorbed audio projections",
        attention="auto",
        keep=True,
        fused=True,
        absorb=True,
    ),
    Variant(
        name="fused, two speakers",
        tier="exact",
        what="two speakers: map, L-RoPE",
        attention="auto",
        keep=True,
        fused=True,
        people=2,
    ),
    Variant(
        name="fused, not kept",
        tier="exact",
        what="the same, every condition embedded in the pass",
        attention="auto",
        fused=True,
        default=False,
    ),
    Variant(
        name="fused, graph",
        tier="exact",
        what="the same as one CUDA graph: no launch gaps",
        attention="auto",
        keep=True,
        fused=True,
        graph=True,
    ),
    Variant(
        name="compiled",
        tier="exact",
        what="torch.compile of a block instead of our kernels, with cuDNN",
        attention="sdpa",
        keep=True,
        compiled=True,
    ),
    Variant(
        name="fused, cross kernel",
        tier="candidate",
        what="text and image attention in one Triton kernel",
        attention="auto",
        keep=True,
        fused=True,
        cross=True,
    ),
    Variant(
        name="fused, absorbed, cross kernel",
        tier="candidate",
        what="absorbed audio and one cross-attention kernel",
        attention="auto",
        keep=True,
        fused=True,
        absorb=True,
        cross=True,
    ),
    Variant(
        name="fused, short keys by cuDNN",
        tier="candidate",
        what="flash-attn 3 for self-attention alone",
        attention="flash-attn 3",
        keep=True,
        fused=True,
        default=False,
    ),
    Variant(
        name="fused, 4 launches",
        tier="candidate",
        what="cuDNN, self-attention 10 heads at a time",
        attention="4 launches",
        keep=True,
        fused=True,
        default=False,
    ),
    Variant(
        name="fused, cuDNN plans",
        tier="candidate",
        what="the fastest of cuDNN's plans for self-attention",
        attention="cuDNN plans",
        keep=True,
        fused=True,
        default=False,
    ),
    Variant(
        name="fused, absorbed, cross kernel, cuDNN plans",
        tier="candidate",
        what="all of them",
        attention="cuDNN plans",
        keep=True,
        fused=True,
        absorb=True,
        cross=True,
        default=False,
    ),
    Variant(
        name="fast, fp8 linears",
        tier="fast",
        what="the blocks' linears in fp8, rounded by norms and GELU",
        attention="auto",
        keep=True,
        fused=True,
        quant="fp8",
        lossy=True,
    ),
    Variant(
        name="fast, fp8 linears, fp8 attention",
        tier="fast",
        what="+ self-attention in fp8",
        attention="fp8",
        keep=True,
        fused=True,
        quant="fp8",
        lossy=True,
    ),
    Variant(
        name="fast, fp8 linears, fp8 attention, absorbed",
        tier="fast",
        what="+ absorbed audio projections",
        attention="fp8",
        keep=True,
        fused=True,
        absorb=True,
        quant="fp8",
        lossy=True,
    ),
)
ABSORBED = "fused, absorbed"
FAST = "fast, fp8 linears, fp8 attention, absorbed"
EXACT = "fused"
PLAIN_TUNED = "tuned, cuDNN"


def named(name: str) -> Variant:
    return next(v for v in VARIANTS if v.name == name)


class Conditions:
    """Embedded conditions, shared by all variants that keep them: absorbed keys and values alone are 20
    GiB. Only quantised models have other audio ones.
    """

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}

    def get(self, model: WanModel, call: dict[str, Any], quant: str | None) -> tuple[Any, Any]:
        text, audio = ("text", id(model), id(call)), ("audio", quant, id(call))
        if text not in self._known:
            self._known[text] = model.embed_text(call["context"], call["clip_fea"], keep=True)
        if audio not in self._known:
            self._known[audio] = model.embed_audio(call["audio"], call["ref_target_masks"], keep=True)
        return self._known[text], self._known[audio]


@cache
def cudnn_plans() -> CudnnPlans:
    """One for the process: choosing among all plans takes seconds."""
    return CudnnPlans()


class Bench:
    """One model, its shadows for variants that need other modules, and their conditions."""

    def __init__(
        self, model: WanModel, size: Scale, device: torch.device, config: dict[str, int] | None = None
    ) -> None:
        self.model, self.size, self.device = model, size, device
        self.config = config or size.config
        self.conditions = Conditions()
        self._models: dict[Any, WanModel] = {}

    def forget(self) -> None:
        """Let go of the conditions of earlier calls."""
        self.conditions = Conditions()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def model_for(self, variant: Variant) -> WanModel:
        cuda = self.device.type == "cuda"
        key = (variant.cross and cuda, variant.compiled, variant.quant)
        if not any(key):
            return self.model
        if key not in self._models:
            twin = shadow(self.model, self.config)
            if key[0]:
                from cross import OneKernelCross

                for block in twin.blocks:
                    block.cross_attn.__class__ = OneKernelCross
            if variant.compiled:
                twin.run_blocks = CompiledBlocks(twin, "inductor" if cuda else "eager")
            if variant.quant:
                _quantise(twin, variant.quant, cuda)
            self._models[key] = twin
        return self._models[key]

    def attention(self, name: str) -> Any:
        """The backend or candidate of that name; on a CPU PyTorch's own in its place."""
        cuda = self.device.type == "cuda"
        if name == "4 launches":
            return Candidate(name, in_parts(AttentionBackend(name="cudnn" if cuda else "sdpa"), 4))
        if name == "flash-attn 3" and cuda:
            return Candidate(name, flash_3())
        if name == "cuDNN plans" and cuda:
            return Candidate(name, cudnn_plans())
        return AttentionBackend(name=name if cuda else "sdpa")

    def runtime(self, variant: Variant) -> Runtime:
        """The runtime a variant describes. On a CPU no kernel is fused."""
        ops, parallel = EAGER, Parallel()
        if variant.plain:
            as_is = variant.plain == "as is"
            head_dim = self.model.dim // self.model.num_heads
            ops = plain_ops(self.size.grid, head_dim, cpu_tables=as_is)
            parallel = WithMapAndFlushes(self.size.grid) if as_is else parallel
        elif variant.fused and self.device.type == "cuda":
            from wan.kernels import FUSED

            ops = FUSED
            if variant.quant:
                from wan.kernels.ops_fp8 import FUSED_FP8 as ops  # noqa: N811
        attention = self.attention(variant.attention)
        return Runtime(attention=attention, ops=ops, parallel=parallel, absorb_audio=variant.absorb)

    def prepare(self, variant: Variant, call: dict[str, Any]) -> tuple[Forward, Runtime]:
        """One forward of the variant, as a function. With `keep` conditions are embedded before, as in a
        job.
        """
        model, chosen = self.model_for(variant), self.runtime(variant)
        if not variant.keep:

            def whole() -> Tensor:
                model.runtime = chosen
                return model(**call)

            return whole, chosen
        latents = torch.cat((call["x"][0], call["y"][0]))[None]
        model.runtime = chosen
        time = model.embed_time(call["t"])
        text, audio = self.conditions.get(model, call, variant.quant)

        def step() -> Tensor:
            model.runtime = chosen
            return model.predict(latents, time, text, audio)

        return (graphed(step) if variant.graph and self.device.type == "cuda" else step), chosen

    def own_bytes(self, variant: Variant, call: dict[str, Any]) -> int:
        """Weights and kept conditions of a variant."""
        model = self.model_for(variant)
        total = sum(t.nbytes for t in model.state_dict().values())
        if variant.keep:
            text, audio = self.conditions.get(model, call, variant.quant)
            stores = (text.kv, audio.absorbed if variant.absorb else audio.kv)
            total += sum(t.nbytes for s in stores for kv in s._store.values() for t in kv)
        return total


def _quantise(model: WanModel, kind: str, cuda: bool) -> None:
    from wan.quant import QuantError, speed_up

    if kind != "fp8":
        msg = f"no variant quantises to {kind}"
        raise QuantError(msg)
    speed_up(model, fused=cuda, anywhere=not cuda)


def graphed(step: Forward) -> Forward:
    """The same forward, captured once and replayed."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay
