"""Sizes and frames for Qwen2-VL."""

import base64
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from wan.utils import qwen_vl_utils as q
from wan.utils.media import write_video


@given(st.integers(10, 5000), st.integers(10, 5000))
def test_sizes_keep_their_limits(height, width):
    if max(height, width) > 200 * min(height, width):
        return
    h, w = q.smart_resize(height, width)
    assert h % 28 == w % 28 == 0
    assert q.MIN_PIXELS <= h * w <= q.MAX_PIXELS
    if min(height, width) >= 280 and h * w < 0.9 * q.MAX_PIXELS:
        assert abs(h / w - height / width) / (height / width) < 0.12


def test_known_sizes_and_extreme_ratios():
    assert q.smart_resize(100, 100) == (112, 112)
    assert q.smart_resize(10, 10) == (56, 56)
    assert q.smart_resize(1000, 2000, max_pixels=28 * 28 * 100) == (196, 392)
    with pytest.raises(ValueError, match="200 times"):
        q.smart_resize(1, 300)


def test_pictures_from_everywhere(tmp_path):
    image = Image.new("RGBA", (100, 60), (255, 0, 0, 255))
    image.save(tmp_path / "a b.png")
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    data = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    path = tmp_path / "a b.png"
    for source in (image, str(path), path, path.as_uri(), data):
        loaded = q.fetch_image({"image": source})
        assert loaded.size == (112, 56)
        assert loaded.getpixel((5, 5)) == (255, 0, 0)
    assert q.fetch_image({"image": image, "resized_height": 60, "resized_width": 90}).size == (84, 56)


def test_the_network_is_refused():
    with pytest.raises(ValueError, match="nothing is fetched"):
        q.fetch_image({"image": "https://example.org/a.png"})
    with pytest.raises(ValueError, match="must be base64"):
        q.fetch_image({"image": "data:image/png,abc"})
    with pytest.raises(ValueError, match="got int"):
        q.fetch_image({"image": 3})


@given(st.integers(2, 3000), st.floats(1, 60))
def test_number_of_frames(total, fps):
    count = q.smart_nframes({}, total, fps)
    assert count % 2 == 0
    assert 2 <= count <= min(total, 768)


def test_frames_on_request():
    assert q.smart_nframes({"nframes": 7}, 100, 25) == 8
    assert q.smart_nframes({"fps": 1}, 100, 25) == 4
    with pytest.raises(ValueError, match="either fps or nframes"):
        q.smart_nframes({"fps": 1, "nframes": 2}, 10, 25)
    with pytest.raises(ValueError, match="can't be taken"):
        q.smart_nframes({"nframes": 20}, 10, 25)


def test_video_file(tmp_path):
    frames = torch.arange(0, 240, 10, dtype=torch.uint8)[:, None, None, None].expand(24, 120, 160, 3)
    path = write_video(frames, tmp_path / "v.mp4", 12)
    video = q.fetch_video({"video": str(path)})
    assert video.shape[0] == 4
    assert video.shape[2] % 28 == video.shape[3] % 28 == 0
    assert [round(float(f.mean()) / 10) for f in video] == [0, 8, 15, 23]


def test_a_conversation(tmp_path):
    image = Image.new("RGB", (56, 56))
    talk = [
        {"role": "system", "content": "rules"},
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "a"}]},
        {"role": "user", "content": [{"type": "video", "video": [image, image, image]}]},
    ]
    for conversation in (talk, [talk]):
        images, videos = q.process_vision_info(conversation)
        assert [i.size for i in images] == [(56, 56)]
        assert len(videos[0]) == 4  # an even number: the last picture twice
    assert q.process_vision_info([{"role": "user", "content": "a"}]) == (None, None)
