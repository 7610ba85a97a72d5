"""A job's files, brought into its workspace and checked: from the web, S3, base64, a volume, or built in.

Everything is copied, so that what was checked is what is used. The copies have names of this program, and
none of a job's.
"""

from __future__ import annotations

import base64
import binascii
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from multitalk_runtime.defaults import AUDIO, IMAGE
from multitalk_runtime.errors import FetchFault, ForbiddenFault, TooLargeFault
from multitalk_runtime.fetch import fetch_url
from multitalk_runtime.sniff import AudioInfo, ImageInfo, check_audio, check_image

if TYPE_CHECKING:
    from multitalk_runtime.job import Job, Source
    from multitalk_runtime.settings import Settings
    from multitalk_runtime.storage import Storage
    from multitalk_runtime.workspace import Workspace

__all__ = ["Inputs", "resolve"]

_BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Checked files. `tracks` has one entry a speaker, None for a silent one, and `seconds` their lengths."""

    image: Path
    image_info: ImageInfo
    tracks: tuple[Path | None, ...]
    seconds: tuple[float, ...]


def resolve(job: Job, *, settings: Settings, workspace: Workspace, storage: Storage) -> Inputs:
    """Bring and check the image and the tracks. Raises the fault of whatever is wrong, with its field."""
    image = workspace.path("image")
    if job.image is None:
        image = IMAGE
    else:
        _bring(job.image, image, settings.max_image_bytes, settings, storage, "image")
    image_info = check_image(image, settings=settings, field="image")

    tracks: list[Path | None] = []
    found: list[AudioInfo | None] = []
    for person, source in _sources(job):
        if source is None:
            tracks.append(None)
            found.append(None)
            continue
        field = f"audio.{person}"
        track = workspace.path(person)
        if isinstance(source, Path):
            track = source
        else:
            _bring(source, track, settings.max_audio_bytes, settings, storage, field)
        tracks.append(track)
        found.append(check_audio(track, settings=settings, field=field))
    seconds = tuple(info.seconds if info else 0.0 for info in found)
    _check_together(job, seconds, settings)
    return Inputs(image=image, image_info=image_info, tracks=tuple(tracks), seconds=seconds)


def _sources(job: Job) -> list[tuple[str, Source | Path | None]]:
    if job.audio is None:
        return [("person1", AUDIO)]
    names = ("person1", "person2")[: job.audio.persons]
    return [(name, getattr(job.audio, name)) for name in names]


def _check_together(job: Job, seconds: tuple[float, ...], settings: Settings) -> None:
    if job.audio_type == "add" and sum(seconds) > settings.max_audio_s:
        msg = f"{sum(seconds):.0f} s of sound together; at most {settings.max_audio_s:g} s are taken"
        raise TooLargeFault("too_large.seconds", msg, field="audio")


def _bring(
    source: Source, target: Path, limit: int, settings: Settings, storage: Storage, field: str
) -> None:
    if source.url is not None:
        fetch_url(source.url, target, max_bytes=limit, settings=settings, field=field)
    elif source.base64 is not None:
        _from_base64(source.base64, target, limit, field)
    elif source.path is not None:
        _from_volume(source.path, target, limit, settings, field)
    elif source.s3 is not None:
        bucket = source.s3.bucket or settings.s3_bucket
        if not bucket:
            msg = "the job names no bucket, and this worker has no default one"
            raise ForbiddenFault("forbidden.bucket", msg, field=field)
        storage.get(bucket, source.s3.key, target, max_bytes=limit, field=field)
    if target.stat().st_size == 0:
        msg = "the file is empty"
        raise FetchFault("fetch.truncated", msg, field=field, hint="send a file with content")


def _from_base64(text: str, target: Path, limit: int, field: str) -> None:
    if len(text) * 3 // 4 > limit + _BLOCK:  # before any copy is made; the exact size is checked below
        msg = f"more than {limit} bytes; at most {limit} are taken"
        raise TooLargeFault("too_large.bytes", msg, field=field)
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        msg = "the text is not base64"
        raise FetchFault("fetch.base64", msg, field=field) from error
    if len(data) > limit:
        msg = f"{len(data)} bytes; at most {limit} are taken"
        raise TooLargeFault("too_large.bytes", msg, field=field)
    target.write_bytes(data)


def _from_volume(text: str, target: Path, limit: int, settings: Settings, field: str) -> None:
    """Copy a file of a volume; a relative path is looked for on every one of them.

    Outside of the volumes every path gets the same answer, whether it exists or not.
    """
    inside = False
    for volume in (folder.resolve() for folder in settings.volumes):
        try:
            found = (volume / text).resolve()
            here = found.is_relative_to(volume)
            inside |= here
            there = here and found.is_file()
        except (OSError, ValueError, RuntimeError):  # too long, a NUL, a loop of links
            continue
        if there:
            _copy(found, volume, target, limit, field)
            return
    if inside:
        msg = "there is no such file on the worker's volumes"
        raise FetchFault("fetch.not_found", msg, field=field)
    msg = (
        "the path leads outside of the worker's volumes" if settings.volumes else "this worker has no volume"
    )
    raise ForbiddenFault("forbidden.path", msg, field=field)


def _copy(found: Path, volume: Path, target: Path, limit: int, field: str) -> None:
    # Between the look and the opening a link may have been put there: what counts is what is open now.
    try:
        descriptor = os.open(found, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        msg = "the file can't be opened by the worker"
        raise ForbiddenFault("forbidden.path", msg, field=field) from error
    with os.fdopen(descriptor, "rb") as source, target.open("xb") as copy:
        opened = Path(f"/proc/self/fd/{descriptor}").resolve()
        if not opened.is_relative_to(volume) or not stat.S_ISREG(os.fstat(descriptor).st_mode):
            msg = "the path leads outside of the worker's volumes"
            raise ForbiddenFault("forbidden.path", msg, field=field)
        size = 0
        while block := source.read(_BLOCK):
            size += len(block)
            if size > limit:
                msg = f"more than {limit} bytes; at most {limit} are taken"
                raise TooLargeFault("too_large.bytes", msg, field=field)
            copy.write(block)
