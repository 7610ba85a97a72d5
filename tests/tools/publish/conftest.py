"""A real registry on loopback for the whole session, and fresh keys and repositories for each test."""

from __future__ import annotations

import secrets
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from publish_samples import V73, Desk, build_of, push_image

from mtbuild.paths import Paths
from mtbuild.prove.local_registry import ensure_registry, stop_registry
from mtbuild.publish.keys import Keys
from mtbuild.publish.registry import Repository
from mtbuild.publish.transport import Transport

if TYPE_CHECKING:
    from collections.abc import Iterator

    from publish_samples import SampleBuild

    from mtbuild.publish.registry import Manifest


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`127.0.0.1:PORT` of CNCF distribution, started and stopped by mtbuild itself."""
    paths = Paths.of(tmp_path_factory.mktemp("registry"))
    yield ensure_registry(paths)
    stop_registry(paths)


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys.ensure(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(root=tmp_path, cache=tmp_path / "cache")


@pytest.fixture
def names(registry: str) -> tuple[str, str]:
    """Names of a staging and a release repository that nobody else uses."""
    unique = secrets.token_hex(6)
    return f"{registry}/s{unique}/staging", f"{registry}/s{unique}/release"


@pytest.fixture
def staging(names: tuple[str, str]) -> Iterator[Repository]:
    with Repository.open(names[0], transport=quick(names[0])) as repository:
        yield repository


@pytest.fixture
def release(names: tuple[str, str]) -> Iterator[Repository]:
    with Repository.open(names[1], transport=quick(names[1])) as repository:
        yield repository


@pytest.fixture
def image(staging: Repository) -> Manifest:
    return push_image(staging)


@pytest.fixture
def build(staging: Repository, image: Manifest) -> SampleBuild:
    return build_of(staging, image, V73)


@pytest.fixture
def desk(
    staging: Repository,
    release: Repository,
    build: SampleBuild,
    keys: Keys,
    paths: Paths,
    monkeypatch: pytest.MonkeyPatch,
) -> Desk:
    """Retries at once: some tests cut the connection hundreds of times."""
    monkeypatch.setattr("mtbuild.publish.promote.Transport", partial(Transport, pause_s=0.001))
    return Desk(staging=staging, release=release, build=build, keys=keys, paths=paths)


def quick(name: str) -> Transport:
    """A transport that does not wait long before it tries again."""
    return Transport(name.partition("/")[0], pause_s=0.01)
