"""Saving and reading pictures and videos through the real ffmpeg."""

import argparse

import numpy as np
import pytest
import torch
from goldens import seeded
from PIL import Image

from wan.utils import media
from wan.utils.media import MediaError, read_video, write_video
from wan.utils.utils import cache_image, cache_video, grid, rand_name, str2bool


def moving(frames=6, height=32, width=48):
    """A grey ramp that moves one step a frame: smooth, so that H.264 keeps it nearly exactly."""
    ramp = torch.linspace(40, 200, width)[None, None, :, None] + 5 * torch.arange(frames)[:, None, None, None]
    return ramp.expand(frames, height, width, 3).to(torch.uint8)


@pytest.mark.parametrize(("height", "width"), [(32, 48), (33, 47)])
@pytest.mark.parametrize("fps", [25, 16, 30000 / 1001])
def test_a_video_survives_the_file(tmp_path, height, width, fps):
    frames = moving(height=height, width=width)
    path = write_video(frames, tmp_path / "deep" / "clip.mp4", fps)
    back, rate = read_video(path)
    assert back.shape == (6, height + height % 2, width + width % 2, 3)
    assert rate == pytest.approx(fps, rel=1e-3)
    difference = (back[:, :height, :width].float() - frames.float()).abs()
    assert difference.mean() < 3
    assert [p.name for p in path.parent.iterdir()] == ["clip.mp4"]


def test_a_picture_reads_as_one_frame(tmp_path):
    Image.new("RGB", (20, 10), (10, 200, 30)).save(tmp_path / "a.png")
    frames, _ = read_video(tmp_path / "a.png")
    assert frames.shape == (1, 10, 20, 3)
    assert frames[0, 5, 5].tolist() == [10, 200, 30]


def test_bad_files_are_named(tmp_path):
    with pytest.raises(MediaError, match=r"none\.mp4: no such file"):
        read_video(tmp_path / "none.mp4")
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(MediaError, match=r"text\.mp4: ffmpeg failed"):
        read_video(tmp_path / "text.mp4")
    with pytest.raises(MediaError, match=r"clip\.nonsense: ffmpeg failed"):
        write_video(moving(), tmp_path / "clip.nonsense")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text.mp4"]
    with pytest.raises(ValueError, match=r"\[T, H, W, 3\] uint8"):
        write_video(torch.zeros(2, 3, 8, 8), tmp_path / "a.mp4")


def test_without_ffmpeg_the_fix_is_said(monkeypatch):
    monkeypatch.setattr(media.shutil, "which", lambda _: None)
    monkeypatch.setitem(__import__("sys").modules, "imageio_ffmpeg", None)
    with pytest.raises(MediaError, match=r"multitalk-runtime\[video\]"):
        media.ffmpeg()


def test_cache_video(tmp_path):
    video = torch.linspace(-1, 1, 48).expand(2, 3, 5, 32, 48)
    path = cache_video(video, tmp_path / "two.mp4", fps=16)
    assert path == str(tmp_path / "two.mp4")
    frames, fps = read_video(path)
    assert frames.shape == (5, 32 + 4, 2 * 48 + 6, 3)  # two beside each other, two pixels around each
    assert fps == 16
    assert frames[0, 10, 8:40].float().diff(dim=0).mean() > 0
    assert frames[0, :2].max() < 20  # the gap is black


def test_cache_video_of_one_and_without_a_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    path = cache_video(torch.zeros(1, 3, 5, 32, 48))
    assert path.endswith(".mp4")
    frames, fps = read_video(path)
    assert frames.shape == (5, 32, 48, 3)
    assert fps == 30
    assert abs(float(frames.float().mean()) - 127) < 3


def test_cache_image(tmp_path):
    pictures = torch.stack([torch.full((3, 4, 6), v) for v in (-1.0, 0.0, 1.0)])
    path = cache_image(pictures, tmp_path / "a", nrow=2)
    assert path.endswith("a.png")
    pixels = torch.from_numpy(np.array(Image.open(path)))
    assert pixels.shape == (2 * 4 + 6, 2 * 6 + 6, 3)
    assert pixels[3, 10].tolist() == [128] * 3
    assert pixels[9, 3].tolist() == [255] * 3
    assert pixels[9, 12].tolist() == [0] * 3


def test_grid_places_every_picture():
    pictures = seeded.rand("media.grid", (5, 3, 4, 6))
    canvas = grid(pictures, nrow=3)
    assert canvas.shape == (3, 2 * 6 + 2, 3 * 8 + 2)
    for number, picture in enumerate(pictures):
        row, column = divmod(number, 3)
        part = canvas[:, 2 + 6 * row : 6 + 6 * row, 2 + 8 * column : 8 + 8 * column]
        assert torch.equal(part, picture)
    assert float(canvas.sum()) == pytest.approx(float(pictures.sum()), rel=1e-5)


@pytest.mark.parametrize(("shape", "save"), [((3, 5, 8, 8), cache_video), ((3, 8, 8), cache_image)])
def test_wrong_shapes_are_named(tmp_path, shape, save):
    with pytest.raises(ValueError, match="must be"):
        save(torch.zeros(shape), tmp_path / "x.mp4")


@pytest.mark.parametrize("word", ["yes", "True", " t ", "Y", "1", True])
def test_true_words(word):
    assert str2bool(word) is True


@pytest.mark.parametrize("word", ["no", "FALSE", "f", "n", "0", False])
def test_false_words(word):
    assert str2bool(word) is False


def test_neither_true_nor_false():
    with pytest.raises(argparse.ArgumentTypeError, match="'maybe' is neither"):
        str2bool("maybe")


def test_random_names_differ():
    assert rand_name(suffix=".mp4").endswith(".mp4")
    assert rand_name() != rand_name()
