"""Every way a job can end badly, as a structured error that a caller can act on.

A `Fault` has a stable `code`, the `field` of the job that it speaks of, a `message` that says what is wrong,
and a `hint` that says what to do. It never carries a stack trace, a path of the worker or a secret: what
went wrong inside is logged, the caller gets `internal`. `docs/runtime-errors.md` is the table of all codes,
made by `python -m multitalk_runtime.errors`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

__all__ = [
    "CODES",
    "AudioFault",
    "BusyFault",
    "CancelledFault",
    "CudaFault",
    "Fault",
    "FetchFault",
    "ForbiddenFault",
    "ImageFault",
    "InternalFault",
    "JobFault",
    "ModelFault",
    "OutputFault",
    "PersonsFault",
    "RequestFault",
    "StorageFault",
    "TooLargeFault",
]


@dataclass(frozen=True, kw_only=True)
class Code:
    """One code of the published table. `status` is the HTTP status that `serve` answers with."""

    code: str
    status: int
    meaning: str
    hint: str


class Fault(Exception):  # noqa: N818 - a fault is what the table, the docs and the replies call it
    """A job that can't be done, told to its caller. Subclasses group codes by what a caller can do."""

    codes: ClassVar[tuple[Code, ...]] = ()

    def __init__(self, code: str, message: str, *, field: str = "", hint: str = "") -> None:
        super().__init__(message)
        known = next((entry for entry in self.codes if entry.code == code), None)
        if known is None:
            msg = f"{type(self).__name__} has no code {code!r}"
            raise ValueError(msg)
        self.code = code
        self.message = _plain(message, 1000)
        self.field = _plain(field, 120)
        self.hint = hint or known.hint
        self.status = known.status

    def to_json(self) -> dict[str, Any]:
        """What the caller gets."""
        return {"code": self.code, "field": self.field, "message": self.message, "hint": self.hint}

    def __str__(self) -> str:
        where = f"{self.field}: " if self.field else ""
        return f"{where}{self.message} ({self.code})"


def _plain(text: str, length: int) -> str:
    """Of a length and kind that any reply can carry: callers choose the names of keys that are not known."""
    return text[:length].encode("utf-8", "replace").decode()


def _codes(status: int, *entries: tuple[str, str, str]) -> tuple[Code, ...]:
    return tuple(
        Code(code=code, status=status, meaning=meaning, hint=hint) for code, meaning, hint in entries
    )


class JobFault(Fault):
    """The job itself is not as its schema says."""

    codes = _codes(
        422,
        ("job.invalid", "a value is of the wrong type or out of range", "see the job's JSON schema"),
        ("job.unknown_key", "the job has a key that is not known", "remove it, or correct its name"),
        ("job.missing", "something that is needed is not there", "add it to the job"),
        ("job.conflict", "two keys of the job say different things", "keep one of them"),
        (
            "job.frame_num",
            "frame_num or motion_frame is not of the form 4n+1",
            "use 81 and 25, or others 4n+1",
        ),
        ("job.prompt_too_long", "the prompt has too many characters", "shorten it"),
        (
            "job.quality",
            "the quality needs something that is not here",
            "use a quality that the message says works",
        ),
        ("job.size", "the size is not one that the model has", "use multitalk-480 or multitalk-720"),
    )


class PersonsFault(Fault):
    """Speakers, their boxes or their tracks don't fit together."""

    codes = _codes(
        422,
        ("persons.count", "the model knows one or two speakers", "give one or two audio tracks"),
        (
            "persons.bbox",
            "a box is malformed or outside the image",
            "give [row_min, col_min, row_max, col_max]",
        ),
        ("persons.empty_mask", "a speaker's mask has no pixel", "make the box larger"),
        ("persons.overlap", "two speakers' masks overlap", "make the boxes disjoint"),
        ("persons.all_silent", "every track is silent", "give at least one track with sound"),
    )


class ForbiddenFault(Fault):
    """The job asks for something that this worker's operator has not allowed."""

    codes = _codes(
        403,
        ("forbidden.scheme", "only http and https URLs are fetched", "use an https URL"),
        ("forbidden.address", "the URL leads to a private or special address", "use a public address"),
        ("forbidden.bucket", "the bucket or prefix is not on the allowlist", "ask the operator to allow it"),
        ("forbidden.endpoint", "the storage endpoint is not on the allowlist", "leave it out"),
        ("forbidden.path", "the path is outside the allowed volumes", "use a path on an allowed volume"),
        ("forbidden.option", "this worker does not offer the option", "leave it out"),
    )


class FetchFault(Fault):
    """An input could not be brought here."""

    codes = _codes(
        422,
        ("fetch.unreachable", "the server can't be reached or its name not resolved", "check the URL"),
        ("fetch.status", "the server refused the request", "check that the URL is public and still valid"),
        ("fetch.redirects", "too many redirects, or one that leads nowhere", "use the final URL"),
        ("fetch.timeout", "the server was too slow", "try again, or use a faster server"),
        ("fetch.truncated", "fewer bytes came than were announced", "try again"),
        ("fetch.base64", "the text is not base64", "encode the file's bytes as base64"),
        ("fetch.not_found", "there is no such file", "check the path"),
    )


