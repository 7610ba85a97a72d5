"""wav2vec 2.0 (base) with its features interpolated to video frames, as MultiTalk hears speech.

Raw 16 kHz audio → 7 convolutions (÷320, about 50 Hz) → linear interpolation to one row a video frame → 12
transformer layers, whose 12 outputs are the audio embedding. The waveform is not normalised (multitalk.md
§0.1). Sources: arXiv 2006.11477; multitalk.md §3.2 (interpolation, which states count) and §4.5 (names,
sizes).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from wan.tensor_files import CheckpointError

__all__ = ["Wav2Vec2Config", "Wav2Vec2Model", "Wav2Vec2Output"]


@dataclass(frozen=True, kw_only=True)
class Wav2Vec2Config:
    """The sizes, named as in `config.json`; the defaults are chinese-wav2vec2-base's."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    conv_dim: tuple[int, ...] = (512,) * 7
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    layer_norm_eps: float = 1e-5
    mask_time_prob: float = 0.05  # above 0, the checkpoint has a `masked_spec_embed` (for training only)

    # Variants of the architecture that this module hasn't: a config that asks for one is refused.
    FIXED = {  # noqa: RUF012  (a constant of the class, not a field)
        "model_type": "wav2vec2",
        "conv_bias": False,
        "feat_extract_norm": "group",
        "feat_extract_activation": "gelu",
        "hidden_act": "gelu",
        "do_stable_layer_norm": False,
        "add_adapter": False,
    }

    @classmethod
    def from_dict(
        cls, config: Mapping[str, Any], source: str | os.PathLike[str] = "config"
    ) -> Wav2Vec2Config:
        """From the content of `config.json`. Raises CheckpointError for another architecture, naming the
        key.
        """
        for key, wanted in cls.FIXED.items():
            if config.get(key, wanted) != wanted:
                problem = f"{key} is {config[key]!r}, only {wanted!r} is supported"
                raise CheckpointError(source, problem, "Use TencentGameMate/chinese-wav2vec2-base")
        known = {f.name for f in fields(cls)}
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in known}
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Wav2Vec2Output:
    """`hidden_states`: layers + 1 tensors [B,T,C], the first before the first layer; `last_hidden_state`:
    the last.
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...]


class ConvLayer(nn.Module):
    """A strided convolution without bias, GELU after it; the first layer also has a norm per channel."""

    def __init__(self, in_dim: int, out_dim: int, kernel: int, stride: int, *, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_dim, out_dim, kernel, stride=stride, bias=False)
        self.layer_norm = nn.GroupNorm(out_dim, out_dim) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        """x [B,C,n] → [B,C',n']."""
        x = self.conv(x)
        return F.gelu(x if self.layer_norm is None else self.layer_norm(x))


class FeatureEncoder(nn.Module):
    """Waveform [B,n] → features [B,C,≈n/320]."""

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        dims = (1, *config.conv_dim)
        self.conv_layers = nn.ModuleList(
            ConvLayer(dims[i], dims[i + 1], config.conv_kernel[i], config.conv_stride[i], norm=i == 0)
            for i in range(len(config.conv_dim))
        )

    def forward(self, wave: Tensor) -> Tensor:
        """See the class."""
        x = wave.unsqueeze(1)
        for layer in self.conv_layers:
            x = layer(x)
        return x


class FeatureProjection(nn.Module):
    """Norm and projection to the transformer's width."""

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(config.conv_dim[-1], eps=config.layer_norm_eps)
        self.projection = nn.Linear(config.conv_dim[-1], config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,T,conv_dim] → [B,T,C]."""
        return self.projection(self.layer_norm(x))


class PositionalConv(nn.Module):
    """Relative positions by a wide grouped convolution with weight norm over its taps."""

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        kernel, groups = config.num_conv_pos_embeddings, config.num_conv_pos_embedding_groups
        conv = nn.Conv1d(config.hidden_size, config.hidden_size, kernel, padding=kernel // 2, groups=groups)
        self.conv = weight_norm(conv, name="weight", dim=2)
        self.surplus = 1 - kernel % 2  # an even kernel with padding k/2 gives one position too many

    def forward(self, x: Tensor) -> Tensor:
        """x [B,T,C] → same shape."""
        y = self.conv(x.mT)
        return F.gelu(y[..., : y.shape[-1] - self.surplus]).mT


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.q_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,T,C] → same shape."""
        q, k, v = (
            linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, N, T, D]
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.intermediate_dense = nn.Linear(dim, hidden)
        self.output_dense = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,T,C] → same shape."""
        return self.output_dense(F.gelu(self.intermediate_dense(x)))


class EncoderLayer(nn.Module):
    """A post-norm transformer layer."""

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        dim, eps = config.hidden_size, config.layer_norm_eps
        self.attention = Attention(dim, config.num_attention_heads)
        self.layer_norm = nn.LayerNorm(dim, eps=eps)
        self.feed_forward = FeedForward(dim, config.intermediate_size)
        self.final_layer_norm = nn.LayerNorm(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,T,C] → same shape."""
        x = self.layer_norm(x + self.attention(x))
        return self.final_layer_norm(x + self.feed_forward(x))


