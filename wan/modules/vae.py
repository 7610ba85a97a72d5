"""Causal 3-D video VAE of Wan2.1: 8x8 spatial and 4x temporal compression into 16 channels.

Frame 0 is coded alone, every later latent stands for four frames, and no layer sees the future. So a video
can be coded in pieces: each temporal layer keeps the last frames it has seen (`CausalCache`), and any split
gives the same numbers. Sources: multitalk.md §4.5 (layout, cache rules, latent statistics); Wan technical
report, arXiv 2503.20314 §4.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import pairwise, zip_longest
from os import PathLike

import torch
from torch import Tensor, nn

from wan.modules.vae_layers import (
    CausalCache,
    CausalConv3d,
    Downsample,
    NormSiLU,
    NormSiluFn,
    ResidualBlock,
    Upsample,
    apply,
    middle,
    norm_silu_eager,
    run,
)
from wan.modules.vae_steady import SteadyEncoder, Step, same_bits

__all__ = ["CausalCache", "VideoVAE", "WanVAE"]

SPATIAL_STRIDE = 8
TEMPORAL_STRIDE = 4

LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


class Encoder3d(nn.Module):
    """Video [B,3,T,H,W] → moments [B,2z,T/4,H/8,W/8]."""

    def __init__(
        self,
        dim: int,
        z_dim: int,
        dim_mult: Sequence[int],
        blocks: int,
        temporal: Sequence[bool],
        dropout: float,
    ) -> None:
        super().__init__()
        widths = [dim * m for m in (1, *dim_mult)]
        self.conv1 = CausalConv3d(3, widths[0], 3, 1)
        stages: list[nn.Module] = []
        for level, (inner, outer) in enumerate(pairwise(widths)):
            stages += [ResidualBlock(inner if i == 0 else outer, outer, dropout) for i in range(blocks)]
            if level < len(temporal):
                stages.append(Downsample(outer, temporal=temporal[level]))
        self.downsamples = nn.Sequential(*stages)
        self.middle = middle(outer, dropout)
        self.head = nn.Sequential(NormSiLU(outer), nn.Identity(), CausalConv3d(outer, z_dim, 3, 1))

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        """One piece of a video; see the class for the shapes."""
        for step in self.steps():
            x = step(x, cache)
        return x

    def steps(self) -> list[Step]:
        """What `forward` does, one temporal layer a step."""
        steps: list[Step] = []
        for layer in (self.conv1, *self.downsamples, *self.middle, *self.head):
            two = isinstance(layer, ResidualBlock)
            steps += (layer.enter, layer.leave) if two else (partial(apply, layer),)
        return steps


class Decoder3d(nn.Module):
    """Latents [B,z,T,h,w] → video [B,3,4T,8h,8w]."""

    def __init__(
        self,
        dim: int,
        z_dim: int,
        dim_mult: Sequence[int],
        blocks: int,
        temporal: Sequence[bool],
        dropout: float,
    ) -> None:
        super().__init__()
        widths = [dim * m for m in (dim_mult[-1], *reversed(dim_mult))]
        self.conv1 = CausalConv3d(z_dim, widths[0], 3, 1)
        self.middle = middle(widths[0], dropout)
        stages: list[nn.Module] = []
        for level, (inner, outer) in enumerate(pairwise(widths)):
            entry = inner if level == 0 else inner // 2  # the upsampling before it has halved the channels
            stages += [ResidualBlock(entry if i == 0 else outer, outer, dropout) for i in range(blocks + 1)]
            if level < len(temporal):
                stages.append(Upsample(outer, temporal=temporal[level]))
        self.upsamples = nn.Sequential(*stages)
        self.head = nn.Sequential(NormSiLU(outer), nn.Identity(), CausalConv3d(outer, 3, 3, 1))

    def forward(self, z: Tensor, cache: CausalCache) -> Tensor:
        """One piece of a latent video; see the class for the shapes."""
        x = self.conv1(z, cache)
        x = run(self.middle, x, cache)
        x = run(self.upsamples, x, cache)
        return run(self.head, x, cache)


class VideoVAE(nn.Module):
    """The network: `encode` and `decode` walk through a video in pieces, with bounded memory.

    The defaults are Wan2.1's (126,892,531 parameters). Both raise ValueError for a shape that does not fit.
    """

    def __init__(
        self,
        dim: int = 96,
        z_dim: int = 16,
        dim_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        attn_scales: Sequence[float] = (),
        temperal_downsample: Sequence[bool] = (False, True, True),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if attn_scales:
            msg = (
                f"attn_scales must be empty (no Wan VAE has attention between its stages), got {attn_scales}"
            )
            raise ValueError(msg)
        self.z_dim = z_dim
        self.norm_silu: NormSiluFn = norm_silu_eager
        self.format = torch.contiguous_format
        down = tuple(temperal_downsample)
        self.encoder = Encoder3d(dim, 2 * z_dim, dim_mult, num_res_blocks, down, dropout)
        self.conv1 = CausalConv3d(2 * z_dim, 2 * z_dim, 1)
        self.conv2 = CausalConv3d(z_dim, z_dim, 1)
        self.decoder = Decoder3d(dim, z_dim, dim_mult, num_res_blocks, down[::-1], dropout)

    def use(self, *, norm_silu: NormSiluFn | None = None, channels_last: bool | None = None) -> VideoVAE:
        """Choose how to compute, not what: a fused norm and SiLU, the memory format of convolutions."""
        if norm_silu is not None:
            self.norm_silu = norm_silu
        if channels_last is not None:
            self.format = torch.channels_last_3d if channels_last else torch.contiguous_format
            flat = torch.channels_last if channels_last else torch.contiguous_format
            for module in self.modules():
                if isinstance(module, nn.Conv3d | nn.Conv2d):
                    wanted = self.format if isinstance(module, nn.Conv3d) else flat
                    module.weight.data = module.weight.data.contiguous(memory_format=wanted)
        return self

    def encode(
        self, x: Tensor, scale: tuple[Tensor, Tensor], chunk: int = 1, *, reuse: bool = True
    ) -> Tensor:
        """Video [B,3,1+4n,8h,8w] in [−1,1] → normalised latents [B,z,1+n,h,w], `chunk` latents at a time.

        `scale` is (mean, 1/std), each [z]: the latents are (mu − mean)/std. With `reuse` the still parts of a
        video, such as the grey behind an image, are not computed again and again (`vae_steady`): the same
        bits in less time, for one more piece at the widest layer in memory.
        """
        b, _, frames, height, width = x.shape
        check_video(frames, height, width)
        total = 1 + (frames - 1) // TEMPORAL_STRIDE
        z = x.new_empty(b, self.z_dim, total, height // SPATIAL_STRIDE, width // SPATIAL_STRIDE)
        mean, inverse_std = (s.view(1, -1, 1, 1, 1) for s in scale)
        cache = CausalCache(self.norm_silu)
        network = SteadyEncoder([*self.encoder.steps(), self.conv1], cache)
        spans = list(pieces(total, chunk))
        clips = [x[:, :, first_frame(start) : first_frame(stop)] for start, stop in spans]
        for (start, stop), clip, following in zip_longest(spans, clips, clips[1:]):
            repeats = reuse and following is not None and same_bits(clip, following)
            mu = network(clip.contiguous(memory_format=self.format), repeats=repeats)[:, : self.z_dim]
            z[:, :, start:stop] = (mu - mean) * inverse_std
        return z

    def decode(self, z: Tensor, scale: tuple[Tensor, Tensor], chunk: int = 1) -> Tensor:
        """Normalised latents [B,z,1+n,h,w] → video [B,3,1+4n,8h,8w], not clamped, in pieces of `chunk`."""
        b, _, total, h, w = z.shape
        x = z.new_empty(b, 3, first_frame(total), h * SPATIAL_STRIDE, w * SPATIAL_STRIDE)
        done = 0
        for clip in self.decode_pieces(z, scale, chunk):
            x[:, :, done : done + clip.shape[2]] = clip
            done += clip.shape[2]
        return x

    def decode_pieces(self, z: Tensor, scale: tuple[Tensor, Tensor], chunk: int = 1) -> Iterator[Tensor]:
        """The pieces of `decode` as they get ready: [B,3,·,8h,8w] of 1, 4, 4, … frames for chunk = 1."""
        mean, inverse_std = (s.view(1, -1, 1, 1, 1) for s in scale)
        cache = CausalCache(self.norm_silu)
        z = self.conv2(z / inverse_std + mean, cache)
        for start, stop in pieces(z.shape[2], chunk):
            yield self.decoder(z[:, :, start:stop].contiguous(memory_format=self.format), cache)


def first_frame(latent: int) -> int:
    """The first video frame that latent number `latent` stands for: 0, 1, 5, 9, …"""
    return 0 if latent == 0 else 1 + TEMPORAL_STRIDE * (latent - 1)


def pieces(total: int, chunk: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of the pieces of `total` latents; the first latent, a quarter of the work, goes alone."""
    if chunk < 1:
        msg = f"chunk is a number of latent frames, at least 1, got {chunk}"
        raise ValueError(msg)
    start = 0
    while start < total:
        stop = min(start + (chunk if start else 1), total)
        yield start, stop
        start = stop