class TooLargeFault(Fault):
    """Something is over a limit."""

    codes = _codes(
        413,
        ("too_large.bytes", "the file has too many bytes", "send a smaller file"),
        ("too_large.pixels", "the image has too many pixels", "scale it down"),
        ("too_large.seconds", "the audio is too long", "cut it"),
        ("too_large.body", "the request has too many bytes", "pass URLs instead of base64"),
        ("too_large.result", "the video is too large to return as base64", "use output_format s3"),
    )


class ImageFault(Fault):
    """The image can't be used."""

    codes = _codes(
        422,
        ("image.not_image", "the content is not an image that is accepted", "send PNG, JPEG or WebP"),
        ("image.broken", "the image can't be decoded", "send an intact file"),
        ("image.too_small", "the image has too few pixels", "send a larger one"),
    )


class AudioFault(Fault):
    """An audio track can't be used."""

    codes = _codes(
        422,
        (
            "audio.not_audio",
            "the content is not audio that is accepted",
            "send WAV, MP3, FLAC, OGG, M4A or MP4",
        ),
        ("audio.broken", "the audio can't be decoded", "send an intact file"),
        ("audio.no_stream", "the file has no audio stream", "send a file with sound"),
        ("audio.too_short", "the audio is shorter than 0.4 seconds", "send more sound"),
    )


class StorageFault(Fault):
    """Object storage did not do what the job needs."""

    codes = _codes(
        502,
        ("storage.credentials", "the worker has no valid credentials for the bucket", "ask the operator"),
        ("storage.not_found", "there is no such object or bucket", "check bucket and key"),
        ("storage.unavailable", "the storage did not answer in time", "try again"),
        ("storage.checksum", "the bytes that came are not those that were stored", "try again"),
    )


class OutputFault(Fault):
    """The video was made but could not be delivered."""

    codes = _codes(
        502,
        ("output.no_storage", "output_format s3 needs a bucket, and the worker has none", "use base64"),
        ("output.encode", "the video could not be encoded", "try again"),
    )


class ModelFault(Fault):
    """The worker's models are not what they should be."""

    codes = _codes(
        503,
        (
            "model.missing",
            "a model file is missing",
            "run `mtmodels plan` and `mtmodels fetch` on the worker",
        ),
        ("model.invalid", "a model file is not what it should be", "run `mtmodels verify` on the worker"),
        ("model.memory", "the models don't fit into memory", "use a larger GPU, or offloading"),
    )


class CudaFault(Fault):
    """The GPU failed; the worker is refreshed."""

    codes = _codes(
        500,
        ("cuda.out_of_memory", "the GPU's memory was not enough", "use a smaller size or fewer frames"),
        ("cuda.error", "the GPU reported an error", "try again; the worker restarts"),
    )


class BusyFault(Fault):
    """The worker has too much to do."""

    codes = (
        *_codes(
            429,
            ("busy.queue", "the queue is full", "try again after the seconds in Retry-After"),
            ("busy.disk", "the disk quota for results is used up", "fetch and delete results, or try later"),
        ),
        *_codes(503, ("busy.draining", "the worker is shutting down", "try another worker, or later")),
    )


class CancelledFault(Fault):
    """The job was ended before it was done."""

    codes = _codes(
        409,
        ("cancelled.by_caller", "the caller cancelled the job", "submit it again"),
        ("cancelled.shutdown", "the worker is shutting down", "submit it again"),
        ("cancelled.timeout", "the job took longer than its limit", "use fewer steps or less audio"),
    )


class RequestFault(Fault):
    """A request to `serve` that never became a job, or asks for one that is not there."""

    codes = (
        *_codes(400, ("request.json", "the body is not JSON", "send one JSON object")),
        *_codes(400, ("request.host", "the request names another host", "use localhost")),
        *_codes(401, ("request.token", "the bearer token is missing or wrong", "send Authorization: Bearer")),
        *_codes(
            404,
            ("request.route", "there is nothing at this address", "see /docs"),
            ("request.job", "there is no such job, or its time to live is over", "submit it again"),
        ),
        *_codes(405, ("request.method", "this address does not take the method", "see /docs")),
        *_codes(408, ("request.timeout", "the body did not come in time", "send it again")),
        *_codes(409, ("request.unfinished", "the job has no result yet", "ask for its status first")),
        *_codes(415, ("request.media_type", "the body is not application/json", "set Content-Type")),
    )


class InternalFault(Fault):
    """Something that should not happen; the worker's log has the details under the job's id."""

    codes = _codes(
        500, ("internal", "an unexpected error", "try again; if it stays, tell the operator the job id")
    )


FAULTS: tuple[type[Fault], ...] = (
    JobFault,
    PersonsFault,
    ForbiddenFault,
    FetchFault,
    TooLargeFault,
    ImageFault,
    AudioFault,
    StorageFault,
    OutputFault,
    ModelFault,
    CudaFault,
    BusyFault,
    CancelledFault,
    RequestFault,
    InternalFault,
)
CODES: dict[str, Code] = {entry.code: entry for fault in FAULTS for entry in fault.codes}


def table() -> str:
    """All codes as Markdown, for docs/runtime-errors.md."""
    lines = [
        "# Errors of a job",
        "",
        "Every rejection is `{code, field, message, hint}`.",
        "This table is made by `python -m multitalk_runtime.errors`.",
        "",
        "| code | HTTP | what it means | what to do |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| `{entry.code}` | {entry.status} | {entry.meaning} | {entry.hint} |" for entry in CODES.values()
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")  # noqa: T201 - the command's whole purpose
