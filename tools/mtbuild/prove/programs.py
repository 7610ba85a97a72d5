"""The programs that mtbuild brings along on a bare Debian machine: engine, buildx, registry, clients."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

from mtbuild.proc import run
from mtbuild.prove import debian
from mtbuild.prove.service import locked

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mtbuild.paths import Paths

__all__ = ["ensure_programs", "public_clients"]

# Bookworm's own Docker has no buildx, so its engine comes from the next release; later releases have theirs.
_ENGINE_SUITE = {"bookworm": "trixie"}
_ENGINE = ("containerd", "docker-buildx", "docker-cli", "docker.io")
# runc of trixie needs a newer C library than bookworm's and fails at the first RUN.
_OWN = ("docker-registry", "runc", "tini")
_CLIENTS = ("cosign", "crane", "oras")
_TRIED = ("usr/sbin/dockerd", "usr/bin/containerd", "usr/sbin/runc", "usr/bin/docker")


def ensure_programs(paths: Paths, *, note: Callable[[str], None] = lambda _: None) -> Path:
    """Engine, buildx and registry programs, unpacked once into the user's cache; returns the folder.

    Needs no root. Raises InfrastructureError on a system that is not Debian or when its mirrors fail.
    """
    folder = paths.engine / "programs"
    with locked(paths.engine, "programs"):
        if not _complete(folder, _ENGINE + _OWN):
            own = debian.codename()
            fresh = _fresh(folder)
            versions = debian.unpack(_ENGINE, suite=_ENGINE_SUITE.get(own, own), into=fresh, note=note)
            versions |= debian.unpack(_OWN, suite=own, into=fresh, note=note)
            for program in _TRIED:  # a missing library shows here and not in the first build
                run([fresh / program, "--version"], timeout_s=60)
            _finish(fresh, folder, versions)
    return folder


def public_clients(paths: Paths, *, note: Callable[[str], None] = lambda _: None) -> Path:
    """cosign, crane and oras of Debian's development release; returns the folder of their programs.

    Not used by mtbuild itself: they are second opinions on what our own code signs and publishes.
    """
    folder = paths.engine / "clients"
    with locked(paths.engine, "clients"):
        if not _complete(folder, _CLIENTS):
            fresh = _fresh(folder)
            _finish(fresh, folder, debian.unpack(_CLIENTS, suite="sid", into=fresh, note=note))
    return folder / "usr/bin"


def _complete(folder: Path, packages: tuple[str, ...]) -> bool:
    """Whether a folder was finished, and for at least these packages (older ones had fewer)."""
    try:
        versions = json.loads((folder / "versions.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return set(packages) <= set(versions)


def _fresh(folder: Path) -> Path:
    fresh = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    return fresh


def _finish(fresh: Path, folder: Path, versions: dict[str, str]) -> None:
    """The record is written last and the folder moved whole: what a kill leaves never counts."""
    (fresh / "versions.json").write_text(json.dumps(versions, indent=1, sort_keys=True), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    fresh.replace(folder)
