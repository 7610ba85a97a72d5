"""Regional torch.compile: one block compiled once (default mode, static shapes) and run forty times."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from wan.fuse import joined
from wan.modules import ops
from wan.modules.multitalk_model import WanModel
from wan.modules.rope import RopeTable
from wan.modules.runtime import Parallel

FUNCTIONS = (
    "rms_norm",
    "rms_norm_rope",
    "rope",
    "layer_norm_modulate",
    "gate_residual",
    "gate_residual_norm",
    "ffn",
)


class Given:
    """Kept keys and values, as plain tensors: a dictionary by block number would compile every block anew."""

    def __init__(self, kv: tuple[Tensor, ...]) -> None:
        self.kv = kv

    def get(self, block: int, compute: Any) -> tuple[Tensor, ...]:
        return self.kv


class Bag:
    """Named values; a class of our own, which the compiler can follow."""

    def __init__(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, value)


def attend(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    """PyTorch's own choice, which is cuDNN where `sdpa` of wan.attention_backends takes it."""
    return functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def run_block(
    block: Any,
    x: Tensor,
    e0: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor,
    bias: Tensor,
    text: tuple[Tensor, ...],
    audio: tuple[Tensor, ...],
) -> Tensor:
    def qkv(_: Any, n: Tensor) -> tuple[Tensor, ...]:
        return functional.linear(n, weight, bias).chunk(3, dim=-1)

    functions = Bag(qkv=qkv, wide=None, **{name: getattr(ops, name) for name in FUNCTIONS})
    runtime = Bag(
        ops=functions, attention=attend, parallel=PARALLEL, absorb_audio=False, absorb_silence=False
    )
    ctx = Bag(
        runtime=runtime,
        rope=RopeTable(cos=cos, sin=sin),
        share=None,
        absorbed=False,
        text=Bag(kv=Given(text)),
        audio=Bag(people=1, still=False, kv=Given(audio), tokens=None),
    )
    return block(x, e0, ctx, 1)


PARALLEL = Parallel()


class CompiledBlocks:
    """Takes the place of `model.run_blocks` (one speaker, conditions kept); `seconds` is what compiling
    took.
    """

    def __init__(self, model: WanModel, backend: str = "inductor") -> None:
        torch._dynamo.reset()
        self.model, self.seconds = model, None
        self._before = _graphs()
        self.block = torch.compile(run_block, dynamic=False, fullgraph=True, backend=backend)

    def __call__(self, x: Tensor, e0: Tensor, ctx: Any) -> Tensor:
        begin = time.perf_counter()
        for i, block in enumerate(self.model.blocks):
            attention = block.self_attn
            whole = joined((attention.q, attention.k, attention.v))
            text = ctx.text.kv.get(i, lambda b=block: b.cross_attn.keys_values(ctx.text))
            audio = ctx.audio.kv.get(i, lambda b=block: b.audio_cross_attn.keys_values(ctx.audio.tokens, 1))
            x = self.block(block, x, e0, ctx.rope.cos, ctx.rope.sin, *whole, text, audio)
        if self.seconds is None:
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            self.seconds = round(time.perf_counter() - begin, 1)
        return x

    @property
    def graphs(self) -> int:
        """Compiled graphs: 1 if the forty blocks share one and nothing broke it."""
        return _graphs() - self._before


def _graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
