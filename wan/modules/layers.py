"""The layers that all Wan2.1 transformers share. Names, parameters and keys are those of the checkpoints.

Rounding: linears and residual sums run in the model's dtype; norms, modulation, RoPE, time embedding and head
run in fp32 on weights of the model's dtype. Wan2.1, arXiv 2503.20314; specification §4.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import ops
from .rope import RopeTable
from .runtime import Grid, Runtime


class KeysValues:
    """k and v of each block for one fixed condition: computed at first use, then kept for the whole clip.

    Exact, since a condition does not change between steps; costs memory (14B: 630 MB a text, 550 MB an audio
    track). With `keep=False` nothing is stored.
    """

    def __init__(self, *, keep: bool = False) -> None:
        self.keep = keep
        self._store: dict[int, tuple[Tensor, ...]] = {}

    def get(self, block: int, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        if block in self._store:
            return self._store[block]
        kv = compute()
        if self.keep:
            self._store[block] = kv
        return kv


@dataclass(kw_only=True)
class TextCondition:
    """A prompt and an image, embedded: tokens [B, text_len, C], image [B, 257, C] or None (text-to-video).

    `features` are what `image` was made from: conditions with the same ones have the same image.
    """

    tokens: Tensor
    image: Tensor | None = None
    features: Tensor | None = None
    kv: KeysValues = field(default_factory=KeysValues)


@dataclass(frozen=True, kw_only=True)
class TimeEmbedding:
    """Of one timestep a sample, fp32: e [B, C] for the head, e0 [B, 6, C] for the blocks."""

    e: Tensor
    e0: Tensor

    def at(self, index: int) -> TimeEmbedding:
        """The embedding of one of several timesteps, as a batch of 1."""
        return TimeEmbedding(e=self.e[index : index + 1], e0=self.e0[index : index + 1])


@dataclass(kw_only=True)
class BlockContext:
    """All that a block reads beside its tokens and the time embedding."""

    runtime: Runtime
    rope: RopeTable
    grid: Grid
    text: TextCondition


def sinusoidal_embedding_1d(dim: int, position: Tensor) -> Tensor:
    """Positions [n] → [n, dim] fp64: cosines, then sines, of position · 10000^(−i / (dim/2))."""
    if dim % 2:
        msg = f"the sinusoidal embedding needs an even dim, got {dim}"
        raise ValueError(msg)
    half = dim // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=position.device) / half)
    angles = torch.outer(position.double(), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def linear_fp32(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer` computed in fp32, whatever dtype its parameters have."""
    bias = None if layer.bias is None else layer.bias.float()
    return F.linear(x.float(), weight_fp32(layer), bias)


def weight_fp32(layer: nn.Linear) -> Tensor:
    """The weight [out, in] that `layer` multiplies with, in fp32."""
    weight = layer.weight
    # A quantised layer (wan.quant.QuantLinear) holds its weight as a module.
    return weight.float() if isinstance(weight, Tensor) else weight.dequantized(torch.float32)


class WanRMSNorm(nn.Module):
    """RMSNorm over the last dimension: `ops.rms_norm` with its weight."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, eps=self.eps)


class WanLayerNorm(nn.LayerNorm):
    """LayerNorm in fp32 with the result in the input's dtype: `ops.layer_norm`."""

    def __init__(self, dim: int, eps: float = 1e-6, elementwise_affine: bool = False) -> None:
        super().__init__(dim, eps=eps, elementwise_affine=elementwise_affine)

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, eps=self.eps)


