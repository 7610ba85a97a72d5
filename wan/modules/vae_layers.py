"""The layers of the causal video VAE, and what travels with one running encode or decode.

Every temporal layer keeps the last frames it has seen in a `CausalCache`, so any split of a video into pieces
gives the same numbers. Source: multitalk.md §4.5.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NormSiluFn = Callable[..., Tensor]
"""norm_silu(x [B,C,T,H,W], gamma [C,1,1,1], out=None) → SiLU(norm(x)), as `wan.kernels.rms_norm_silu`."""

HISTORY = 2  # frames that a convolution of three in time sees before its own


class CausalCache:
    """What goes through one running encode or decode: each temporal layer's last input frames, and how
    norm and SiLU are computed.

    It lives outside the network, so one network can serve several videos at the same time.
    """

    def __init__(self, norm_silu: NormSiluFn | None = None) -> None:
        self.norm_silu = norm_silu or norm_silu_eager
        self._tails: dict[nn.Module, Tensor] = {}
        self.settled = True
        self._watched = False
        self._room: tuple[Tensor, Tensor] | None = None

    def push(self, layer: nn.Module, x: Tensor, keep: int) -> Tensor:
        """Put the remembered frames (at first zeros) in front of x [B,C,T,H,W]; remember its last `keep`."""
        past = self._tails.get(layer)  # all ways keep x's memory format
        room, self._room = self._room, None
        if room is not None and room[0] is x and keep == HISTORY:
            x = room[1]
            x[:, :, :keep] = 0 if past is None else past
        else:
            x = F.pad(x, (0, 0, 0, 0, keep, 0)) if past is None else torch.cat([past, x], dim=2)
        tail = self._tails[layer] = x[:, :, -keep:].clone()  # a clone: a view would keep all of x alive
        if self._watched and self.settled:
            self.settled = past is not None and same_bits(past, tail)
        return x

    def room_behind_history(self, x: Tensor) -> Tensor | None:
        """Memory for a tensor like x [1,C,T,H,W] that `push` need not copy, if x has its frames one after the
        other in memory: who fills it saves reading and writing all of it once.
        """
        if x.requires_grad or x.shape[0] != 1 or memory_format(x) != torch.channels_last_3d:
            return None
        _, c, t, h, w = x.shape
        shape = (1, c, HISTORY + t, h, w)
        whole = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
        self._room = whole[:, :, HISTORY:], whole
        return self._room[0]

    def watch(self, on: bool) -> None:
        """From here on, `settled` says whether every layer's frames stayed what they were; costs a comparison
        of them, and on a GPU a wait, for each layer.
        """
        self.settled, self._watched = True, on

    def started(self, layer: nn.Module) -> bool:
        """Whether this layer has seen frame 0."""
        return layer in self._tails

    def start(self, layer: nn.Module, tail: Tensor) -> None:
        """Remember `tail` as the layer's last input frames."""
        self._tails[layer] = tail.clone()
        self.settled = False


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether both have the same shape, dtype and bits: 0 and −0 differ, a NaN equals itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.itemsize]
    return torch.equal(a.view(bits), b.view(bits))


class CausalConv3d(nn.Conv3d):
    """Conv3d whose temporal padding lies wholly in the past: out[t] sees in[t−k+1 … t]. Spatially 'same'."""

    def __init__(
        self, in_dim: int, out_dim: int, kernel: int | tuple[int, int, int], spatial_pad: int = 0
    ) -> None:
        super().__init__(in_dim, out_dim, kernel, padding=(0, spatial_pad, spatial_pad))

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        """x [B,C,T,H,W] → [B,C',T,H,W]."""
        history = self.kernel_size[0] - 1
        return super().forward(cache.push(self, x, history) if history else x)


def channel_rms_norm(x: Tensor, gamma: Tensor, out: Tensor | None = None) -> Tensor:
    """x [B,C,...] / ‖x‖₂ over the channels · √C · gamma [C,1,...]: x's shape and dtype, in `out` if given."""
    inverse = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min_(1e-12).reciprocal_()
    return torch.mul(x, inverse.to(x.dtype), out=out).mul_(gamma * x.shape[1] ** 0.5)


def norm_silu_eager(x: Tensor, gamma: Tensor, out: Tensor | None = None) -> Tensor:
    """SiLU(channel_rms_norm(x)); x stays."""
    return F.silu(channel_rms_norm(x, gamma, out), inplace=True)


class ChannelRMSNorm(nn.Module):
    """x / ‖x‖₂ over the channels · √C · gamma (L2 normalisation: no epsilon under the root)."""

    def __init__(self, dim: int, spatial_dims: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * spatial_dims))

    def forward(self, x: Tensor) -> Tensor:
        """x [B,C,...] → same shape and dtype."""
        return channel_rms_norm(x, self.gamma)


