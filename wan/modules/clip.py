"""CLIP with a ViT-H/14 image tower and an XLM-R text tower; pipelines use 31 of the 32 image blocks.

Sources: ViT, arXiv 2010.11929; CLIP, arXiv 2103.00020; multitalk.md §4.5 and §3.6 for names, sizes and
preprocessing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.modules.xlm_roberta import XLMRobertaWithHead

__all__ = ["CLIPModel", "VisionTransformer", "XLMRobertaCLIP", "clip_xlm_roberta_vit_h_14"]

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

VIT_H_14: dict[str, Any] = {
    "image_size": 224,
    "patch_size": 14,
    "dim": 1280,
    "mlp_ratio": 4,
    "out_dim": 1024,
    "num_heads": 16,
    "num_layers": 32,
    "pool_type": "token",
    "pre_norm": True,
    "post_norm": False,
    "activation": "gelu",
}
TEXT_TOWER: dict[str, Any] = {
    "vocab_size": 250002,
    "max_seq_len": 514,
    "type_size": 1,
    "pad_id": 1,
    "dim": 1024,
    "num_heads": 16,
    "num_layers": 24,
    "post_norm": True,
}


class SelfAttention(nn.Module):
    """Multi-head attention over all tokens."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            msg = f"dim must be a multiple of num_heads, got {dim} and {num_heads}"
            raise ValueError(msg)
        self.num_heads = num_heads
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,L,C] → same shape."""
        q, k, v = (
            self.to_qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        )  # 3 of [B, N, L, D]
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class AttentionBlock(nn.Module):
    """Attention and MLP with residuals; norms stand before each part, or after with `post_norm`."""

    def __init__(self, dim: int, mlp_ratio: float, num_heads: int, post_norm: bool, eps: float) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = SelfAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        """x [B,L,C] → same shape."""
        if self.post_norm:
            x = x + self.norm1(self.attn(x))
            return x + self.norm2(self.mlp(x))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Images [B,3,S,S] → tokens [B, 1 + (S/14)², dim], the class token first.

    With `features_only` it has no post-norm and no head: what pipelines need of it (then pass num_layers =
    31).
    """

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 14,
        dim: int = 1280,
        mlp_ratio: float = 4,
        out_dim: int = 1024,
        num_heads: int = 16,
        num_layers: int = 32,
        pool_type: str = "token",
        pre_norm: bool = True,
        post_norm: bool = False,
        activation: str = "gelu",
        norm_eps: float = 1e-5,
        *,
        features_only: bool = False,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            msg = f"image_size must be a multiple of patch_size, got {image_size} and {patch_size}"
            raise ValueError(msg)
        if (pool_type, activation) != ("token", "gelu"):
            msg = f"only pool_type='token' and activation='gelu' exist, got {pool_type!r} and {activation!r}"
            raise ValueError(msg)
        self.image_size, self.patch_size = image_size, patch_size
        tokens = 1 + (image_size // patch_size) ** 2
        self.cls_embedding = nn.Parameter(torch.randn(1, 1, dim) / dim**0.5)
        self.pos_embedding = nn.Parameter(torch.randn(1, tokens, dim) / dim**0.5)
        if not features_only:
            self.head = nn.Parameter(torch.randn(dim, out_dim) / dim**0.5)
        self.patch_embedding = nn.Conv2d(3, dim, patch_size, stride=patch_size, bias=not pre_norm)
        self.pre_norm = nn.LayerNorm(dim, eps=norm_eps) if pre_norm else None
        self.transformer = nn.Sequential(
            *(AttentionBlock(dim, mlp_ratio, num_heads, post_norm, norm_eps) for _ in range(num_layers))
        )
        if not features_only:
            self.post_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.features_only = features_only

    def forward(self, x: Tensor, interpolation: bool = False, use_31_block: bool = False) -> Tensor:
        """x [B,3,H,W] → tokens [B,1+n,dim] after the last block, or with `use_31_block` after the last but
        one.

        `interpolation` resizes the positions bicubically for images of another size. No post-norm, no head.
        """
        x = self.patch_embedding(x).flatten(2).mT  # [B, n, dim]
        x = torch.cat([self.cls_embedding.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        x = x + (
            interpolate_positions(self.pos_embedding, x.shape[1]) if interpolation else self.pos_embedding
        )
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        return self.transformer[:-1](x) if use_31_block and not self.features_only else self.transformer(x)

    def pool(self, tokens: Tensor) -> Tensor:
        """Tokens [B,1+n,dim] → image embedding [B,out_dim]: the class token, normalised and projected."""
        return self.post_norm(tokens[:, 0]) @ self.head


def interpolate_positions(positions: Tensor, tokens: int) -> Tensor:
    """Positions [1,1+s²,C] for `tokens` = 1 + t² tokens: the square grid is resized bicubically (in fp32)."""
    source, target = round((positions.shape[1] - 1) ** 0.5), round((tokens - 1) ** 0.5)
    if source == target:
        return positions
    grid = positions[:, 1:].float().mT.unflatten(-1, (source, source))  # [1, C, s, s]
    grid = F.interpolate(grid, size=(target, target), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], grid.flatten(2).mT.to(positions.dtype)], dim=1)


class XLMRobertaCLIP(nn.Module):
    """Both towers and the temperature, as in the checkpoint (784 tensors)."""

    def __init__(self, visual: dict[str, Any] | None = None, textual: dict[str, Any] | None = None) -> None:
        super().__init__()
        visual, textual = {**VIT_H_14, **(visual or {})}, {**TEXT_TOWER, **(textual or {})}
        self.visual = VisionTransformer(**visual)
        self.textual = XLMRobertaWithHead(out_dim=visual["out_dim"], **textual)
        self.log_scale = nn.Parameter(torch.log(torch.tensor(1 / 0.07)))

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """images [B,3,S,S] (normalised), ids [B,L] → embeddings [B,out_dim] of both, not normalised."""
        return self.visual.pool(self.visual(images)), self.textual(ids)


def clip_xlm_roberta_vit_h_14(*, device: str | torch.device = "cpu") -> XLMRobertaCLIP:
    """The whole network: 1,193,014,785 parameters; on `device="meta"` it takes no memory."""
    with torch.device(device):
        return XLMRobertaCLIP()


def visual_name(name: str) -> str | None:
    """A checkpoint's tensor → the name in the feature tower of 31 blocks, None for what that tower hasn't."""
    inner = name.removeprefix("visual.")
    unused = inner == name or inner.startswith(("transformer.31.", "post_norm.")) or inner == "head"
    return None if unused else inner


def preprocess(videos: Sequence[Tensor], size: int) -> Tensor:
    """Videos [3,T,H,W] in [−1,1] → images [ΣT,3,size,size] with CLIP's mean and deviation.

    Bicubic, no antialiasing, the aspect ratio is not kept (multitalk.md §3.6).
    """
    images = torch.cat(
        [
            F.interpolate(video.transpose(0, 1), size=(size, size), mode="bicubic", align_corners=False)
            for video in videos
        ]
    )
    mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    return (images * 0.5 + 0.5 - mean) / std


class CLIPModel:
    """The image tower as pipelines use it: `visual(videos)` gives the tokens after 31 blocks.

    Only those 31 blocks are read from `checkpoint_path` (1.2 of 4.8 GB); the text tower never takes memory.
    `tokenizer_path` is accepted and not used, as no pipeline encodes text with CLIP. Raises CheckpointError.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: str | int | torch.device,
        checkpoint_path: str | os.PathLike[str] | None = None,
        tokenizer_path: str | os.PathLike[str] | None = None,
        *,
        model: VisionTransformer | None = None,
    ) -> None:
        if (checkpoint_path is None) == (model is None):
            msg = "CLIPModel needs either checkpoint_path (a file) or model (a VisionTransformer)"
            raise ValueError(msg)
        self.dtype, self.device = dtype, torch.device(device)
        self.checkpoint_path, self.tokenizer_path = checkpoint_path, tokenizer_path
        if model is None:
            from wan.loading import load_model, network_sizes

            build = partial(feature_tower, **network_sizes(checkpoint_path, "clip"))
            model = load_model(build, checkpoint_path, rename=visual_name, dtype=dtype, device=self.device)
        self.model = model.to(self.device, dtype).eval().requires_grad_(False)

    @torch.no_grad()
    def visual(self, videos: Sequence[Tensor]) -> Tensor:
        """Videos [3,T,H,W] in [−1,1], fp32 → tokens [ΣT,257,1280] in `dtype`."""
        images = preprocess(videos, self.model.image_size)
        return self.model(images.to(self.dtype), use_31_block=True)


def feature_tower(**changes: Any) -> VisionTransformer:
    """ViT-H/14 without its last block, post-norm and head: what `CLIPModel` runs. `changes` replace sizes."""
    return VisionTransformer(**{**VIT_H_14, "num_layers": 31, **changes}, features_only=True)
