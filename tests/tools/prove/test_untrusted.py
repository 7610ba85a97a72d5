"""What an image leaves for the host: only plain files of bounded size, and never anything of the host's."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from mtbuild.errors import InfrastructureError
from mtbuild.prove import untrusted


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def test_videos_and_pictures_are_kept_and_nothing_else(out: Path, tmp_path: Path) -> None:
    (out / "generate.mp4").write_bytes(b"video")
    (out / "generate.png").write_bytes(b"picture")
    for name in ("report.json", "run.sh", ".hidden.png", "Odd Name.png", "page.html", "gpu-seen"):
        (out / name).write_text("no")
    (out / "folder.png").mkdir()
    kept, left = untrusted.keep(out, tmp_path / "kept")
    assert [(one.name, one.size_bytes) for one in kept] == [("generate.mp4", 5), ("generate.png", 7)]
    assert kept[0].sha256 == hashlib.sha256(b"video").hexdigest()
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["generate.mp4", "generate.png"]
    assert len(left) == 1
    assert left[0].startswith("folder.png")


def test_a_link_to_a_file_of_the_host_is_not_followed(out: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the host's")
    (out / "a.png").symlink_to(secret)
    os.mkfifo(out / "b.mp4")
    kept, left = untrusted.keep(out, tmp_path / "kept")
    assert kept == ()
    assert [line.partition(":")[0] for line in left] == ["a.png", "b.mp4"]
    assert not (tmp_path / "kept").exists()


def test_all_of_them_together_are_bounded(out: Path, tmp_path: Path) -> None:
    for name, size in (("a.mp4", 1 << 20), ("b.mp4", untrusted.ARTEFACT_LIMIT), ("c.mp4", 5)):
        with (out / name).open("wb") as file:
            file.truncate(size)
    kept, left = untrusted.keep(out, tmp_path / "kept")
    assert [one.name for one in kept] == ["a.mp4", "c.mp4"]
    assert "b.mp4 is no plain file of at most 63 MiB" in left[0]


def test_too_many_are_left_and_said(out: Path, tmp_path: Path) -> None:
    for number in range(20):
        (out / f"{number:02}.png").write_bytes(b"x")
    kept, left = untrusted.keep(out, tmp_path / "kept")
    assert len(kept) == 16
    assert len(left) == 4


def test_what_an_earlier_run_left_is_gone(out: Path, tmp_path: Path) -> None:
    old = tmp_path / "kept" / "old.png"
    old.parent.mkdir()
    old.write_bytes(b"of another run")
    untrusted.keep(out, old.parent)
    assert not old.exists()


def test_reading_is_bounded(out: Path) -> None:
    (out / "f").write_bytes(b"12345")
    assert untrusted.read(out / "f", limit=5) == b"12345"
    with pytest.raises(InfrastructureError, match="no plain file"):
        untrusted.read(out / "f", limit=4)
