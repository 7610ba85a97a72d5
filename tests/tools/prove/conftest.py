"""The engine, the registry and the base that engine tests share, and a project of their own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_cell import BOOKWORM, REAL, ROOT

from mtbuild.digest import Reference
from mtbuild.paths import Paths
from mtbuild.prove.base import ensure_base
from mtbuild.prove.engine import Engine, connect
from mtbuild.prove.local_registry import ensure_registry


@pytest.fixture(scope="module")
def engine() -> Engine:
    return connect(REAL, bootstrap=True)


@pytest.fixture(scope="module")
def registry() -> str:
    return ensure_registry(REAL)


@pytest.fixture(scope="module")
def base(engine: Engine, registry: str) -> Reference:
    return ensure_base(BOOKWORM, engine=engine, registry=registry, paths=REAL)


@pytest.fixture
def project(tmp_path: Path) -> Paths:
    """A project of its own: its runtime is one module."""
    (tmp_path / "wan").mkdir()
    (tmp_path / "wan" / "__init__.py").write_text("ANSWER = 42\n")
    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling>=1.27"]\nbuild-backend = "hatchling.build"\n'
        '[project]\nname = "multitalk-runtime"\nversion = "0.0.1"\ndependencies = []\n'
        '[tool.hatch.build.targets.wheel]\npackages = ["wan"]\n'
    )
    shutil.copytree(ROOT / "templates", tmp_path / "templates")
    return Paths(root=tmp_path, cache=tmp_path / "cache")
