"""Attention of the networks: the two call-compatible functions, audio cross-attention and the reference map
of L-RoPE.

Kernels are chosen in `wan.attention_backends`. MultiTalk, arXiv 2505.22647; specification §4.3.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from ..attention_backends import AttentionBackend
from .layers import weight_fp32
from .ops import EAGER, Ops
from .rope import RotaryPositionalEmbedding1D
from .runtime import Grid, Parallel, Runtime

__all__ = [
    "SingleStreamAttention",
    "SingleStreamMutiAttention",
    "attention",
    "flash_attention",
    "official_reference_map",
    "reference_map",
]

_VERSION_TO_BACKEND = {None: "auto", 2: "flash_attn", 3: "flash_attn"}


@cache
def _backend(name: str) -> AttentionBackend:
    return AttentionBackend(name=name)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_lens: Tensor | None = None,
    k_lens: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    q_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    version: int | None = None,
) -> Tensor:
    """Attention in half precision: q [B, Lq, N, C], k, v [B, Lk, N, C] → [B, Lq, N, C] in q's dtype.

    Wider inputs are cast to `dtype`. `version` 2 or 3 asks for flash-attn itself. Inference only: `dropout_p`
    must be 0; every backend's forward is deterministic, so `deterministic` has nothing to do.
    """
    if dropout_p:
        msg = f"dropout_p={dropout_p}: this attention is for inference and has no dropout"
        raise ValueError(msg)
    out_dtype = q.dtype
    half = (torch.float16, torch.bfloat16)
    q, k, v = (t if t.dtype in half else t.to(dtype) for t in (q, k, v))
    q, k = q.to(v.dtype), k.to(v.dtype)
    if q_scale is not None:
        q = q * q_scale
    backend = _backend(_VERSION_TO_BACKEND[version])
    out = backend(
        q, k, v, q_lens=q_lens, k_lens=k_lens, scale=softmax_scale, causal=causal, window=window_size
    )
    return out.to(out_dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_lens: Tensor | None = None,
    k_lens: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    q_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    fa_version: int | None = None,
) -> Tensor:
    """The same as `flash_attention` (two names, because callers use both)."""
    return flash_attention(
        q,
        k,
        v,
        q_lens,
        k_lens,
        dropout_p,
        softmax_scale,
        q_scale,
        causal,
        window_size,
        deterministic,
        dtype,
        fa_version,
    )


def reference_map(
    q: Tensor, k: Tensor, grid: Grid, masks: Tensor, parallel: Parallel, *, official: bool = False
) -> Tensor:
    """How much each token looks at each reference region: [3, L_local].

    q, k [B=1, L_local, N, D] after RoPE; masks [3, H·W] of the first latent frame. Softmax over that frame's
    keys, weighted by mask / sum(mask), averaged over heads: attention whose values are the masks, so no [N,
    L, H·W] matrix exists. A mask without any token gives 0.

    The head average is fp32, which removes the ties that decide speakers by chance in bf16. `official`
    computes the explicit matrix in q's dtype, as the reference implementation does (specification §8.5).
    """
    k = parallel.first_frame(k, grid)
    if official:
        return official_reference_map(q, k, masks)
    weights = (masks / masks.sum(-1, keepdim=True).clamp(min=1)).to(q.dtype)  # [3, H·W]
    # as wide as the keys: the fast kernels take nothing else, and the padding costs them less than a slow one
    values = weights.new_zeros(weights.shape[1], max(8, q.shape[-1]))
    values[:, :3] = weights.T
    values = values[None, :, None].expand(1, -1, q.shape[2], -1)
    out = _backend("sdpa")(q, k, values)  # [1, L, N, D]
    return out[0, :, :, :3].float().mean(1).T.contiguous()


def official_reference_map(q: Tensor, k: Tensor, masks: Tensor, halves: int = 2) -> Tensor:
    """The map with an explicit softmax in q's dtype and the mean over heads in `halves` parts: [3, L]."""
    q, k = q[0].transpose(0, 1), k[0].transpose(0, 1)  # [N, L, D]
    masks = masks.to(q.dtype)
    total = q.new_zeros(masks.shape[0], q.shape[1])
    for part_q, part_k in zip(q.chunk(halves), k.chunk(halves), strict=True):
        scaled = part_q * q.shape[-1] ** -0.5
        weights = (scaled @ part_k.transpose(-1, -2)).softmax(-1)  # [N/halves, L, H·W]
        for i, mask in enumerate(masks):
            total[i] += ((weights * mask).sum(-1) / mask.sum()).mean(0)
    return total / halves


