"""One folder a job: everything a job writes lies in it, and it is gone when the job is."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Workspace"]


class Workspace:
    """A temporary folder as a context manager; `path` names files in it and nothing outside."""

    def __init__(self, parent: Path | None = None) -> None:
        self._parent = parent
        self._folder: Path | None = None

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="mt-job-", dir=self._parent))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    @property
    def folder(self) -> Path:
        """The folder; ValueError outside of the `with` block."""
        if self._folder is None:
            msg = "the workspace is not open"
            raise ValueError(msg)
        return self._folder

    def path(self, name: str) -> Path:
        """A file in the folder. Names come from this program, never from a job; ValueError otherwise."""
        if not name or name in (".", "..") or Path(name).name != name:
            msg = f"{name!r} is not a plain file name"
            raise ValueError(msg)
        return self.folder / name
