"""Where images go: the registries that matrix.yaml names, or the embedded one on loopback."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mtbuild.prove.local_registry import ensure_registry

if TYPE_CHECKING:
    from collections.abc import Callable

    from mtbuild.paths import Paths
    from mtbuild.plan.matrix import RegistrySettings

__all__ = ["Registries", "registries"]


@dataclass(frozen=True, kw_only=True)
class Registries:
    """Two repositories as HOST/PATH: `staging` is built to and tested from, only `release` is public."""

    staging: str
    release: str
    embedded: bool


def registries(
    settings: RegistrySettings, paths: Paths, *, note: Callable[[str], None] = lambda _: None
) -> Registries:
    """Those of matrix.yaml; where it says `embedded`, the loopback registry, started if it is not running."""
    if settings.staging is not None and settings.release is not None:
        return Registries(staging=settings.staging, release=settings.release, embedded=False)
    host = ensure_registry(paths, note=note)
    return Registries(staging=f"{host}/mt-staging", release=f"{host}/multitalk", embedded=True)
