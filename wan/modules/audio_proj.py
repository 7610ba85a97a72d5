"""From wav2vec2 features to the audio tokens that the DiT attends to. Specification §4.2, step 4."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AudioProjModel(nn.Module):
    """Windows of audio features → `context_tokens` tokens per latent frame, by a three-layer perceptron.

    The first latent frame stands for one video frame and sees one window (`seq_len` positions); every later
    one stands for `vae_scale` frames and sees `seq_len_vf` positions of their windows. `proj1` and `proj1_vf`
    read them, the rest is shared.
    """

    def __init__(
        self,
        seq_len: int = 5,
        seq_len_vf: int = 12,
        blocks: int = 12,
        channels: int = 768,
        intermediate_dim: int = 512,
        output_dim: int = 768,
        context_tokens: int = 32,
        norm_output_audio: bool = False,
    ) -> None:
        super().__init__()
        self.context_tokens = context_tokens
        self.output_dim = output_dim
        self.proj1 = nn.Linear(seq_len * blocks * channels, intermediate_dim)
        self.proj1_vf = nn.Linear(seq_len_vf * blocks * channels, intermediate_dim)
        self.proj2 = nn.Linear(intermediate_dim, intermediate_dim)
        self.proj3 = nn.Linear(intermediate_dim, context_tokens * output_dim)
        self.norm = nn.LayerNorm(output_dim) if norm_output_audio else nn.Identity()

    def forward(self, audio_embeds: Tensor, audio_embeds_vf: Tensor) -> Tensor:
        """[P, 1, seq_len, blocks, channels] and [P, T−1, seq_len_vf, blocks, channels] → [P, T, tokens,
        output_dim].
        """
        first = self.proj1(audio_embeds.flatten(2)).relu()
        later = self.proj1_vf(audio_embeds_vf.flatten(2)).relu()
        hidden = self.proj2(torch.cat((first, later), dim=1)).relu()  # [P, T, intermediate_dim]
        return self.norm(self.proj3(hidden).unflatten(-1, (self.context_tokens, self.output_dim)))


def split_windows(audio: Tensor, vae_scale: int) -> tuple[Tensor, Tensor]:
    """Windows per video frame [P, F, W, ...] → those of latent frame 0 [P, 1, W, ...] and of the rest [P,
    T−1, W', ...].

    Of a group of `vae_scale` frames the first gives the past and centre of its window, the last the centre
    and future, those between only the centre: W' = W + vae_scale − 1 positions without overlap.
    """
    frames, window = audio.shape[1], audio.shape[2]
    if (frames - 1) % vae_scale or frames == 1:
        msg = (
            f"audio has {frames} frames; it takes {vae_scale}·n + 1 with n ≥ 1 (the same number as the video)"
        )
        raise ValueError(msg)
    middle = window // 2
    groups = audio[:, 1:].unflatten(1, (-1, vae_scale))  # [P, T−1, vae_scale, W, ...]
    past = groups[:, :, 0, : middle + 1]
    centre = groups[:, :, 1:-1, middle]
    future = groups[:, :, -1, middle:]
    return audio[:, :1], torch.cat((past, centre, future), dim=2)
