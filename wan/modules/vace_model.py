"""VACE: a stock transformer steered by a second, smaller stack that reads control videos and masks.

Every vace block turns its tokens into a hint that is added to the output of the main block it belongs to.
VACE, arXiv 2503.07598; specification §1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import model as stock
from .layers import BlockContext, TextCondition, TimeEmbedding, WanAttentionBlock
from .runtime import Grid

__all__ = ["VaceWanModel"]


@dataclass(kw_only=True)
class HintContext(BlockContext):
    """`hints[i]` [B, L, C] is added after main block i, times `scale`."""

    hints: dict[int, Tensor]
    scale: float = 1.0


class VaceBlock(WanAttentionBlock):
    """A block of the control stack; the first one also reads the main stack's tokens."""

    def __init__(self, *args: Any, first: bool) -> None:
        super().__init__(*args)
        dim = self.modulation.shape[-1]
        if first:
            self.before_proj = nn.Linear(dim, dim)
        self.after_proj = nn.Linear(dim, dim)


class VaceWanModel(stock.WanModel):
    """The stock model with `vace_blocks`; `vace_layers` are the main blocks that get a hint (default: every
    second).
    """

    def __init__(
        self,
        vace_layers: Sequence[int] | None = None,
        vace_in_dim: int | None = None,
        model_type: str = "vace",
        patch_size: Grid = (1, 2, 2),
        text_len: int = 512,
        in_dim: int = 16,
        dim: int = 2048,
        ffn_dim: int = 8192,
        freq_dim: int = 256,
        text_dim: int = 4096,
        out_dim: int = 16,
        num_heads: int = 16,
        num_layers: int = 32,
        window_size: tuple[int, int] = (-1, -1),
        qk_norm: bool = True,
        cross_attn_norm: bool = True,
        eps: float = 1e-6,
    ) -> None:
        if model_type != "vace":
            msg = f"model_type {model_type!r}: this class is 'vace'"
            raise ValueError(msg)
        super().__init__(
            model_type,
            patch_size,
            text_len,
            in_dim,
            dim,
            ffn_dim,
            freq_dim,
            text_dim,
            out_dim,
            num_heads,
            num_layers,
            window_size,
            qk_norm,
            cross_attn_norm,
            eps,
        )
        self.vace_layers = tuple(range(0, num_layers, 2) if vace_layers is None else vace_layers)
        self.vace_in_dim = in_dim if vace_in_dim is None else vace_in_dim
        if not self.vace_layers or self.vace_layers[0] != 0 or max(self.vace_layers) >= num_layers:
            msg = f"vace_layers {self.vace_layers} must start at 0 and stay below num_layers {num_layers}"
            raise ValueError(msg)
        cross = stock.CROSS_ATTENTION[model_type]
        self.vace_blocks = nn.ModuleList(
            VaceBlock(cross, dim, ffn_dim, num_heads, eps, first=i == 0) for i in range(len(self.vace_layers))
        )
        self.vace_patch_embedding = nn.Conv3d(
            self.vace_in_dim, dim, kernel_size=self.patch_size, stride=self.patch_size
        )

    def predict(
        self,
        latents: Tensor,
        time: TimeEmbedding,
        text: TextCondition,
        vace: Tensor | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        """One pass: latents [B, in_dim, T, h, w], control latents `vace` [B, vace_in_dim, T, h, w] → fp32 as
        latents.
        """
        if vace is None:
            return super().predict(latents, time, text)
        x, grid = self.patchify(latents)
        control = self.vace_patch_embedding(vace.to(self.dtype))
        if tuple(control.shape[2:]) != grid:
            msg = f"the control video makes a grid {tuple(control.shape[2:])}, the latents {grid}"
            raise ValueError(msg)
        parallel = self.runtime.parallel
        x, control = (parallel.split(a, grid) for a in (x, control.flatten(2).transpose(1, 2)))
        ctx = HintContext(
            runtime=self.runtime,
            rope=self.rope_table(grid, x.device),
            grid=grid,
            text=text,
            hints={},
            scale=scale,
        )
        ctx.hints = self.control_hints(x, control, time.e0, ctx)
        x = self.run_blocks(x, time.e0, ctx)
        return self.unpatchify(parallel.merge(self.head(x, time.e), grid), grid)

    def control_hints(self, x: Tensor, control: Tensor, e0: Tensor, ctx: BlockContext) -> dict[int, Tensor]:
        """Run the control stack on x [B, L, C] and control [B, L, C] → main block → hint [B, L, C]."""
        hints = {}
        control = self.vace_blocks[0].before_proj(control) + x
        for i, (layer, block) in enumerate(zip(self.vace_layers, self.vace_blocks, strict=True)):
            control = block(control, e0, ctx, self.num_layers + i)
            hints[layer] = block.after_proj(control)
        return hints

    def run_blocks(self, x: Tensor, e0: Tensor, ctx: BlockContext) -> Tensor:
        hints = getattr(ctx, "hints", {})
        for i, block in enumerate(self.blocks):
            x = block(x, e0, ctx, i)
            if i in hints:
                x = x + hints[i] * ctx.scale
        return x

    def forward(
        self,
        x: list[Tensor],
        t: Tensor,
        vace_context: list[Tensor],
        context: list[Tensor],
        seq_len: int,
        vace_context_scale: float = 1.0,
        clip_fea: Tensor | None = None,
        y: list[Tensor] | None = None,
    ) -> list[Tensor]:
        """As the stock model, with control latents: list of [vace_in_dim, T, h, w]. One by one."""
        latents = list(x) if y is None else [torch.cat((a, b)) for a, b in zip(x, y, strict=True)]
        self._check_tokens(latents, seq_len)
        samples = zip(latents, t, vace_context, context, strict=True)
        return [
            self.predict(
                a[None],
                self.embed_time(s[None]),
                self.embed_text([c], clip_fea),
                v[None],
                vace_context_scale,
            )[0]
            for a, s, v, c in samples
        ]
