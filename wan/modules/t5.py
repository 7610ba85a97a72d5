"""T5 as umT5-xxl has it: gated GELU, RMS norm, no 1/√d, relative position bias in every layer.

Sources: T5, arXiv 1910.10683 (§2.1, appendix); gated feed-forward, arXiv 2002.05202; umT5 (a bias table a
layer), arXiv 2304.09151; multitalk.md §4.5 for names and dtypes. Only the encoder is used by Wan.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.modules.tokenizers import HuggingfaceTokenizer

__all__ = ["T5Decoder", "T5Encoder", "T5EncoderModel", "T5Model", "umt5_xxl"]

UMT5_XXL: dict[str, Any] = {
    "vocab": 256384,
    "dim": 4096,
    "dim_attn": 4096,
    "dim_ffn": 10240,
    "num_heads": 64,
    "num_buckets": 32,
    "shared_pos": False,
    "dropout": 0.1,
}
UMT5_XXL_LAYERS = 24


class T5LayerNorm(nn.Module):
    """RMS norm: statistics in fp32, scaled by the weight in the weight's dtype."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] → same shape."""
        x = x * torch.rsqrt(x.float().pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * x.to(self.weight.dtype)


class T5Attention(nn.Module):
    """Multi-head attention without biases and without scaling; a bias [1,N,Lq,Lk] carries positions and
    masks.
    """

    def __init__(self, dim: int, dim_attn: int, num_heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        if dim_attn % num_heads:
            msg = f"dim_attn must be a multiple of num_heads, got {dim_attn} and {num_heads}"
            raise ValueError(msg)
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim_attn, bias=False)
        self.k = nn.Linear(dim, dim_attn, bias=False)
        self.v = nn.Linear(dim, dim_attn, bias=False)
        self.o = nn.Linear(dim_attn, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, context: Tensor | None, bias: Tensor) -> Tensor:
        """x [B,Lq,C], context [B,Lk,C] (None: x), bias [B or 1, N or 1, Lq, Lk] in x's dtype → [B,Lq,C]."""
        context = x if context is None else context
        q, k, v = (
            linear(source).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, N, L, D]
            for linear, source in ((self.q, x), (self.k, context), (self.v, context))
        )
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)
        return self.dropout(self.o(x.transpose(1, 2).flatten(2)))


