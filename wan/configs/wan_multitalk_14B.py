"""MultiTalk on Wan2.1 image-to-video, 14B: the i2v values and an English negative prompt."""

from __future__ import annotations

from dataclasses import replace

from .wan_i2v_14B import i2v_14B

NEGATIVE_PROMPT_EN = (
    "bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, "
    "overall gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, "
    "poorly drawn hands, poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, "
    "still picture, messy background, three legs, many people in the background, walking backwards"
)

multitalk_14B = replace(i2v_14B, name="Wan MultiTalk 14B", sample_neg_prompt=NEGATIVE_PROMPT_EN)
