"""One folder a job, confined and gone afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from multitalk_runtime.workspace import Workspace

if TYPE_CHECKING:
    from pathlib import Path


def test_it_is_gone_afterwards_also_after_an_error(tmp_path: Path) -> None:
    with Workspace(tmp_path) as workspace:
        workspace.path("image").write_bytes(b"x")
        (workspace.folder / "deep" / "er").mkdir(parents=True)
        assert workspace.folder.parent == tmp_path
        assert workspace.folder.stat().st_mode & 0o077 == 0, "others can look into it"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyError), Workspace(tmp_path):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc/passwd", "../x", "a/"])
def test_only_plain_names(tmp_path: Path, name: str) -> None:
    with Workspace(tmp_path) as workspace, pytest.raises(ValueError, match="plain"):
        workspace.path(name)


def test_outside_of_its_block_it_has_no_folder() -> None:
    with pytest.raises(ValueError, match="not open"):
        _ = Workspace().folder


def test_two_jobs_never_share_one(tmp_path: Path) -> None:
    with Workspace(tmp_path) as first, Workspace(tmp_path) as second:
        assert first.folder != second.folder
