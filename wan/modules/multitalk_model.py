"""The MultiTalk transformer: Wan2.1 image-to-video with audio cross-attention in every block.

MultiTalk, arXiv 2505.22647; specification §4.2 and §4.3.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import model as stock
from .attention import SingleStreamMutiAttention, reference_map
from .audio_proj import AudioProjModel, split_windows
from .layers import BlockContext, KeysValues, TextCondition, TimeEmbedding, WanAttentionBlock, WanLayerNorm
from .runtime import Grid

if TYPE_CHECKING:
    from .teacache import TeaCache, TeaCacheCounter

__all__ = ["AudioCondition", "AudioProjModel", "StepShare", "WanModel"]


@dataclass(kw_only=True)
class AudioCondition:
    """The speech of one clip, embedded: tokens [1, T, 32·people, 768].

    With two people, `masks` [3, H·W] says which token of a latent frame belongs to person 1, person 2 and the
    background; with one it is None, and nobody is looked for. `still`: every frame hears the same, as in
    silence; then all latent frames but the first, which stands for one frame, have the same tokens.
    """

    tokens: Tensor
    people: int = 1
    still: bool = False
    masks: Tensor | None = None
    kv: KeysValues = field(default_factory=KeysValues)
    absorbed: KeysValues = field(default_factory=KeysValues)


@dataclass(kw_only=True)
class FirstBlock:
    """What block 0 has computed in one step: x and n [B, L, C] after its self-attention, the tokens' L-RoPE
    positions; q [B, L, N, D] of its cross-attention and what it found in the image of `features`; x and n
    after the cross-attention to `text`.
    """

    parallel: Any
    x: Tensor
    n: Tensor
    positions: Tensor | None
    q: Tensor | None = None
    image: Tensor | None = None
    features: Tensor | None = None
    text: TextCondition | None = None
    after: tuple[Tensor, Tensor] | None = None


@dataclass(kw_only=True)
class StepShare:
    """What the guidance passes of one step have in common, all in block 0, whose input they share: its
    self-attention, the query and the image of its cross-attention, and, of passes with the same text that
    follow each other, that cross-attention as a whole.

    Give the same object to every `predict` of a step, and a new one to the next. Exact; all passes but the
    first save it. Holds up to six times the size of the tokens.
    """

    first: FirstBlock | None = None

    def get(self, parallel: Any, people: int) -> FirstBlock | None:
        """What a pass spread over ranks alike left, if positions are in it or not needed."""
        known = self.first
        if known is None or known.parallel is not parallel or (people > 1 and known.positions is None):
            return None
        return known


@dataclass(kw_only=True)
class AudioContext(BlockContext):
    audio: AudioCondition
    share: StepShare | None = None

    @property
    def absorbed(self) -> bool:
        """Whether audio attention's projections are multiplied into its keys and values."""
        runtime = self.runtime
        return self.audio.people == 1 and (
            runtime.absorb_audio or (runtime.absorb_silence and self.audio.still)
        )