class WanSelfAttention(nn.Module):
    """Attention of all video tokens to each other, with RMSNorm and 3-D RoPE on q and k."""

    def __init__(self, dim: int, num_heads: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = WanRMSNorm(dim, eps=eps)
        self.norm_k = WanRMSNorm(dim, eps=eps)

    def qkv(self, x: Tensor, ctx: BlockContext) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, L, C] → q, k (normalised and rotated), v: each [B, L, N, D]."""
        op = ctx.runtime.ops
        cos, sin = ctx.rope.cos, ctx.rope.sin
        q, k, v = op.qkv(self, x)
        q = op.rms_norm_rope(q, self.norm_q.weight, cos, sin, eps=self.norm_q.eps)
        k = op.rms_norm_rope(k, self.norm_k.weight, cos, sin, eps=self.norm_k.eps)
        return self.heads(q), self.heads(k), self.heads(v)

    def heads(self, x: Tensor) -> Tensor:
        """[B, L, C] → [B, L, N, D]."""
        return x.unflatten(-1, (-1, self.head_dim))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, ctx: BlockContext) -> Tensor:
        """[B, L, N, D] → [B, L, C]."""
        runtime = ctx.runtime
        return self.o(runtime.parallel.attention(runtime.attention, q, k, v).flatten(2))

    def forward(self, x: Tensor, ctx: BlockContext) -> Tensor:
        return self.attend(*self.qkv(x, ctx), ctx)


class WanT2VCrossAttention(nn.Module):
    """Video tokens attend to the text's tokens; no positions, no mask (padding was trained with)."""

    def __init__(self, dim: int, num_heads: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.head_dim = dim // num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = WanRMSNorm(dim, eps=eps)
        self.norm_k = WanRMSNorm(dim, eps=eps)

    def keys_values(self, text: TextCondition) -> tuple[Tensor, ...]:
        """k, v of the text, [B, 512, N, D]."""
        return self.heads(self.norm_k(self.k(text.tokens))), self.heads(self.v(text.tokens))

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def forward(self, x: Tensor, ctx: BlockContext, block: int) -> Tensor:
        """x [B, L, C] → [B, L, C]."""
        return self.attend(self.query(x, ctx), self.kept(ctx, block), ctx)

    def kept(self, ctx: BlockContext, block: int) -> tuple[Tensor, ...]:
        """`keys_values` of the pass's text."""
        return ctx.text.kv.get(block, lambda: self.keys_values(ctx.text))

    def query(self, x: Tensor, ctx: BlockContext) -> Tensor:
        """x [B, L, C] → q [B, L, N, D]."""
        return self.heads(ctx.runtime.ops.rms_norm(self.q(x), self.norm_q.weight, eps=self.norm_q.eps))

    def attend(self, q: Tensor, kv: tuple[Tensor, ...], ctx: BlockContext) -> Tensor:
        """q [B, L, N, D] → [B, L, C]."""
        return self.o(ctx.runtime.attention(q, *kv).flatten(2))


class WanI2VCrossAttention(WanT2VCrossAttention):
    """The same with the image's tokens as a second condition."""

    def __init__(self, dim: int, num_heads: int, eps: float = 1e-6) -> None:
        super().__init__(dim, num_heads, eps)
        self.k_img = nn.Linear(dim, dim)
        self.v_img = nn.Linear(dim, dim)
        self.norm_k_img = WanRMSNorm(dim, eps=eps)

    def keys_values(self, text: TextCondition) -> tuple[Tensor, ...]:
        """k, v of the text, then of the image."""
        image_k = self.heads(self.norm_k_img(self.k_img(text.image)))
        return *super().keys_values(text), image_k, self.heads(self.v_img(text.image))

    def attend_image(self, q: Tensor, kv: tuple[Tensor, ...], ctx: BlockContext) -> Tensor:
        """The image's part before `o`: q [B, L, N, D] → [B, L, C]."""
        return ctx.runtime.attention(q, *kv[2:]).flatten(2)

    def attend(
        self, q: Tensor, kv: tuple[Tensor, ...], ctx: BlockContext, image: Tensor | None = None
    ) -> Tensor:
        """q [B, L, N, D] → [B, L, C]: text and image attended to separately and summed before `o`; `image`
        is what `attend_image` gives, if it is known.
        """
        text = ctx.runtime.attention(q, *kv[:2]).flatten(2)
        return self.o(text + (self.attend_image(q, kv, ctx) if image is None else image))


class WanAttentionBlock(nn.Module):
    """Self-attention, text cross-attention and a feed-forward network, modulated by the timestep."""

    def __init__(
        self,
        cross_attn: type[WanT2VCrossAttention],
        dim: int,
        ffn_dim: int,
        num_heads: int,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.self_attn = WanSelfAttention(dim, num_heads, eps)
        self.norm3 = WanLayerNorm(dim, eps, elementwise_affine=True)
        self.cross_attn = cross_attn(dim, num_heads, eps)
        self.ffn = nn.Sequential(
            nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(self, x: Tensor, e0: Tensor, ctx: BlockContext, block: int) -> Tensor:
        """x [B, L, C], e0 [B, 6, C] fp32 → [B, L, C]; `block` is this block's number, for kept keys and
        values.
        """
        op, eps = ctx.runtime.ops, self.eps
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.float() + e0).chunk(6, dim=1)
        y = self.self_attn(op.layer_norm_modulate(x, scale1, shift1, eps=eps), ctx)
        x, n = op.gate_residual_norm(x, y, gate1, self.norm3.weight, self.norm3.bias, modulate=False, eps=eps)
        y = self.cross_attn(n, ctx, block)
        x, n = op.gate_residual_norm(x, y, None, scale2, shift2, modulate=True, eps=eps)
        return op.gate_residual(x, op.ffn(self.ffn, n), gate2)


class Head(nn.Module):
    """Tokens → the pixels of their latent patch, in fp32."""

    def __init__(self, dim: int, out_dim: int, patch_size: Grid, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        patch = patch_size[0] * patch_size[1] * patch_size[2]
        self.head = nn.Linear(dim, patch * out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """x [B, L, C], e [B, C] fp32 → [B, L, patch·out_dim] fp32."""
        shift, scale = (self.modulation.float() + e[:, None]).chunk(2, dim=1)
        n = ops.layer_norm(x, None, None, eps=self.eps).float() * (1 + scale) + shift
        return linear_fp32(self.head, n)


class MLPProj(nn.Module):
    """CLIP image features [B, 257, in_dim] → tokens [B, 257, out_dim].

    With `flf_pos_emb` the features of the first and the last frame come as [2B, 257, in_dim] and get
    positions.
    """

    def __init__(self, in_dim: int, out_dim: int, flf_pos_emb: bool = False) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(in_dim),
            nn.Linear(in_dim, in_dim),
            nn.GELU(),
            nn.Linear(in_dim, out_dim),
            nn.LayerNorm(out_dim),
        )
        if flf_pos_emb:
            self.emb_pos = nn.Parameter(torch.zeros(1, 2 * 257, in_dim))

    def forward(self, image: Tensor) -> Tensor:
        if hasattr(self, "emb_pos"):
            image = image.reshape(-1, 2 * image.shape[1], image.shape[2]) + self.emb_pos
        return self.proj(image)
