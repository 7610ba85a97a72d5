"""The finished video on its way to the caller: to S3 with a presigned URL, or as base64 in the reply.

Where it will go is decided before the work starts (`plan`), so that a bucket that is not allowed costs no GPU
time. There is no third way: a video that can't be delivered is an error, never a path on the worker.
"""

from __future__ import annotations

import base64
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from multitalk_runtime.errors import OutputFault, TooLargeFault
from multitalk_runtime.storage import check_allowed

if TYPE_CHECKING:
    from pathlib import Path

    from multitalk_runtime.job import Job
    from multitalk_runtime.settings import Settings
    from multitalk_runtime.storage import Storage

__all__ = ["Destination", "deliver", "plan"]


@dataclass(frozen=True, kw_only=True)
class Destination:
    """An object in S3."""

    bucket: str
    key: str
    expires_s: int


def plan(job: Job, *, settings: Settings, storage: Storage) -> Destination | None:
    """Where the video goes: an object, or None for base64.

    Raises OutputFault without a bucket, ForbiddenFault for one that is not allowed, StorageFault without
    credentials.
    """
    output = job.output
    if output.format == "base64":
        return None
    bucket = output.bucket or settings.s3_bucket
    if not bucket:
        msg = "the job names no bucket, and this worker has no default one"
        raise OutputFault("output.no_storage", msg, field="output.bucket")
    # A name that can't be guessed, so that one caller never writes over another's result.
    key = output.key or f"{settings.s3_output_prefix.strip('/')}/{secrets.token_hex(16)}.mp4".lstrip("/")
    if output.key is not None or output.bucket is not None:
        field = "output.key" if output.key is not None else "output.bucket"
        check_allowed(bucket, key, settings=settings, field=field)
    storage.check_credentials(field="output")
    return Destination(bucket=bucket, key=key, expires_s=output.expires_s)


def deliver(
    video: Path, destination: Destination | None, *, settings: Settings, storage: Storage
) -> dict[str, Any]:
    """What the reply says of the video. Raises TooLargeFault (base64) or StorageFault (S3)."""
    size = video.stat().st_size
    if destination is None:
        if size > settings.max_result_bytes:
            msg = f"the video has {size} bytes; at most {settings.max_result_bytes} are returned as base64"
            raise TooLargeFault("too_large.result", msg, field="output.format")
        return {"video_base64": base64.b64encode(video.read_bytes()).decode(), "bytes": size}
    bucket, key = destination.bucket, destination.key
    storage.put(video, bucket, key, content_type="video/mp4", field="output")
    url = storage.presign(bucket, key, expires_s=destination.expires_s, field="output")
    return {
        "video_url": url,
        "s3": {"bucket": bucket, "key": key},
        "expires_s": destination.expires_s,
        "bytes": size,
    }