class MultiTalkBlock(WanAttentionBlock):
    """A stock block with audio cross-attention between text cross-attention and feed-forward network."""

    def __init__(self, *args: Any, audio_dim: int, class_range: int = 24, class_interval: int = 4) -> None:
        super().__init__(*args)
        dim, num_heads = self.modulation.shape[-1], self.self_attn.num_heads
        self.audio_cross_attn = SingleStreamMutiAttention(
            dim,
            audio_dim,
            num_heads,
            qkv_bias=True,
            qk_norm=False,
            norm_layer=None,
            class_range=class_range,
            class_interval=class_interval,
        )
        self.norm_x = WanLayerNorm(dim, self.eps, elementwise_affine=True)

    def forward(self, x: Tensor, e0: Tensor, ctx: AudioContext, block: int) -> Tensor:
        """x [B, L, C], e0 [B, 6, C] fp32 → [B, L, C]; `block` is this block's number, for kept keys and
        values.
        """
        op, eps = ctx.runtime.ops, self.eps
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.float() + e0).chunk(6, dim=1)
        share = ctx.share if block == 0 else None
        known = share and share.get(ctx.runtime.parallel, ctx.audio.people)
        if known:
            positions = known.positions if ctx.audio.people > 1 else None
        else:
            n = op.layer_norm_modulate(x, scale1, shift1, eps=eps)
            q, k, v = self.self_attn.qkv(n, ctx)
            y = self.self_attn.attend(q, k, v, ctx)
            positions = self.speaker_positions(q, k, ctx)
            x, n = op.gate_residual_norm(
                x, y, gate1, self.norm3.weight, self.norm3.bias, modulate=False, eps=eps
            )
            if share is not None:
                known = share.first = FirstBlock(parallel=ctx.runtime.parallel, x=x, n=n, positions=positions)
        if known:
            x, n = self.shared_cross_attention(known, ctx)
        else:
            x, n = self.after_cross_attention(x, self.cross_attn(n, ctx, block), ctx, block)
        y = self.audio_attention(n, ctx, block, positions)
        x, n = op.gate_residual_norm(x, y, None, scale2, shift2, modulate=True, eps=eps)
        return op.gate_residual(x, op.ffn(self.ffn, n), gate2)

    def after_cross_attention(
        self, x: Tensor, y: Tensor, ctx: AudioContext, block: int
    ) -> tuple[Tensor, Tensor]:
        """The residual sum and its norm, which audio attention reads: absorbed, in the model's dtype. Block 0
        may share it between passes of which only some are absorbed, so there it always is; a linear takes
        that too.
        """
        op, norm = ctx.runtime.ops, self.norm_x
        absorbing = ctx.runtime.absorb_audio or ctx.runtime.absorb_silence
        if op.wide is not None and (ctx.absorbed or (absorbing and block == 0)):
            op = op.wide
        return op.gate_residual_norm(x, y, None, norm.weight, norm.bias, modulate=False, eps=self.eps)

    def shared_cross_attention(self, known: FirstBlock, ctx: AudioContext) -> tuple[Tensor, Tensor]:
        """Block 0's cross-attention to the pass's text and what follows, from what is known and into it."""
        if known.text is not ctx.text or known.after is None:
            attention = self.cross_attn
            kv = attention.kept(ctx, 0)
            if known.q is None:
                known.q = attention.query(known.n, ctx)
            features = ctx.text.features
            if known.image is None or features is None or known.features is not features:
                known.image, known.features = attention.attend_image(known.q, kv, ctx), features
            known.text, known.after = ctx.text, None  # before the next is made, not after
            y = attention.attend(known.q, kv, ctx, known.image)
            known.after = self.after_cross_attention(known.x, y, ctx, 0)
        return known.after

    def speaker_positions(self, q: Tensor, k: Tensor, ctx: AudioContext) -> Tensor | None:
        """L-RoPE positions [L_local] of the tokens; None with one speaker, where nothing reads them."""
        audio, runtime = ctx.audio, ctx.runtime
        if audio.people == 1:
            return None
        ref_map = reference_map(q, k, ctx.grid, audio.masks, runtime.parallel, official=runtime.official_map)
        return self.audio_cross_attn.positions(ref_map, runtime.parallel)

    def audio_attention(self, x: Tensor, ctx: AudioContext, block: int, positions: Tensor | None) -> Tensor:
        attention, audio, runtime = self.audio_cross_attn, ctx.audio, ctx.runtime
        if ctx.absorbed:
            tokens = audio.tokens[:, :2] if audio.still else audio.tokens
            parts = audio.absorbed.get(block, lambda: attention.absorb(*attention.keys_values(tokens)))
            return attention.attend_absorbed(x, *parts, frames=ctx.grid[0], ops=runtime.ops)
        k, v = audio.kv.get(block, lambda: attention.keys_values(audio.tokens, audio.people))
        return attention.attend(x, k, v, runtime, positions)