class T5FeedForward(nn.Module):
    """fc2(fc1(x) · GELU(gate(x))), GELU by its tanh form."""

    def __init__(self, dim: int, dim_ffn: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(dim, dim_ffn, bias=False), nn.GELU(approximate="tanh"))
        self.fc1 = nn.Linear(dim, dim_ffn, bias=False)
        self.fc2 = nn.Linear(dim_ffn, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,L,C] → same shape."""
        return self.dropout(self.fc2(self.dropout(self.fc1(x) * self.gate(x))))


class T5RelativeEmbedding(nn.Module):
    """One learnt number per head and bucket of the distance key − query."""

    def __init__(self, num_buckets: int, num_heads: int, *, bidirectional: bool, max_dist: int = 128) -> None:
        super().__init__()
        self.num_buckets, self.bidirectional, self.max_dist = num_buckets, bidirectional, max_dist
        self.embedding = nn.Embedding(num_buckets, num_heads)

    def forward(self, lq: int, lk: int) -> Tensor:
        """→ bias [1, N, lq, lk]."""
        device = self.embedding.weight.device
        distance = torch.arange(lk, device=device)[None, :] - torch.arange(lq, device=device)[:, None]
        return self.embedding(self.bucket(distance)).permute(2, 0, 1).unsqueeze(0)

    def bucket(self, distance: Tensor) -> Tensor:
        """Distances (any shape, int64) → buckets: exact when small, then by logarithm up to `max_dist`."""
        buckets, offset = self.num_buckets, torch.zeros_like(distance)
        if self.bidirectional:  # half of the buckets for keys after the query
            buckets //= 2
            offset = (distance > 0).long() * buckets
            distance = distance.abs()
        else:
            distance = -distance.clamp(max=0)
        exact = buckets // 2
        ratio = torch.log(distance.float().clamp(min=1) / exact) / math.log(self.max_dist / exact)
        large = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
        return offset + torch.where(distance < exact, distance, large)


class T5SelfAttention(nn.Module):
    """An encoder block: self-attention and feed-forward, each behind a norm and beside a residual."""

    def __init__(
        self,
        dim: int,
        dim_attn: int,
        dim_ffn: int,
        num_heads: int,
        num_buckets: int,
        shared_pos: bool = True,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.norm1 = T5LayerNorm(dim)
        self.attn = T5Attention(dim, dim_attn, num_heads, dropout)
        self.norm2 = T5LayerNorm(dim)
        self.ffn = T5FeedForward(dim, dim_ffn, dropout)
        self.pos_embedding = None
        if not shared_pos:
            self.pos_embedding = T5RelativeEmbedding(num_buckets, num_heads, bidirectional=True)

    def forward(self, x: Tensor, blocked: Tensor | None, shared_bias: Tensor | None) -> Tensor:
        """x [B,L,C]; blocked bool [B,1,1,L], true where not to look; shared_bias [1,N,L,L] or None."""
        bias = shared_bias if self.pos_embedding is None else self.pos_embedding(x.shape[1], x.shape[1])
        x = clamp_fp16(x + self.attn(self.norm1(x), None, block(bias, blocked)))
        return clamp_fp16(x + self.ffn(self.norm2(x)))


class T5CrossAttention(nn.Module):
    """A decoder block: causal self-attention, attention to the encoder's output, feed-forward."""

    def __init__(
        self,
        dim: int,
        dim_attn: int,
        dim_ffn: int,
        num_heads: int,
        num_buckets: int,
        shared_pos: bool = True,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.norm1 = T5LayerNorm(dim)
        self.self_attn = T5Attention(dim, dim_attn, num_heads, dropout)
        self.norm2 = T5LayerNorm(dim)
        self.cross_attn = T5Attention(dim, dim_attn, num_heads, dropout)
        self.norm3 = T5LayerNorm(dim)
        self.ffn = T5FeedForward(dim, dim_ffn, dropout)
        self.pos_embedding = None
        if not shared_pos:
            self.pos_embedding = T5RelativeEmbedding(num_buckets, num_heads, bidirectional=False)

    def forward(
        self,
        x: Tensor,
        blocked: Tensor,
        context: Tensor,
        context_blocked: Tensor | None,
        shared_bias: Tensor | None,
    ) -> Tensor:
        """x [B,L,C]; blocked bool [B or 1,1,L,L]; context [B,M,C]; context_blocked bool [B,1,1,M]."""
        bias = shared_bias if self.pos_embedding is None else self.pos_embedding(x.shape[1], x.shape[1])
        x = clamp_fp16(x + self.self_attn(self.norm1(x), None, block(bias, blocked)))
        no_bias = x.new_zeros(1, 1, 1, context.shape[1])
        x = clamp_fp16(x + self.cross_attn(self.norm2(x), context, block(no_bias, context_blocked)))
        return clamp_fp16(x + self.ffn(self.norm3(x)))


def block(bias: Tensor, blocked: Tensor | None) -> Tensor:
    """The bias with the dtype's lowest number where attention is blocked."""
    return bias if blocked is None else bias.masked_fill(blocked, torch.finfo(bias.dtype).min)


def clamp_fp16(x: Tensor) -> Tensor:
    """T5 was trained in bf16: in fp16 its residual can overflow, so it is held inside the range. Other
    dtypes pass.
    """
    if x.dtype == torch.float16:
        limit = torch.finfo(x.dtype).max - 1000
        return x.clamp(-limit, limit)
    return x


def padding(mask: Tensor | None) -> Tensor | None:
    """Mask [B,L] (1 = token) → bool [B,1,1,L], true at padding."""
    return None if mask is None else (mask == 0)[:, None, None, :]


class T5Encoder(nn.Module):
    """ids [B,L] → features [B,L,dim]. `vocab` may also be an embedding to share."""

    def __init__(
        self,
        vocab: int | nn.Embedding,
        dim: int,
        dim_attn: int,
        dim_ffn: int,
        num_heads: int,
        num_layers: int,
        num_buckets: int,
        shared_pos: bool = True,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.token_embedding = vocab if isinstance(vocab, nn.Embedding) else nn.Embedding(vocab, dim)
        self.pos_embedding = None
        if shared_pos:
            self.pos_embedding = T5RelativeEmbedding(num_buckets, num_heads, bidirectional=True)
        self.dropout = nn.Dropout(dropout)
        sizes = (dim, dim_attn, dim_ffn, num_heads, num_buckets, shared_pos, dropout)
        self.blocks = nn.ModuleList(T5SelfAttention(*sizes) for _ in range(num_layers))
        self.norm = T5LayerNorm(dim)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """ids [B,L] int64, mask [B,L] (1 = token, 0 = padding) → [B,L,dim] in the weights' dtype."""
        x = self.dropout(self.token_embedding(ids))
        length, blocked = ids.shape[1], padding(mask)
        bias = None if self.pos_embedding is None else self.pos_embedding(length, length)
        for layer in self.blocks:
            x = layer(x, blocked, bias)
        return self.dropout(self.norm(x))


class T5Decoder(nn.Module):
    """ids [B,L] and the encoder's output [B,M,dim] → features [B,L,dim]; position l sees ids up to l."""

    def __init__(
        self,
        vocab: int | nn.Embedding,
        dim: int,
        dim_attn: int,
        dim_ffn: int,
        num_heads: int,
        num_layers: int,
        num_buckets: int,
        shared_pos: bool = True,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.token_embedding = vocab if isinstance(vocab, nn.Embedding) else nn.Embedding(vocab, dim)
        self.pos_embedding = None
        if shared_pos:
            self.pos_embedding = T5RelativeEmbedding(num_buckets, num_heads, bidirectional=False)
        self.dropout = nn.Dropout(dropout)
        sizes = (dim, dim_attn, dim_ffn, num_heads, num_buckets, shared_pos, dropout)
        self.blocks = nn.ModuleList(T5CrossAttention(*sizes) for _ in range(num_layers))
        self.norm = T5LayerNorm(dim)

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        encoder_states: Tensor | None = None,
        encoder_mask: Tensor | None = None,
    ) -> Tensor:
        """ids [B,L], mask [B,L]; encoder_states [B,M,dim], encoder_mask [B,M] → [B,L,dim]."""
        if encoder_states is None:
            msg = "T5Decoder needs encoder_states [B, M, dim]"
            raise ValueError(msg)
        length = ids.shape[1]
        blocked = torch.ones(length, length, dtype=torch.bool, device=ids.device).triu(1)[None, None]
        if mask is not None:
            blocked = blocked | padding(mask)
        x = self.dropout(self.token_embedding(ids))
        bias = None if self.pos_embedding is None else self.pos_embedding(length, length)
        for layer in self.blocks:
            x = layer(x, blocked, encoder_states, padding(encoder_mask), bias)
        return self.dropout(self.norm(x))


class T5Model(nn.Module):
    """Encoder and decoder with one token embedding, and a head: logits [B,L,vocab]."""

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        dim_attn: int,
        dim_ffn: int,
        num_heads: int,
        encoder_layers: int,
        decoder_layers: int,
        num_buckets: int,
        shared_pos: bool = True,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, dim)
        sizes = (self.token_embedding, dim, dim_attn, dim_ffn, num_heads)
        self.encoder = T5Encoder(*sizes, encoder_layers, num_buckets, shared_pos, dropout)
        self.decoder = T5Decoder(*sizes, decoder_layers, num_buckets, shared_pos, dropout)
        self.head = nn.Linear(dim, vocab_size, bias=False)

    def forward(
        self, encoder_ids: Tensor, encoder_mask: Tensor, decoder_ids: Tensor, decoder_mask: Tensor
    ) -> Tensor:
        """ids and masks [B,M] for the encoder, [B,L] for the decoder → logits [B,L,vocab]."""
        states = self.encoder(encoder_ids, encoder_mask)
        return self.head(self.decoder(decoder_ids, decoder_mask, states, encoder_mask))


def umt5_xxl(
    *,
    encoder_only: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    **changes: Any,
) -> T5Encoder | T5Model:
    """umT5-xxl's network: 5,680,910,336 parameters for the encoder. On `device="meta"` it takes no memory.

    `changes` replace sizes of `UMT5_XXL` (and num_layers, or encoder_layers and decoder_layers).
    """
    with torch.device(device):
        if encoder_only:
            model: T5Encoder | T5Model = T5Encoder(**{**UMT5_XXL, "num_layers": UMT5_XXL_LAYERS, **changes})
        else:
            sizes = {("vocab_size" if k == "vocab" else k): v for k, v in UMT5_XXL.items()}
            layers = {"encoder_layers": UMT5_XXL_LAYERS, "decoder_layers": UMT5_XXL_LAYERS}
            model = T5Model(**{**sizes, **layers, **changes})
    return model.to(dtype)


class T5EncoderModel:
    """Texts → features, as pipelines use it.

    `checkpoint_path` is the encoder's `.pth` or `.safetensors`, `tokenizer_path` the tokenizer's folder,
    `shard_fn` a function that shards the model instead of moving it to `device` (FSDP). `quant` ('int8' or
    'fp8') takes `quant_dir`'s quantised encoder instead of `checkpoint_path`. Raises
    `wan.loading.CheckpointError`. `model` is an encoder that is there already.
    """

    def __init__(
        self,
        text_len: int,
        dtype: torch.dtype = torch.bfloat16,
        device: str | int | torch.device | None = None,
        checkpoint_path: str | os.PathLike[str] | None = None,
        tokenizer_path: str | os.PathLike[str] | None = None,
        shard_fn: Callable[..., nn.Module] | None = None,
        quant: str | None = None,
        quant_dir: str | os.PathLike[str] | None = None,
        *,
        model: T5Encoder | None = None,
    ) -> None:
        self.text_len, self.dtype = text_len, dtype
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.checkpoint_path, self.tokenizer_path = checkpoint_path, tokenizer_path
        if tokenizer_path is None:
            msg = "T5EncoderModel needs tokenizer_path, the folder with tokenizer.json"
            raise ValueError(msg)
        self.tokenizer = HuggingfaceTokenizer(tokenizer_path, seq_len=text_len, clean="whitespace")
        self.model = self._load(shard_fn, quant, quant_dir) if model is None else model.to(self.device, dtype)
        self.model.eval().requires_grad_(False)

    def _load(
        self,
        shard_fn: Callable[..., nn.Module] | None,
        quant: str | None,
        quant_dir: str | os.PathLike[str] | None,
    ) -> nn.Module:
        from wan.loading import network_sizes

        sizes = {} if self.checkpoint_path is None else network_sizes(self.checkpoint_path, "t5")
        build = partial(umt5_xxl, encoder_only=True, dtype=self.dtype, device="meta", **sizes)
        place = torch.device("cpu") if shard_fn is not None else self.device
        if quant is not None:
            if quant_dir is None:
                msg = f"quant={quant!r} needs quant_dir, the folder with t5_{quant}.safetensors"
                raise ValueError(msg)
            from wan.quant import load_quantized
            from wan.tensor_files import read_header, read_safetensors

            folder = Path(quant_dir)
            if (folder / "quant_models").is_dir():  # as the files are published
                folder /= "quant_models"
            state = read_safetensors(read_header(folder / f"t5_{quant}.safetensors").values(), device=place)
            model: nn.Module = load_quantized(build(), state, folder / f"t5_map_{quant}.json")
        elif self.checkpoint_path is None:
            msg = "T5EncoderModel needs checkpoint_path, a file such as models_t5_umt5-xxl-enc-bf16.pth"
            raise ValueError(msg)
        else:
            from wan.loading import load_model

            model = load_model(build, self.checkpoint_path, dtype=self.dtype, device=place)
        return model if shard_fn is None else shard_fn(model, sync_module_states=False)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], device: str | int | torch.device) -> list[Tensor]:
        """Texts → one [n, 4096] each on `device`, n = its own number of tokens (at most text_len)."""
        ids, mask = self.tokenizer(texts, return_mask=True)
        ids, mask = ids.to(device), mask.to(device)
        features = self.model(ids, mask)
        return [f[:n] for f, n in zip(features, mask.sum(dim=1).tolist(), strict=True)]
