"""The stock Wan2.1 transformer: text-to-video, image-to-video, first-and-last-frame-to-video.

The audio model (`multitalk_model`) and VACE (`vace_model`) are this one with additions.
Wan2.1, arXiv 2503.20314; specification §4.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .layers import (
    BlockContext,
    Head,
    KeysValues,
    MLPProj,
    TextCondition,
    TimeEmbedding,
    WanAttentionBlock,
    WanI2VCrossAttention,
    WanLayerNorm,
    WanRMSNorm,
    WanSelfAttention,
    WanT2VCrossAttention,
    linear_fp32,
    sinusoidal_embedding_1d,
)
from .rope import RopeTable, video_table
from .runtime import Grid, Parallel, Runtime

__all__ = [
    "Head",
    "MLPProj",
    "WanAttentionBlock",
    "WanI2VCrossAttention",
    "WanLayerNorm",
    "WanModel",
    "WanRMSNorm",
    "WanSelfAttention",
    "WanT2VCrossAttention",
    "sinusoidal_embedding_1d",
]

CROSS_ATTENTION = {
    "t2v": WanT2VCrossAttention,
    "i2v": WanI2VCrossAttention,
    "flf2v": WanI2VCrossAttention,
    "vace": WanT2VCrossAttention,
}


class WanModel(nn.Module):
    """Latent video, timestep, text (and image) → the flow-matching velocity of the latent.

    Sizes are those of `config.json`. Only what the checkpoints hold can be built: q/k norm and
    cross-attention norm are always there, attention is global. Raises ValueError for anything else.
    """

    block_class: type[nn.Module] = WanAttentionBlock

    def __init__(
        self,
        model_type: str = "t2v",
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
        super().__init__()
        _check(model_type, dim, num_heads, window_size, qk_norm, cross_attn_norm)
        self.model_type = model_type
        self.patch_size = tuple(patch_size)
        self.text_len = text_len
        self.in_dim = in_dim
        self.dim = dim
        self.ffn_dim = ffn_dim
        self.freq_dim = freq_dim
        self.text_dim = text_dim
        self.out_dim = out_dim
        self.num_heads = num_heads
        self.num_layers = num_layers
        self.eps = eps
        self.runtime = Runtime()
        self._rope: dict[tuple[Grid, torch.device, Parallel], RopeTable] = {}

        self.patch_embedding = nn.Conv3d(in_dim, dim, kernel_size=self.patch_size, stride=self.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(self._make_block(i) for i in range(num_layers))
        self.head = Head(dim, out_dim, self.patch_size, eps)
        if model_type in ("i2v", "flf2v"):
            self.img_emb = MLPProj(1280, dim, flf_pos_emb=model_type == "flf2v")

    def _make_block(self, index: int) -> nn.Module:
        return self.block_class(
            CROSS_ATTENTION[self.model_type], self.dim, self.ffn_dim, self.num_heads, self.eps
        )

    @classmethod
    def from_pretrained(cls, directory: str | Path, **kwargs: Any) -> WanModel:
        """Build from `config.json` and the safetensors files of a folder: `wan.loading.load_pretrained`."""
        from ..loading import load_pretrained

        return load_pretrained(cls, directory, **kwargs)

    def use(self, **choices: Any) -> WanModel:
        """Choose what it runs on: `attention=`, `ops=`, `parallel=`, `official_map=` (see `Runtime`). Returns
        itself.
        """
        self.runtime = replace(self.runtime, **choices)
        return self

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    # --- conditions: embedded once, used in every step ----------------------------------------------------

    def embed_time(self, t: Tensor) -> TimeEmbedding:
        """Timesteps [n] → e [n, C], e0 [n, 6, C], in fp32 whatever the parameters' dtype."""
        wave = sinusoidal_embedding_1d(self.freq_dim, t).float()
        first, activation, last = self.time_embedding
        e = linear_fp32(last, activation(linear_fp32(first, wave)))
        activation, projection = self.time_projection
        e0 = linear_fp32(projection, activation(e)).unflatten(1, (6, self.dim))
        return TimeEmbedding(e=e, e0=e0)

    def embed_text(
        self, context: list[Tensor], clip_fea: Tensor | None = None, *, keep: bool = False
    ) -> TextCondition:
        """T5 states, a list of [n ≤ text_len, text_dim], and CLIP features [B, 257, 1280] → the condition.

        Texts are zero-padded *before* the embedding, and the padding is attended to: so the model was
        trained. `keep` stores each block's keys and values for later steps.
        """
        if max(len(c) for c in context) > self.text_len:
            msg = f"a text has {max(len(c) for c in context)} tokens, the model takes {self.text_len}"
            raise ValueError(msg)
        if (clip_fea is None) == hasattr(self, "img_emb"):
            need = "needs" if clip_fea is None else "does not take"
            msg = f"a model of type {self.model_type!r} {need} CLIP features (clip_fea)"
            raise ValueError(msg)
        padded = context[0].new_zeros(len(context), self.text_len, self.text_dim)
        for row, c in zip(padded, context, strict=True):
            row[: len(c)] = c
        tokens = self.text_embedding(padded.to(self.dtype))
        image = None if clip_fea is None else self.img_emb(clip_fea.to(self.dtype))
        return TextCondition(tokens=tokens, image=image, features=clip_fea, kv=KeysValues(keep=keep))

    def rope_table(self, grid: Grid, device: torch.device) -> RopeTable:
        """This rank's part of the table of a (T, H, W) token grid; the last few shapes are kept on the
        device.
        """
        parallel = self.runtime.parallel
        key = (grid, device, parallel)
        if key not in self._rope:
            if len(self._rope) >= 4:
                self._rope.pop(next(iter(self._rope)))
            table = video_table(grid, self.dim // self.num_heads, device)
            cos, sin = (parallel.split(t[None], grid)[0] for t in (table.cos, table.sin))
            self._rope[key] = RopeTable(cos=cos, sin=sin)
        return self._rope[key]

    # --- latents ⇄ tokens ---------------------------------------------------------------------------------

    def patchify(self, x: Tensor) -> tuple[Tensor, Grid]:
        """Latents [B, in_dim, T, h, w] → tokens [B, L, C] in (t, h, w) order and their grid."""
        if x.shape[1] != self.in_dim:
            msg = f"latents (with y) have {x.shape[1]} channels, the model takes {self.in_dim}"
            raise ValueError(msg)
        tokens = self.patch_embedding(x.to(self.dtype))  # [B, C, T, H, W]
        return tokens.flatten(2).transpose(1, 2).contiguous(), tuple(tokens.shape[2:])

    def unpatchify(self, x: Tensor, grid: Grid) -> Tensor:
        """Head output [B, L, patch·out_dim] → [B, out_dim, T, h, w]; a token holds (pt, ph, pw, channel)."""
        batch = x.shape[0]
        x = x.view(batch, *grid, *self.patch_size, self.out_dim)  # [B, T, H, W, pt, ph, pw, c]
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # [B, c, T, pt, H, ph, W, pw]
        sizes = [g * p for g, p in zip(grid, self.patch_size, strict=True)]
        return x.reshape(batch, self.out_dim, *sizes)

    # --- the pass -----------------------------------------------------------------------------------------

    def predict(self, latents: Tensor, time: TimeEmbedding, text: TextCondition) -> Tensor:
        """One pass with embedded conditions: latents (with y) [B, in_dim, T, h, w] → [B, out_dim, T, h, w]
        fp32.
        """
        x, grid = self.patchify(latents)
        parallel = self.runtime.parallel
        ctx = BlockContext(runtime=self.runtime, rope=self.rope_table(grid, x.device), grid=grid, text=text)
        x = self.run_blocks(parallel.split(x, grid), time.e0, ctx)
        return self.unpatchify(parallel.merge(self.head(x, time.e), grid), grid)

    def run_blocks(self, x: Tensor, e0: Tensor, ctx: BlockContext) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x, e0, ctx, i)
        return x

    def forward(
        self,
        x: list[Tensor],
        t: Tensor,
        context: list[Tensor],
        seq_len: int,
        clip_fea: Tensor | None = None,
        y: list[Tensor] | None = None,
    ) -> list[Tensor]:
        """x and y: lists of [16, T, h, w] and [20, T, h, w]; t [B]; context: list of [n, text_dim] → list of
        fp32.

        `seq_len` only bounds the tokens: padding could not reach the result, so it is not computed. Samples
        of different shapes run one after the other.
        """
        latents = list(x) if y is None else [torch.cat((a, b)) for a, b in zip(x, y, strict=True)]
        self._check_tokens(latents, seq_len)
        if len({tuple(a.shape) for a in latents}) == 1:
            text = self.embed_text(context, clip_fea)
            return list(self.predict(torch.stack(latents), self.embed_time(t), text))
        images = [None] * len(latents) if clip_fea is None else clip_fea.chunk(len(latents))
        samples = zip(latents, t, context, images, strict=True)
        return [
            self.predict(a[None], self.embed_time(s[None]), self.embed_text([c], i))[0]
            for a, s, c, i in samples
        ]

    def _check_tokens(self, latents: list[Tensor], seq_len: int) -> None:
        patch = math.prod(self.patch_size)
        tokens = max(math.prod(a.shape[1:]) // patch for a in latents)
        if tokens > seq_len:
            msg = f"seq_len is {seq_len}, but the latents make {tokens} tokens"
            raise ValueError(msg)


def _check(
    model_type: str, dim: int, num_heads: int, window_size: tuple[int, int], qk_norm: bool, cross_norm: bool
) -> None:
    if model_type not in CROSS_ATTENTION:
        msg = f"model_type {model_type!r} is not one of {', '.join(CROSS_ATTENTION)}"
        raise ValueError(msg)
    if dim % num_heads or (dim // num_heads) % 2:
        msg = f"dim {dim} does not split into {num_heads} heads of an even width"
        raise ValueError(msg)
    if not qk_norm or not cross_norm or tuple(window_size) != (-1, -1):
        msg = (
            f"qk_norm={qk_norm}, cross_attn_norm={cross_norm}, window_size={window_size}: "
            "no published checkpoint has other values than True, True and (-1, -1)"
        )
        raise ValueError(msg)