class Encoder(nn.Module):
    """Positions, norm, layers."""

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        self.pos_conv_embed = PositionalConv(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [B,T,C] → the input of every layer and the output of the last."""
        states = [self.layer_norm(x + self.pos_conv_embed(x))]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return tuple(states)


class Wav2Vec2Model(nn.Module):
    """Waveform → hidden states at one row a video frame."""

    def __init__(self, config: Wav2Vec2Config | None = None) -> None:
        super().__init__()
        self.config = config or Wav2Vec2Config()
        if self.config.mask_time_prob > 0:
            self.masked_spec_embed = nn.Parameter(torch.empty(self.config.hidden_size).uniform_())
        self.feature_extractor = FeatureEncoder(self.config)
        self.feature_projection = FeatureProjection(self.config)
        self.encoder = Encoder(self.config)

    def forward(self, wave: Tensor, seq_len: int) -> Wav2Vec2Output:
        """wave [B,n] at 16 kHz, fp32, as it is; seq_len = video frames → states [B,seq_len,C].

        Raises ValueError for audio shorter than one feature (25 ms) or no frame.
        """
        features = interpolate_features(self.features(wave), seq_len)  # [B, T, conv_dim]
        states = self.encoder(self.feature_projection(features))
        return Wav2Vec2Output(last_hidden_state=states[-1], hidden_states=states)

    def features(self, wave: Tensor) -> Tensor:
        """wave [B,n] → convolution features [B,conv_dim,≈n/320]."""
        shortest = 1
        for kernel, stride in zip(self.config.conv_kernel[::-1], self.config.conv_stride[::-1], strict=True):
            shortest = (shortest - 1) * stride + kernel
        if wave.ndim != 2 or wave.shape[1] < shortest:
            msg = f"wave must be [batch, samples] with at least {shortest} samples, got {list(wave.shape)}"
            raise ValueError(msg)
        return self.feature_extractor(wave)

    @torch.no_grad()
    def embed(self, wave: Tensor, seq_len: int) -> Tensor:
        """One track [n] at 16 kHz → audio embedding [seq_len, layers, C] fp32: all states but the first."""
        states = self(wave[None].to(self.feature_projection.projection.weight), seq_len).hidden_states
        return torch.stack(states[1:], dim=2)[0]


def interpolate_features(features: Tensor, seq_len: int) -> Tensor:
    """[B,C,n] → [B,seq_len,C], linearly with the ends aligned."""
    if seq_len < 1:
        msg = f"seq_len is a number of video frames, at least 1, got {seq_len}"
        raise ValueError(msg)
    return F.interpolate(features, size=seq_len, mode="linear", align_corners=True).mT