class NormSiLU(ChannelRMSNorm):
    """The norm with SiLU behind it, as one step that a fused kernel can take over."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 3)

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        """x [B,C,T,H,W] → same shape and dtype."""
        room = cache.room_behind_history(x)
        return cache.norm_silu(x, self.gamma) if room is None else cache.norm_silu(x, self.gamma, out=room)


class ResidualBlock(nn.Module):
    """(norm, SiLU, conv) twice plus the raw input, through a 1×1×1 convolution where the width changes."""

    def __init__(self, in_dim: int, out_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            NormSiLU(in_dim),
            nn.Identity(),  # keeps the checkpoint's numbers: SiLU had this one
            CausalConv3d(in_dim, out_dim, 3, 1),
            NormSiLU(out_dim),
            nn.Identity(),
            nn.Dropout(dropout),
            CausalConv3d(out_dim, out_dim, 3, 1),
        )
        self.shortcut = CausalConv3d(in_dim, out_dim, 1) if in_dim != out_dim else None

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        """x [B,C,T,H,W] → [B,C',T,H,W]."""
        return self.leave(self.enter(x, cache), cache)

    def enter(self, x: Tensor, cache: CausalCache) -> tuple[Tensor, Tensor]:
        """The first convolution's output and the shortcut's, each [B,C',T,H,W]."""
        shortcut = x if self.shortcut is None else self.shortcut(x, cache)
        return run(self.residual[:3], x, cache), shortcut

    def leave(self, state: tuple[Tensor, Tensor], cache: CausalCache) -> Tensor:
        """What `enter` gave → [B,C',T,H,W]."""
        return run(self.residual[3:], state[0], cache) + state[1]


class FrameAttention(nn.Module):
    """Self-attention over the pixels of each frame: one head, no positions."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = ChannelRMSNorm(dim, 2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,C,T,H,W] → same shape."""
        b, c, t, h, w = x.shape
        frames = x.transpose(1, 2).reshape(b * t, c, h, w)
        qkv = self.to_qkv(self.norm(frames)).flatten(2).mT.unsqueeze(1)  # [BT, 1, HW, 3C]
        q, k, v = qkv.chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())
        y = y.squeeze(1).mT.reshape(b * t, c, h, w)
        return x + self.proj(y).view(b, t, c, h, w).transpose(1, 2)


class Downsample(nn.Module):
    """Halve height and width; with `temporal` also the frames, except frame 0, which stays as it is."""

    def __init__(self, dim: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        if temporal:
            self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1))
        self.temporal = temporal

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        """x [B,C,T,H,W] → [B,C,T',H/2,W/2]; T' = 1 + (T−1)/2 at the start of a video, else T/2."""
        x = per_frame(self.resample, x)
        if not self.temporal:
            return x
        if cache.started(self.time_conv):
            return self.time_conv(cache.push(self.time_conv, x, 1))
        cache.start(self.time_conv, x[:, :, -1:])
        first = x[:, :, :1]
        return first if x.shape[2] == 1 else torch.cat([first, self.time_conv(x)], dim=2)


class Upsample(nn.Module):
    """Double height and width, halve the channels; with `temporal` also double the frames, except frame 0."""

    def __init__(self, dim: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(dim, dim // 2, 3, padding=1)
        )
        if temporal:
            self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1))
        self.temporal = temporal

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        """x [B,C,T,H,W] → [B,C/2,T',2H,2W]; T' = 1 + 2(T−1) at the start of a video, else 2T."""
        return per_frame(self.resample, self._double_frames(x, cache) if self.temporal else x)

    def _double_frames(self, x: Tensor, cache: CausalCache) -> Tensor:
        # Frame 0 is not doubled, and it is no history either: the first doubled frame sees zeros before it.
        if cache.started(self):
            return self._interleave(self.time_conv(x, cache))
        cache.start(self, x[:, :, :0])
        first, rest = x[:, :, :1], x[:, :, 1:]
        return (
            first
            if rest.shape[2] == 0
            else torch.cat([first, self._interleave(self.time_conv(rest, cache))], dim=2)
        )

    @staticmethod
    def _interleave(x: Tensor) -> Tensor:
        """[B,2C,T,H,W] → [B,C,2T,H,W]: the two halves of the channels are two successive frames."""
        b, c, t, h, w = x.shape
        shape = (b, c // 2, 2 * t, h, w)
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
        y[:, :, 0::2], y[:, :, 1::2] = x[:, : c // 2], x[:, c // 2 :]
        return y


def memory_format(x: Tensor) -> torch.memory_format:
    """The format of a 5-D tensor."""
    last = x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
    return torch.channels_last_3d if last else torch.contiguous_format


def middle(dim: int, dropout: float) -> nn.Sequential:
    """The bottleneck of both halves."""
    return nn.Sequential(
        ResidualBlock(dim, dim, dropout), FrameAttention(dim), ResidualBlock(dim, dim, dropout)
    )


def run(layers: nn.Sequential, x: Tensor, cache: CausalCache) -> Tensor:
    """Apply the layers in order."""
    for layer in layers:
        x = apply(layer, x, cache)
    return x


def apply(layer: nn.Module, x: Tensor, cache: CausalCache) -> Tensor:
    """One layer; those that look at past frames also get the cache."""
    return layer(x, cache) if isinstance(layer, _TEMPORAL) else layer(x)


def per_frame(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a 2-D layer to every frame of x [B,C,T,H,W]."""
    b, c, t, h, w = x.shape
    y = layer(x.transpose(1, 2).reshape(b * t, c, h, w))
    return y.view(b, t, *y.shape[1:]).transpose(1, 2)


_TEMPORAL = (CausalConv3d, NormSiLU, ResidualBlock, Downsample, Upsample)