def check_video(frames: int, height: int, width: int) -> None:
    """Raise ValueError unless the VAE can code a video of this shape."""
    if frames % TEMPORAL_STRIDE != 1:
        fit = max(frames - (frames - 1) % TEMPORAL_STRIDE, 1)
        msg = f"a video needs 4n+1 frames (1, 5, … 81), got {frames}: cut or pad it to {fit}"
        raise ValueError(msg)
    if height % SPATIAL_STRIDE or width % SPATIAL_STRIDE:
        msg = f"height and width must be multiples of {SPATIAL_STRIDE}, got {height}x{width}"
        raise ValueError(msg)


class WanVAE:
    """The VAE as pipelines use it: lists of videos [3,T,H,W] in [−1,1] ↔ lists of fp32 latents [16,t,h,w].

    `dtype` is the arithmetic's, fp32 by default; the weights stay fp32, another dtype runs under autocast.
    Encoding in less than fp32 is not advised: the latents seed the whole trajectory.
    Raises `wan.loading.CheckpointError` for a bad file and ValueError for a bad shape.
    """

    def __init__(
        self,
        z_dim: int = 16,
        vae_pth: str | PathLike[str] | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cuda",
        *,
        model: VideoVAE | None = None,
    ) -> None:
        if (vae_pth is None) == (model is None):
            msg = "WanVAE needs either vae_pth (a file such as Wan2.1_VAE.pth) or model (a VideoVAE)"
            raise ValueError(msg)
        self.dtype, self.device = dtype, torch.device(device)
        self.decode_dtype = dtype  # may be set apart: decoding bears bf16, and on an H200 takes half the time
        if model is None:
            from wan.loading import load_model, network_sizes

            build = partial(VideoVAE, z_dim=z_dim, **network_sizes(vae_pth, "vae"))
            model = load_model(build, vae_pth, dtype=torch.float32, device=self.device)
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.mean = torch.tensor(LATENT_MEAN, dtype=torch.float32, device=self.device)
        self.std = torch.tensor(LATENT_STD, dtype=torch.float32, device=self.device)
        self.scale = (self.mean, 1.0 / self.std)

    @torch.no_grad()
    def encode(self, videos: Sequence[Tensor], chunk: int = 1, *, reuse: bool = True) -> list[Tensor]:
        """Videos [3,1+4n,8h,8w] in [−1,1] → latents [16,1+n,h,w] fp32; `chunk` latents at a time.

        `reuse`: see `VideoVAE.encode`.
        """
        with self._arithmetic(self.dtype):
            latents = (self.model.encode(v.unsqueeze(0), self.scale, chunk, reuse=reuse) for v in videos)
            return [z[0].float() for z in latents]

    @torch.no_grad()
    def decode(self, zs: Sequence[Tensor], chunk: int = 1, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Latents [16,1+n,h,w] → videos [3,1+4n,8h,8w] fp32 in [−1,1]; `dtype` overrides the arithmetic's."""
        with self._arithmetic(dtype or self.decode_dtype):
            return [self.model.decode(z.unsqueeze(0), self.scale, chunk)[0].float().clamp_(-1, 1) for z in zs]

    @torch.no_grad()
    def decode_pieces(self, z: Tensor, chunk: int = 1, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
        """`decode` of one video's latents in pieces [3,·,8h,8w] as they get ready: 1 frame, then 4·chunk."""
        pieces = self.model.decode_pieces(z.unsqueeze(0), self.scale, chunk)
        while True:
            with self._arithmetic(dtype or self.decode_dtype):  # not while the caller has its turn
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece[0].float().clamp_(-1, 1)

    def _arithmetic(self, dtype: torch.dtype) -> AbstractContextManager[object]:
        return nullcontext() if dtype == torch.float32 else torch.autocast(self.device.type, dtype)