class SingleStreamAttention(nn.Module):
    """Video tokens of one latent frame attend to the audio tokens of that frame; no positions.

    x [1, T·S, dim] with S tokens a frame, audio [1, T, M, encoder_hidden_states_dim] → [1, T·S, dim].
    Parameters: q_linear, kv_linear (k then v), proj. There is no norm of q and k in MultiTalk's checkpoints.
    """

    def __init__(
        self,
        dim: int,
        encoder_hidden_states_dim: int,
        num_heads: int,
        qkv_bias: bool,
        qk_norm: bool,
        norm_layer: type[nn.Module] | None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            msg = f"dim {dim} is not a multiple of num_heads {num_heads}"
            raise ValueError(msg)
        if qk_norm or attn_drop or proj_drop:
            msg = "audio attention has neither qk_norm nor dropout in the published checkpoints"
            raise ValueError(msg)
        self.dim = dim
        self.encoder_hidden_states_dim = encoder_hidden_states_dim
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.q_linear = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv_linear = nn.Linear(encoder_hidden_states_dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def keys_values(self, audio: Tensor, human_num: int = 1) -> tuple[Tensor, Tensor]:
        """k, v [T, M, N, D] of audio [1, T, M, C]: the same in every step of a clip, so worth keeping."""
        kv = self.kv_linear(audio[0]).unflatten(-1, (2, self.num_heads, self.head_dim))
        return kv[:, :, 0], kv[:, :, 1]

    def attend(
        self, x: Tensor, k: Tensor, v: Tensor, runtime: Runtime, positions: Tensor | None = None
    ) -> Tensor:
        """x [1, L, dim] against k, v of `keys_values`; L = T·S tokens in (t, h, w) order."""
        q = self.q_linear(x)
        if positions is not None:
            q = runtime.ops.rope(q, *self.rotate.table(positions))
        q = q[0].unflatten(-1, (self.num_heads, self.head_dim)).unflatten(0, (k.shape[0], -1))  # [T, S, N, D]
        return self.proj(runtime.attention(q, k, v).reshape(x.shape))

    def absorb(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """k, v [T, M, N, D] with both projections multiplied in: keys [T, C, N·M] with bias [T, 1, N·M], and
        values [T, N·M, C].

        (x·Wq + b)·k = x·(Wqᵀk) + b·k, and Wo·Σ pᵢvᵢ = Σ pᵢ(Wo·vᵢ): exact algebra, worth it for M ≪ D. Not
        with L-RoPE, which stands between Wq and k (performance.md §3.2).

        Rounded once, from fp32, and made small before: a head's weights sum to one, so its keys need no
        mean, and the output's bias and all heads' mean values may be spread evenly over the heads. Folded
        into values that are bf16 already, the bias alone added 30 % to the error, measured on a GPU; here it
        adds nothing (tests/wan/test_absorbed.py), and no copy of it is made for the product to add to.
        """
        heads, dtype = (self.num_heads, self.head_dim), k.dtype
        k, v = k.float() * self.head_dim**-0.5, v.float()
        k = k - k.mean(1, keepdim=True)
        into = weight_fp32(self.q_linear).unflatten(0, heads)  # [N, D, C]
        keys = torch.einsum("tmnd,ndc->tcnm", k, into).flatten(2)
        if self.q_linear.bias is None:
            bias = keys.new_zeros(keys.shape[0], 1, keys.shape[2])
        else:
            bias = torch.einsum("tmnd,nd->tnm", k, self.q_linear.bias.float().view(heads)).flatten(1)[:, None]
        out_of = weight_fp32(self.proj).unflatten(1, heads)  # [C, N, D]
        values = torch.einsum("tmnd,cnd->tnmc", v, out_of)
        mean = values.mean(2, keepdim=True)
        values = values - mean + mean.mean(1, keepdim=True) + self.proj.bias.float() / self.num_heads
        return keys.to(dtype).contiguous(), bias.to(dtype), values.flatten(1, 2).to(dtype).contiguous()

    def attend_absorbed(
        self, x: Tensor, keys: Tensor, bias: Tensor, values: Tensor, frames: int, ops: Ops = EAGER
    ) -> Tensor:
        """x [1, L, dim] of `frames` latent frames against `absorb`'s result for them: two products and a
        softmax over each head's M keys.

        The result may be that of two frames only, when all after the first hear the same (silence).
        Inference only: writes each product where it belongs.
        """
        out = torch.empty_like(x)
        per_frame = x.shape[1] // frames
        if keys.shape[0] == frames:
            tokens, into = (t[0].unflatten(0, (frames, per_frame)) for t in (x, out))  # [T, S, C]
            self._absorbed(tokens, keys, bias, values, into, ops)
        else:
            for i, span in enumerate((slice(per_frame), slice(per_frame, None))):
                one = slice(i, i + 1)
                self._absorbed(x[:, span], keys[one], bias[one], values[one], out[:, span], ops)
        return out

    def _absorbed(self, x: Tensor, keys: Tensor, bias: Tensor, values: Tensor, out: Tensor, ops: Ops) -> None:
        torch.bmm(ops.absorbed_weights(x, keys, bias, self.num_heads), values, out=out)

    def forward(
        self,
        x: Tensor,
        encoder_hidden_states: Tensor,
        shape: Grid | None = None,
        enable_sp: bool = False,
        kv_seq: object = None,
    ) -> Tensor:
        """The parts in one call. `shape`, `enable_sp` and `kv_seq` are accepted, not needed."""
        return self.attend(x, *self.keys_values(encoder_hidden_states), Runtime())


class SingleStreamMutiAttention(SingleStreamAttention):
    """Audio attention for two speakers by L-RoPE: a token and the audio of "its" speaker get near positions.

    Speaker 1 lives at 0…class_interval, speaker 2 at class_range−class_interval…class_range, the background
    at class_range/2. A token's class is the largest of its three reference-map values; inside a speaker's
    range it is placed by that value. Keys sit in the middle of their range.
    """

    def __init__(
        self,
        dim: int,
        encoder_hidden_states_dim: int,
        num_heads: int,
        qkv_bias: bool,
        qk_norm: bool,
        norm_layer: type[nn.Module] | None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        eps: float = 1e-6,
        class_range: int = 24,
        class_interval: int = 4,
    ) -> None:
        super().__init__(
            dim,
            encoder_hidden_states_dim,
            num_heads,
            qkv_bias,
            qk_norm,
            norm_layer,
            attn_drop,
            proj_drop,
            eps,
        )
        self.ranges = ((0, class_interval), (class_range - class_interval, class_range))
        self.background = float(class_range // 2)
        self.rotate = RotaryPositionalEmbedding1D(self.head_dim)

    def keys_values(self, audio: Tensor, human_num: int = 1) -> tuple[Tensor, Tensor]:
        """As for one speaker; with two, the keys are rotated to the middle of their speaker's range."""
        k, v = super().keys_values(audio)
        if human_num == 1:
            return k, v
        if human_num != len(self.ranges):
            msg = f"{human_num} speakers: this checkpoint knows 1 or {len(self.ranges)}"
            raise ValueError(msg)
        middles = [sum(bounds) / 2 for bounds in self.ranges]
        per_person = k.shape[1] // human_num
        positions = torch.tensor(middles, device=k.device).repeat_interleave(per_person)
        return self.rotate(k.transpose(1, 2), positions).transpose(1, 2), v

    def positions(self, ref_map: Tensor, parallel: Parallel | None = None) -> Tensor:
        """The L-RoPE position of each token, from the map [3, L]: [L] in the map's dtype. Ties go to the
        lower class.
        """
        low, high = ref_map.amin(1), ref_map.amax(1)
        low, high = (parallel or Parallel()).extremes(low, high)
        placed = [
            normalize_and_scale(ref_map[i], (low[i], high[i]), bounds) for i, bounds in enumerate(self.ranges)
        ]
        background = torch.full_like(ref_map[0], self.background)
        candidates = torch.stack((*placed, background), dim=1)  # [L, 3]
        return candidates.gather(1, ref_map.argmax(0)[:, None])[:, 0]

    def forward(
        self,
        x: Tensor,
        encoder_hidden_states: Tensor,
        shape: Grid | None = None,
        x_ref_attn_map: Tensor | None = None,
        human_num: int | None = None,
    ) -> Tensor:
        """The parts in one call; `x_ref_attn_map` [3, L] is needed with two speakers."""
        people = human_num or 1
        positions = None if people == 1 else self.positions(x_ref_attn_map)
        return self.attend(x, *self.keys_values(encoder_hidden_states, people), Runtime(), positions)


def normalize_and_scale(
    column: Tensor, source_range: tuple, target_range: tuple, epsilon: float = 1e-8
) -> Tensor:
    """Map `column` linearly from `source_range` to `target_range`; `epsilon` keeps an empty range finite."""
    low, high = source_range
    new_low, new_high = target_range
    return (column - low) / (high - low + epsilon) * (new_high - new_low) + new_low
