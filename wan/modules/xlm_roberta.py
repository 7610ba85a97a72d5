"""XLM-RoBERTa, the text tower of Wan's CLIP. MultiTalk never runs it; it is here so that the whole CLIP
loads.

Sources: RoBERTa, arXiv 1907.11692; XLM-R, arXiv 1911.02116; multitalk.md §4.5 for names and sizes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["XLMRoberta", "XLMRobertaWithHead", "xlm_roberta_large"]

XLM_ROBERTA_LARGE: dict[str, Any] = {
    "vocab_size": 250002,
    "max_seq_len": 514,
    "type_size": 1,
    "pad_id": 1,
    "dim": 1024,
    "num_heads": 16,
    "num_layers": 24,
    "post_norm": True,
    "dropout": 0.1,
    "eps": 1e-5,
}


class SelfAttention(nn.Module):
    """Multi-head attention with biases and the usual 1/√d."""

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B,L,C], mask bool [B,1,1,L], true where to look → [B,L,C]."""
        q, k, v = (
            linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, N, L, D]
            for linear in (self.q, self.k, self.v)
        )
        dropout = self.dropout.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.dropout(self.o(x.transpose(1, 2).flatten(2)))


class AttentionBlock(nn.Module):
    """Attention and feed-forward; the norm stands after each sum (`post_norm`) or before each part."""

    def __init__(
        self, dim: int, num_heads: int, post_norm: bool, dropout: float = 0.1, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.attn = SelfAttention(dim, num_heads, dropout)
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.ffn = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim), nn.Dropout(dropout)
        )
        self.norm2 = nn.LayerNorm(dim, eps=eps)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B,L,C], mask bool [B,1,1,L] → [B,L,C]."""
        if self.post_norm:
            x = self.norm1(x + self.attn(x, mask))
            return self.norm2(x + self.ffn(x))
        x = x + self.attn(self.norm1(x), mask)
        return x + self.ffn(self.norm2(x))


class XLMRoberta(nn.Module):
    """ids [B,L] → features [B,L,dim]. Padding is recognised by its id."""

    def __init__(
        self,
        vocab_size: int,
        max_seq_len: int = 514,
        type_size: int = 1,
        pad_id: int = 1,
        dim: int = 1024,
        num_heads: int = 16,
        num_layers: int = 24,
        post_norm: bool = True,
        dropout: float = 0.1,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.pad_id, self.post_norm = pad_id, post_norm
        self.token_embedding = nn.Embedding(vocab_size, dim, padding_idx=pad_id)
        self.type_embedding = nn.Embedding(type_size, dim)
        self.pos_embedding = nn.Embedding(max_seq_len, dim, padding_idx=pad_id)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            AttentionBlock(dim, num_heads, post_norm, dropout, eps) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim, eps=eps)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B,L] int64, L ≤ max_seq_len − 2 → [B,L,dim]."""
        tokens = ids != self.pad_id
        # Positions count the tokens from pad_id + 1 on; padding has the position pad_id.
        positions = self.pad_id + tokens.cumsum(dim=1) * tokens
        x = self.token_embedding(ids) + self.type_embedding.weight[0] + self.pos_embedding(positions)
        x = self.dropout(self.norm(x) if self.post_norm else x)
        mask = tokens[:, None, None, :]
        for block in self.blocks:
            x = block(x, mask)
        return x if self.post_norm else self.norm(x)


class XLMRobertaWithHead(XLMRoberta):
    """The same with a projection: ids [B,L] → [B,out_dim], from the mean over the tokens."""

    def __init__(self, *, out_dim: int, **sizes: Any) -> None:
        super().__init__(**sizes)
        dim = self.norm.normalized_shape[0]
        middle = (dim + out_dim) // 2
        self.head = nn.Sequential(
            nn.Linear(dim, middle, bias=False), nn.GELU(), nn.Linear(middle, out_dim, bias=False)
        )

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B,L] int64 → [B,out_dim]."""
        x = super().forward(ids)
        tokens = (ids != self.pad_id).unsqueeze(-1).to(x.dtype)
        return self.head((x * tokens).sum(dim=1) / tokens.sum(dim=1))


def xlm_roberta_large(
    *, out_dim: int | None = None, device: str | torch.device = "cpu", **changes: Any
) -> XLMRoberta:
    """XLM-R large (with a head if `out_dim` is given); `changes` replace sizes of `XLM_ROBERTA_LARGE`."""
    sizes = {**XLM_ROBERTA_LARGE, **changes}
    with torch.device(device):
        return XLMRoberta(**sizes) if out_dim is None else XLMRobertaWithHead(out_dim=out_dim, **sizes)
