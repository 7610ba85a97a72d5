"""Which wheels the engine holds in layers already: asked of BuildKit itself, so true in a fresh clone too.

Build records say what was built here; they know nothing of another clone's builds, of one that was killed
before its record was written, or of a cache that was pruned since.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from mtbuild.errors import CommandError
from mtbuild.proc import run

if TYPE_CHECKING:
    from mtbuild.prove.engine import Engine

__all__ = ["wheels_in_layers", "wheels_of"]

_DU_S = 120
_RECORD = re.compile(r"^ID:", re.MULTILINE)
_LAYER = re.compile(r"^Description:\s+mount / from exec ", re.MULTILINE)
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")


def wheels_in_layers(engine: Engine) -> frozenset[str]:
    """sha256 of every wheel that a step in the build cache installed; empty if the engine does not tell."""
    try:
        return wheels_of(run([*engine.buildx, "du", "--verbose"], timeout_s=_DU_S).output)
    except CommandError:
        return frozenset()  # then the whole of it is asked for, as on a new engine


def wheels_of(listing: str) -> frozenset[str]:
    """The same from what `buildx du --verbose` prints: a record's description is its step, lock and all."""
    return frozenset(
        sha for record in _RECORD.split(listing) if _LAYER.search(record) for sha in _HASH.findall(record)
    )
