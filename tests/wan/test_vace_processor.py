"""Which frames and which size VACE takes of a source, and files read for it."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from wan.utils import VaceVideoProcessor
from wan.utils.media import write_video
from wan.utils.vace_processor import VaceImageProcessor, grid_size, resize_crop


def processor(**changes):
    defaults = {"min_area": 64 * 96, "max_area": 64 * 96, "seq_len": 200}
    return VaceVideoProcessor(**(defaults | changes))


@given(
    frames=st.integers(1, 400),
    fps=st.floats(5, 60),
    height=st.integers(64, 2000),
    width=st.integers(64, 2000),
    seq_len=st.integers(24, 5000),
    zero_start=st.booleans(),
    keep_last=st.booleans(),
)
def test_the_plan_keeps_every_limit(frames, fps, height, width, seq_len, zero_start, keep_last):
    p = processor(seq_len=seq_len, zero_start=zero_start, keep_last=keep_last)
    numbers, (h, w) = p.plan(frames, fps, height, width)
    assert len(numbers) % 4 == 1
    assert numbers == sorted(set(numbers))
    assert numbers[0] >= 0
    assert numbers[-1] < frames
    assert h % 16 == w % 16 == 0
    assert (1 + (len(numbers) - 1) // 4) * (h // 16) * (w // 16) <= seq_len
    assert h * w <= 64 * 96
    if zero_start:
        assert numbers[0] == 0


def test_frames_are_thinned_to_the_rate():
    numbers, _ = processor(min_fps=16, max_fps=16, keep_last=False).plan(100, 32, 64, 96)
    assert len(numbers) == 29  # 200 tokens hold 8 latents of 24
    assert {b - a for a, b in pairwise(numbers)} == {2}


def test_the_last_frame_is_kept_if_it_is_near():
    numbers, _ = processor(seq_len=10_000).plan(20, 16, 64, 96)
    assert numbers[-1] == 19
    assert len(numbers) == 17
    numbers, _ = processor(seq_len=10_000, keep_last=False).plan(20, 16, 64, 96)
    assert numbers == list(range(17))


def test_middle_start():
    numbers, _ = processor(seq_len=48, zero_start=False, keep_last=False).plan(25, 16, 64, 96)
    assert numbers == [10, 11, 12, 13, 14]


def test_area_and_length_can_be_set():
    p = processor()
    p.set_area(32 * 48)
    p.set_seq_len(6)
    assert p.plan(50, 16, 64, 96) == ([0], (32, 48))


@pytest.mark.parametrize("change", [{"min_area": 10**9}, {"min_fps": 60}, {"seq_len": 0}])
def test_empty_ranges_are_refused(change):
    with pytest.raises(ValueError, match="empty range"):
        processor(**change)


@given(st.integers(1, 5000), st.floats(0.2, 5))
def test_grid_size_stays_within_its_tokens(tokens, ratio):
    height, width = grid_size(tokens, ratio, (16, 16))
    assert height % 16 == width % 16 == 0
    assert 1 <= height // 16 * (width // 16) <= tokens


def test_resize_crop_covers_and_centres():
    frames = torch.linspace(-1, 1, 100).expand(2, 3, 50, 100)
    out = resize_crop(frames, 25, 25)
    assert out.shape == (2, 3, 25, 25)
    assert out.mean().abs() < 0.03  # the middle of the ramp
    assert torch.equal(resize_crop(frames, 50, 100), frames)


def test_files(tmp_path):
    ramp = torch.linspace(0, 250, 96)[None, None, :, None].expand(12, 64, 96, 3).to(torch.uint8)
    mask = torch.zeros(12, 64, 96, 3, dtype=torch.uint8)
    mask[:, :, 48:] = 255
    source, marked = (write_video(v, tmp_path / f"{n}.mp4", 16) for n, v in (("v", ramp), ("m", mask)))
    p = processor()
    video, masked = p.load_video_pair(source, marked)
    assert video.shape == (3, 9, 64, 96)
    assert masked.shape == (1, 9, 64, 96)
    assert masked[..., :40].max() < 0.1
    assert masked[..., 56:].min() > 0.9
    assert -1 <= video.min() < -0.9
    assert video[:, :, :, 0].mean() < video[:, :, :, -1].mean()
    video, nothing = p.load_video_pair(source, None)
    assert nothing is None
    assert torch.equal(video, p.load_video(source))


def test_picture_file(tmp_path):
    Image.new("RGB", (130, 70), (255, 255, 255)).save(tmp_path / "a.png")
    image = VaceImageProcessor(seq_len=8).load_image(tmp_path / "a.png")
    assert image.shape == (3, 32, 64)
    assert image.min() > 0.99
