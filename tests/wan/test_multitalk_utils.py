"""The helpers that callers of the original find in `wan.utils.multitalk_utils`."""

from __future__ import annotations

import goldens
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wan.utils import multitalk_utils as mu


def test_token_split_table(measured) -> None:
    z = goldens.load("dit_parts")
    wrong = 0
    for world in (1, 2, 4, 8):
        for rank in range(world):
            want = z[f"split_w{world}_r{rank}"]
            counts, frames = mu.split_token_counts_and_frame_ids(21, 1560, world, rank)
            wrong += [counts, frames] != want.tolist()
    measured("dit_parts", "token split", wrong, 0, metric="count")


@given(st.integers(1, 30), st.integers(1, 40), st.integers(1, 16))
def test_any_number_of_ranks_covers_every_token_once(frames: int, per_frame: int, world: int) -> None:
    total = frames * per_frame
    world = min(world, total)
    seen = [0] * frames
    sizes = []
    for rank in range(world):
        counts, ids = mu.split_token_counts_and_frame_ids(frames, per_frame, world, rank)
        sizes.append(sum(counts))
        for count, i in zip(counts, ids, strict=True):
            seen[i] += count
    assert seen == [per_frame] * frames
    assert max(sizes) - min(sizes) <= 1


def test_reference_map() -> None:
    z = goldens.load("dit_parts")
    got = mu.get_attn_map_with_target(z["map_q"], z["map_k"], (3, 2, 3), z["map_masks"])
    assert goldens.error(got, z["map_y"]) < 2e-5


def test_an_empty_mask_gives_no_nan() -> None:
    """Specification §9 D5."""
    z = goldens.load("dit_parts")
    masks = z["map_masks"].clone()
    masks[1] = 0
    got = mu.get_attn_map_with_target(z["map_q"], z["map_k"], (3, 2, 3), masks)
    assert torch.isfinite(got).all()
    assert not got[1].any()


def test_save_video(tmp_path) -> None:
    import numpy as np
    import soundfile

    from wan.utils.media import MediaError, read_video

    soundfile.write(tmp_path / "a.wav", np.zeros(16_000, np.float32), 16_000)
    video = torch.zeros(3, 10, 32, 48)
    video[:, 5:] = 0.5
    path = tmp_path / "deep" / "out"
    mu.save_video_ffmpeg(video, str(path), [str(tmp_path / "a.wav")])
    frames, fps = read_video(f"{path}.mp4")
    assert (tuple(frames.shape), fps) == ((10, 32, 48, 3), 25)
    assert (frames[0].float().mean() - 127).abs() < 4
    assert (frames[9].float().mean() - 191).abs() < 4
    with pytest.raises(MediaError, match="could not write"):
        mu.save_video_ffmpeg(video, str(path), [str(tmp_path / "none.wav")])
