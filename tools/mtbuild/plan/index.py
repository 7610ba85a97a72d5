"""The configured package index: which files a project has. No address is written in this project."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Index", "Link"]


@dataclass(frozen=True, kw_only=True)
class Link:
    """One file of a project's index page. `sha256` and `size` (bytes) are None where the page omits them."""

    filename: str
    url: str
    sha256: str | None
    size: int | None
    requires_python: str | None
    yanked: bool
    metadata_sha256: str | None = None


class Index:
    """uv's settings, else pip's, else the default of the library; extra indexes first, as uv does."""

    @classmethod
    def from_environment(cls) -> Index:
        """From this process's environment and the user's uv and pip configuration."""
        raise NotImplementedError

    def links(self, project: str) -> tuple[Link, ...]:
        """All files of a project; empty where no index has it."""
        raise NotImplementedError

    def uv_env(self) -> dict[str, str]:
        """Environment for a uv subprocess that makes it use the same indexes and CA."""
        raise NotImplementedError
