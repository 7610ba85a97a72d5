"""Files that an image made: plain ones of bounded size, never through a link, never more than expected."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from dataclasses import dataclass
from stat import S_ISREG
from typing import TYPE_CHECKING, Any

from mtbuild.errors import InfrastructureError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["ARTEFACT_LIMIT", "Artefact", "keep", "read"]

ARTEFACT_LIMIT = 64 << 20  # bytes of all artefacts of a run together
_MOST = 16
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,60}\.(mp4|png)")


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """A file that a check left for people to look at."""

    name: str
    size_bytes: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def read(path: Path, *, limit: int) -> bytes:
    """Its bytes. Raises OSError (a link, missing) or InfrastructureError (no plain file, too long)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as stream:
        status = os.fstat(stream.fileno())
        data = stream.read(limit + 1) if S_ISREG(status.st_mode) else b""
        if not S_ISREG(status.st_mode) or len(data) > limit:
            msg = f"{path.name} is no plain file of at most {limit >> 20} MiB"
            raise InfrastructureError(msg)
        return data


def keep(folder: Path, target: Path) -> tuple[tuple[Artefact, ...], tuple[str, ...]]:
    """Copy videos and pictures out of what an image wrote into `folder`; `target` is made anew.

    Returns what was kept, and one line for each that was not: other names are not even looked at.
    """
    shutil.rmtree(target, ignore_errors=True)
    kept: list[Artefact] = []
    left: list[str] = []
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if _NAME.fullmatch(entry.name))
    room = ARTEFACT_LIMIT
    for name in names:
        if len(kept) == _MOST:
            left.append(f"{name}: more than {_MOST} artefacts")
            continue
        try:
            data = read(folder / name, limit=room)
        except (OSError, InfrastructureError) as error:
            left.append(f"{name}: {error}")
            continue
        room -= len(data)
        target.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(data)
        kept.append(Artefact(name=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))
    return tuple(kept), tuple(left)
