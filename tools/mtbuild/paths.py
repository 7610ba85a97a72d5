"""Where mtbuild keeps things: state beside the matrix, engine data and wheels in the user's cache."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import platformdirs

__all__ = ["Paths"]


@dataclass(frozen=True, kw_only=True)
class Paths:
    """All paths of one project. `root` holds matrix.yaml; `cache` is shared by all clones of a user."""

    root: Path
    cache: Path

    @classmethod
    def of(cls, root: Path) -> Paths:
        """For the project at `root`; MTBUILD_CACHE overrides the user's cache folder."""
        override = os.environ.get("MTBUILD_CACHE")
        return cls(
            root=root.resolve(), cache=Path(override) if override else platformdirs.user_cache_path("mtbuild")
        )

    @property
    def matrix(self) -> Path:
        return self.root / "matrix.yaml"

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def templates(self) -> Path:
        return self.root / "templates"

    @property
    def state(self) -> Path:
        return self.root / ".mtbuild"

    @property
    def registry(self) -> Path:
        return self.state / "registry"

    @property
    def keys(self) -> Path:
        return self.state / "keys"

    @property
    def logs(self) -> Path:
        return self.state / "logs"

    @property
    def facts(self) -> Path:
        """Wheel facts by sha256: they never change once a wheel is published."""
        return self.cache / "facts"

    @property
    def wheels(self) -> Path:
        return self.cache / "wheels"

    @property
    def engine(self) -> Path:
        return self.cache / "engine"

    def cell(self, cell_id: str, build12: str) -> Path:
        """State of one build of one cell: build.json, smoke-<tier>-<gpu>.json, verdict.json."""
        return self.state / "cells" / cell_id / build12
