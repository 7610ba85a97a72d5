"""One publication under way: what is let out, from where to where, judged by what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from mtbuild.digest import Digest
    from mtbuild.paths import Paths
    from mtbuild.plan.cell import Cell
    from mtbuild.publish.evidence import BuildRecord
    from mtbuild.publish.keys import Keys
    from mtbuild.publish.policy import Policy
    from mtbuild.publish.registry import Repository

__all__ = ["Job"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """`tag` is the write-once one, `aliases` move; `withhold` says why nothing may come out, or is empty."""

    staging: Repository
    target: Repository
    digest: Digest
    cell: Cell
    build: BuildRecord
    policy: Policy
    tag: str
    aliases: tuple[str, ...]
    paths: Paths
    keys: Keys
    now: datetime
    withhold: str
    note: Callable[[str], None]