class WanModel(stock.WanModel):
    """The audio model. Two ways in:

    * `forward`: everything in one call, as callers of the original do;
    * `embed_text`, `embed_audio`, `embed_time`, then `predict` for each step and guidance pass: the same
      numbers, without embedding the same things 120 times (what the pipeline does).

    Batch size is 1. `weight_init` is accepted and means nothing: a model is built empty and then loaded.
    """

    def __init__(
        self,
        model_type: str = "i2v",
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
        audio_window: int = 5,
        intermediate_dim: int = 512,
        output_dim: int = 768,
        context_tokens: int = 32,
        vae_scale: int = 4,
        norm_input_visual: bool = True,
        norm_output_audio: bool = True,
        weight_init: bool = True,
    ) -> None:
        if model_type != "i2v" or not norm_input_visual:
            got = f"model_type={model_type!r}, norm_input_visual={norm_input_visual}"
            msg = f"{got}: MultiTalk is 'i2v' and True"
            raise ValueError(msg)
        self.block_class = partial(MultiTalkBlock, audio_dim=output_dim)
        super().__init__(
            model_type,
            patch_size,
            text_len,
            in_dim,
            dim,
            ffn_dim,
            freq_dim,
            text_dim,
            out_dim,
            num_heads,
            num_layers,
            window_size,
            qk_norm,
            cross_attn_norm,
            eps,
        )
        self.audio_window = audio_window
        self.vae_scale = vae_scale
        self.audio_proj = AudioProjModel(
            seq_len=audio_window,
            seq_len_vf=audio_window + vae_scale - 1,
            intermediate_dim=intermediate_dim,
            output_dim=output_dim,
            context_tokens=context_tokens,
            norm_output_audio=norm_output_audio,
        )
        self.teacache: TeaCacheCounter | None = None

    def embed_audio(
        self, audio: Tensor, ref_target_masks: Tensor | None = None, *, keep: bool = False
    ) -> AudioCondition:
        """Windows [P, frames, audio_window, 12, 768] and, for two people, masks [3, h, w] → the condition.

        Masks may have any size; they are brought to the token grid by `predict`. `keep` stores keys and
        values.
        """
        people = audio.shape[0]
        if people not in (1, 2):
            msg = f"{people} people: the checkpoint knows one or two"
            raise ValueError(msg)
        if people == 2 and ref_target_masks is None:
            msg = "two people need ref_target_masks [3, h, w]: person 1, person 2, background"
            raise ValueError(msg)
        tokens = self.audio_proj(*split_windows(audio.to(self.dtype), self.vae_scale))  # [P, T, 32, 768]
        tokens = torch.cat(tuple(tokens), dim=1)[None]  # [1, T, 32·P, 768]
        masks = ref_target_masks if people == 2 else None
        kept = {"kv": KeysValues(keep=keep), "absorbed": KeysValues(keep=keep)}
        still = torch.equal(audio[:, 1:], audio[:, :1].expand_as(audio[:, 1:]))
        return AudioCondition(tokens=tokens, people=people, still=still, masks=masks, **kept)

    def predict(
        self,
        latents: Tensor,
        time: TimeEmbedding,
        text: TextCondition,
        audio: AudioCondition,
        *,
        teacache: TeaCache | None = None,
        step: int = 0,
        slot: int = 0,
        share: StepShare | None = None,
    ) -> Tensor:
        """One pass with embedded conditions: latents (with y) [1, in_dim, T, h, w] → [1, out_dim, T, h, w]
        fp32.

        With `teacache`, `step` and `slot` (the guidance pass) say which part of its plan applies. With
        `share`, the passes of one step, which must have the same latents and time, run block 0's
        self-attention once.
        """
        x, grid = self.patchify(latents)
        if audio.tokens.shape[1] != grid[0]:
            msg = f"audio covers {audio.tokens.shape[1]} latent frames, the video has {grid[0]}"
            raise ValueError(msg)
        parallel = self.runtime.parallel
        ctx = AudioContext(
            runtime=self.runtime,
            rope=self.rope_table(grid, x.device),
            grid=grid,
            text=text,
            audio=_on_grid(audio, grid),
            share=share,
        )
        blocks = partial(self.run_blocks, e0=time.e0, ctx=ctx)
        x = parallel.split(x, grid)
        if teacache is not None:
            x = teacache.run(step, slot, x, blocks)
        elif self.teacache is not None:
            x = self.teacache.run(time.e, time.e0, x, blocks)
        else:
            x = blocks(x)
        return self.unpatchify(parallel.merge(self.head(x, time.e), grid), grid)

    def forward(
        self,
        x: list[Tensor],
        t: Tensor,
        context: list[Tensor],
        seq_len: int,
        clip_fea: Tensor | None = None,
        y: Tensor | list[Tensor] | None = None,
        audio: Tensor | None = None,
        ref_target_masks: Tensor | None = None,
    ) -> Tensor:
        """x: list of one [16, T, h, w]; t [1]; context: list of one [n, text_dim]; y [1, 20, T, h, w];
        audio [P, frames, 5, 12, 768] → [1, 16, T, h, w] fp32.
        """
        if len(x) != 1:
            msg = f"a batch of {len(x)}: the audio model runs one video at a time"
            raise ValueError(msg)
        if audio is None:
            msg = "the audio model needs audio [people, frames, window, 12, 768] (zeros mean silence)"
            raise ValueError(msg)
        latents = x[0] if y is None else torch.cat((x[0], y[0]))
        self._check_tokens([latents], seq_len)
        text = self.embed_text(context, clip_fea)
        return self.predict(
            latents[None], self.embed_time(t), text, self.embed_audio(audio, ref_target_masks)
        )

    def teacache_init(
        self,
        use_ret_steps: bool = True,
        teacache_thresh: float = 0.2,
        sample_steps: int = 40,
        model_scale: str = "multitalk-480",
        passes: int = 3,
    ) -> None:
        """Skip steps in later calls of `forward`, which must come in turn: `passes` calls a step.

        For callers of the original interface; the pipeline gives `predict` a `TeaCache` instead.
        """
        from .teacache import TeaCacheCounter  # lossy: not imported for exact results

        self.teacache = TeaCacheCounter(
            threshold=teacache_thresh,
            steps=sample_steps,
            model_scale=model_scale,
            use_ret_steps=use_ret_steps,
            passes=passes,
        )

    def disable_teacache(self) -> None:
        self.teacache = None


def _on_grid(audio: AudioCondition, grid: Grid) -> AudioCondition:
    """The same condition with masks [3, h, w] brought to one latent frame of tokens, [3, H·W]."""
    masks = audio.masks
    if masks is None:
        return audio
    if masks.ndim == 3:
        masks = F.interpolate(masks[None].float(), size=grid[1:], mode="nearest")[0].flatten(1)
    return replace(audio, masks=masks)
