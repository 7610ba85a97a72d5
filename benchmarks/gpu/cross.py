# ruff: noqa: N803  a kernel's constants are capitals, as in wan/kernels
"""A candidate: text and image cross-attention in one Triton kernel, with the text's padding as one key.

Prompts are padded to 512 tokens with zeros *before* the embedding, so all padding tokens have the same key
and value; n of them weigh as much as one whose score has log n added (exact; performance.md §3.2). One
launch reads q once, runs both softmaxes and writes their sum once, instead of two launches, two outputs and
an addition.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from wan.modules.layers import BlockContext, TextCondition, WanI2VCrossAttention

TILE_ROWS, TILE_KEYS = 128, 64


@triton.jit
def _attend(
    query, k, v, keys, k_row, v_row, scale_log2, padding_log2,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """softmax(query·kᵀ)·v in fp32 for one head; scores are in powers of two, the last key has padding_log2
    more.
    """
    lane = tl.arange(0, DIM)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, DIM], tl.float32)
    for start in range(0, keys, KEYS):
        at = start + tl.arange(0, KEYS)
        inside = at < keys
        key = tl.load(k + at[None, :] * k_row + lane[:, None], mask=inside[None, :], other=0.0)
        score = tl.dot(query, key) * scale_log2
        score = tl.where(at[None, :] == keys - 1, score + padding_log2, score)
        score = tl.where(inside[None, :], score, -float("inf"))
        now = tl.maximum(top, tl.max(score, axis=1))
        weight = tl.exp2(score - now[:, None])
        old = tl.exp2(top - now)
        total = total * old + tl.sum(weight, axis=1)
        value = tl.load(v + at[:, None] * v_row + lane[None, :], mask=inside[:, None], other=0.0)
        out = out * old[:, None] + tl.dot(weight.to(value.dtype), value)
        top = now
    return out / total[:, None]


@triton.jit
def cross_kernel(
    q, text_k, text_v, image_k, image_v, out,
    rows, text_keys, image_keys, q_row, text_k_row, text_v_row, image_k_row, image_v_row, out_row,
    scale_log2, padding_log2,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """One program a tile of rows and a head: attention to the text plus attention to the image."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    head = tl.program_id(1) * DIM
    lane = tl.arange(0, DIM)
    inside = row[:, None] < rows
    query = tl.load(q + row[:, None] * q_row + head + lane[None, :], mask=inside, other=0.0)
    both = _attend(
        query, text_k + head, text_v + head, text_keys, text_k_row, text_v_row, scale_log2, padding_log2,
        ROWS, KEYS, DIM,
    )  # fmt: skip
    both += _attend(
        query, image_k + head, image_v + head, image_keys, image_k_row, image_v_row, scale_log2, 0.0,
        ROWS, KEYS, DIM,
    )  # fmt: skip
    tl.store(out + row[:, None] * out_row + head + lane[None, :], both.to(out.dtype.element_ty), mask=inside)


def cross(q: Tensor, kv: tuple[Tensor, ...], padding: int) -> Tensor:
    """q [1, L, N, D]; kv = text k, text v, image k, image v [1, n, N, D], the text's last key standing for
    `padding` ≥ 1 tokens → [1, L, N·D], both attentions summed in fp32 and rounded once.
    """
    rows, heads, dim = q.shape[1:]
    for t in (q, *kv):
        if t.shape[0] != 1 or t.stride(3) != 1 or t.stride(2) != dim:
            msg = f"cross: heads must lie side by side, got {tuple(t.shape)}, strides {t.stride()}"
            raise ValueError(msg)
    out = torch.empty(1, rows, heads * dim, dtype=q.dtype, device=q.device)
    cross_kernel[(triton.cdiv(rows, TILE_ROWS), heads)](
        q, *kv, out, rows, kv[0].shape[1], kv[2].shape[1],
        q.stride(1), *(t.stride(1) for t in kv), out.stride(1),
        dim**-0.5 * math.log2(math.e), math.log2(padding),
        ROWS=TILE_ROWS, KEYS=TILE_KEYS, DIM=dim, num_warps=8, num_stages=2,
    )  # fmt: skip
    return out


def distinct(tokens: Tensor) -> int:
    """How many tokens of [1, n, C] there are up to and with the first of the equal ones at the end."""
    other = (tokens[0] != tokens[0, -1]).any(dim=-1).nonzero()
    return 1 if not len(other) else int(other[-1]) + 2


class OneKernelCross(WanI2VCrossAttention):
    """The same parameters, the candidate's arithmetic. `block.cross_attn.__class__ = OneKernelCross` takes
    it.
    """

    def keys_values(self, text: TextCondition) -> tuple[Tensor, ...]:
        """Text keys and values without the repeated padding, then the image's, then how many tokens the last
        text key stands for.
        """
        keep = min(distinct(text.tokens), text.tokens.shape[1])
        k, v, image_k, image_v = super().keys_values(text)
        repeats = torch.tensor(text.tokens.shape[1] - keep + 1)  # on the host: reading it waits for nothing
        return (
            *(t[:, :keep].contiguous() for t in (k, v)),
            image_k.contiguous(),
            image_v.contiguous(),
            repeats,
        )

    def attend_image(self, q: Tensor, kv: tuple[Tensor, ...], ctx: BlockContext) -> Tensor:
        return super().attend_image(q, kv[:4], ctx)

    def attend(
        self, q: Tensor, kv: tuple[Tensor, ...], ctx: BlockContext, image: Tensor | None = None
    ) -> Tensor:
        """Text and image by one launch, whether or not the image's part is known."""
        return self.o(cross(q, kv[:4], int(kv[4])))
