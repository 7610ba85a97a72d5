"""Release tags: write-once ones, and aliases that move all together or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mtbuild.errors import InputError, MtbuildError
from mtbuild.publish import catalog
from mtbuild.publish.registry import check_tag

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mtbuild.digest import Digest
    from mtbuild.plan.cell import Cell
    from mtbuild.publish.job import Job
    from mtbuild.publish.policy import Channel
    from mtbuild.publish.registry import Manifest

__all__ = ["TagTakenError", "alias_names", "is_tagged", "move_aliases", "release_tag"]


class TagTakenError(InputError):
    """Raised when a write-once tag names another digest already."""


def release_tag(cell_id: str, build_id: str, channel: Channel) -> str:
    """The write-once tag: `<id>-<build12>`, and `-checked` behind it where no GPU vouches."""
    return check_tag(f"{cell_id}-{build_id[:12]}" + ("-checked" if channel == "checked" else ""))


def alias_names(cell: Cell, channel: Channel, wanted: Sequence[str]) -> tuple[str, ...]:
    """The aliases that a publication moves; InputError for a name that the repository uses itself."""
    names = (f"{cell.id}-checked",) if channel == "checked" else (cell.id, cell.name, *wanted)
    for name in names:
        if check_tag(name) == catalog.TAG or name.startswith("sha256-"):
            msg = f"{name!r} can't be an alias: the release repository uses it itself"
            raise InputError(msg, where="matrix.yaml: aliases", fix="choose another name")
    return tuple(dict.fromkeys(names))


def is_tagged(job: Job) -> bool:
    """Whether the write-once tag is there already; TagTakenError if it names another digest."""
    taken = job.target.find_manifest(job.tag)
    if taken is not None and taken.digest != job.digest:
        msg = f"{job.target.name}:{job.tag} is write-once and names {taken.digest}, not {job.digest}"
        raise TagTakenError(msg, fix="two builds gave one build id: remove nothing, rebuild to get a new one")
    return taken is not None


def move_aliases(job: Job, manifest: Manifest) -> tuple[bool, tuple[str, ...]]:
    """Point the aliases here, unless one names a newer build of this cell; all of them or none."""
    before: dict[str, Manifest | None] = {}
    named: list[str] = []
    try:
        for alias in job.aliases:
            current = job.target.find_manifest(alias)
            if current is not None and current.digest == job.digest:
                named.append(alias)
            elif current is not None and _is_newer(job, current.digest):
                job.note(f"alias {alias} stays: it names a newer build, {current.digest}")
            else:
                before[alias] = current
                job.note(f"alias {job.target.name}:{alias}")
                job.target.put_manifest(manifest, tag=alias)
                named.append(alias)
    except BaseException:
        for alias, held in before.items():
            if held is not None:
                _put_back(job, alias, held)
        raise
    return bool(before), tuple(named)


def _put_back(job: Job, alias: str, held: Manifest) -> None:
    try:
        job.target.put_manifest(held, tag=alias)
    except MtbuildError as error:  # what stopped the move is what is told; both digests are proven
        job.note(f"alias {alias} could not be moved back to {held.digest}: {error.message}")


def _is_newer(job: Job, digest: Digest) -> bool:
    _, summaries = catalog.proof_of(job.target, digest, job.keys.trusted)
    return any(s.image.cell_id == job.cell.id and s.image.created > job.build.created for s in summaries)
