"""A job: what a caller may ask for, checked before anything is fetched or loaded.

`Job` is the one model of it; `docs/job.schema.json` is its JSON schema, made by
`python -m multitalk_runtime.job`. A raw job also may use the keys of the V7x images: `parse_job` translates
them and says so in its deprecations. What a job names (URLs, buckets, paths) is only checked for form here;
whether the worker may use it is decided by `inputs` and `outputs`, against the operator's settings.
"""

from __future__ import annotations

import base64
import json
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from multitalk_runtime.errors import JobFault, PersonsFault
from multitalk_runtime.sniff import media_kind

__all__ = ["Audio", "Deprecation", "Job", "Output", "S3Object", "Source", "json_schema", "parse_job"]

MAX_PROMPT = 4000  # characters; the text encoder reads 512 tokens
PERSONS = ("person1", "person2")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class S3Object(_Model):
    """An object in S3: `bucket` may be left out where the worker has a default."""

    key: str = Field(min_length=1, max_length=1024)
    bucket: str | None = Field(default=None, max_length=255)


class Source(_Model):
    """Where a file comes from: exactly one of `url`, `s3`, `base64`, `path`."""

    url: str | None = Field(default=None, max_length=4096)
    s3: S3Object | None = None
    base64: str | None = None
    path: str | None = Field(default=None, max_length=4096)

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: object) -> object:
        """`https://…`, `s3://bucket/key`, `data:…;base64,…` and a plain path are accepted as text."""
        if not isinstance(value, str):
            return value
        if value.startswith("s3://"):
            bucket, _, key = value.removeprefix("s3://").partition("/")
            return {"s3": {"bucket": bucket, "key": key}}
        if value.startswith("data:"):
            head, comma, body = value.partition(",")
            if not comma or not head.endswith(";base64"):
                msg = "a data URL must be base64"
                raise ValueError(msg)
            return {"base64": body}
        if "://" in value[:32]:
            return {"url": value}
        return {"path": value}

    @model_validator(mode="after")
    def _exactly_one(self) -> Source:
        given = [name for name in ("url", "s3", "base64", "path") if getattr(self, name) is not None]
        if len(given) != 1:
            msg = f"give exactly one of url, s3, base64, path (got {', '.join(given) or 'none'})"
            raise ValueError(msg)
        return self


class Audio(_Model):
    """One track for each speaker; `None` (or the text "None") is a silent one."""

    person1: Source | None = None
    person2: Source | None = None
    persons: Literal[1, 2] = 1

    @model_validator(mode="before")
    @classmethod
    def _count(cls, value: object) -> object:
        if isinstance(value, str):
            value = {"person1": value}
        if not isinstance(value, dict):
            return value
        tracks = {key: None if item == "None" else item for key, item in value.items()}
        tracks.setdefault("persons", 2 if "person2" in tracks else 1)
        return tracks


class Output(_Model):
    """How the video is returned: in the reply as base64, or in S3 with a presigned URL."""

    format: Literal["base64", "s3"] = "base64"
    bucket: str | None = Field(default=None, max_length=255)
    key: str | None = Field(default=None, max_length=1024)
    expires_s: int = Field(
        default=86_400, ge=60, le=604_800, description="life of the presigned URL, seconds"
    )


Box = Annotated[tuple[int, int, int, int], Field(description="[row_min, col_min, row_max, col_max], pixels")]


class Job(_Model):
    """A talking-person video from an image, one or two audio tracks and a prompt.

    Without `image` and `audio` the built-in ones are used. Guidance scales, shift and steps have the model's
    own defaults (`null`: what `quality` stands for, 5 and 4 if exact); `text_guide_scale` 1.0 saves a third
    of the work and is what distilled LoRAs want.
    """

    prompt: str = Field(default="A person is talking to the camera.", min_length=1)
    image: Source | None = None
    audio: Audio | None = None
    audio_type: Literal["para", "add"] = "para"
    bbox: dict[Literal["person1", "person2"], Box] | None = None
    size: Literal["multitalk-480", "multitalk-720"] = "multitalk-480"
    mode: Literal["clip", "streaming"] = "clip"
    frame_num: int = Field(default=81, ge=5, le=201, description="frames a clip, 4n+1, at 25 a second")
    motion_frame: int = Field(default=25, ge=1, le=77)
    sample_steps: int | None = Field(default=None, ge=1, le=100)
    sample_shift: float | None = Field(default=None, gt=0, le=100)
    text_guide_scale: float | None = Field(default=None, ge=0, le=30)
    audio_guide_scale: float | None = Field(default=None, ge=0, le=30)
    seed: int = Field(default=42, ge=-1, le=2**31 - 1, description="-1 draws one")
    use_teacache: bool = False
    teacache_thresh: float = Field(default=0.2, gt=0, le=1)
    use_apg: bool = False
    apg_momentum: float = Field(default=-0.75, ge=-1, le=1)
    apg_norm_threshold: float = Field(default=55.0, gt=0)
    color_correction_strength: float = Field(default=1.0, ge=0, le=1)
    quality: Literal["exact", "near", "fast", "turbo"] | None = Field(
        default=None,
        description="what a job may give up for speed, see docs/runtime.md; null: what the worker was started"
        " for (exact, unless its operator chose another). Other keys given beside it win.",
    )
    output: Output = Output()

    @field_validator("prompt")
    @classmethod
    def _bounded(cls, value: str) -> str:
        if len(value) > MAX_PROMPT:
            msg = f"the prompt has {len(value)} characters, at most {MAX_PROMPT} are read"
            raise JobFault("job.prompt_too_long", msg, field="prompt")
        return value

    @field_validator("frame_num", "motion_frame")
    @classmethod
    def _four_n_plus_one(cls, value: int, info: ValidationInfo) -> int:
        if value % 4 != 1:
            lower, name = value - (value - 1) % 4, str(info.field_name)
            msg = f"{name} {value} is not of the form 4n+1"
            raise JobFault("job.frame_num", msg, field=name, hint=f"use {lower} or {lower + 4}")
        return value

    @field_validator(
        "sample_shift", "text_guide_scale", "audio_guide_scale", "teacache_thresh", "apg_norm_threshold"
    )
    @classmethod
    def _finite(cls, value: float | None) -> float | None:
        if value is not None and not math.isfinite(value):
            msg = "must be a finite number"
            raise ValueError(msg)
        return value

    @model_validator(mode="after")
    def _fit_together(self) -> Job:
        if self.mode == "streaming" and self.motion_frame >= self.frame_num:
            msg = f"motion_frame {self.motion_frame} leaves nothing new in a clip of {self.frame_num} frames"
            raise JobFault("job.conflict", msg, field="motion_frame", hint="use 25")
        if self.audio is not None:
            tracks = [self.audio.person1, self.audio.person2][: self.audio.persons]
            if not any(tracks):
                msg = "every track is silent"
                raise PersonsFault("persons.all_silent", msg, field="audio")
        persons = self.audio.persons if self.audio else 1
        if self.bbox is not None:
            if persons == 1:
                msg = "boxes are for two speakers; this job has one"
                raise PersonsFault("persons.bbox", msg, field="bbox", hint="leave bbox out")
            if set(self.bbox) != set(PERSONS):
                msg = f"bbox names {', '.join(sorted(self.bbox))}"
                raise PersonsFault(
                    "persons.bbox", msg, field="bbox", hint="give a box for person1 and person2"
                )
            for person, (top, left, bottom, right) in self.bbox.items():
                if not (0 <= top < bottom and 0 <= left < right):
                    msg = f"[{top}, {left}, {bottom}, {right}] is not [row_min, col_min, row_max, col_max]"
                    raise PersonsFault("persons.bbox", msg, field=f"bbox.{person}")
        return self


@dataclass(frozen=True, kw_only=True)
class Deprecation:
    """A key of the V7x images that was used, and what to write instead."""

    key: str
    use: str

    def to_json(self) -> dict[str, str]:
        return {"key": self.key, "use": self.use}


# Keys of the V7x images → where their value goes now. First come, first taken within one group.
_OLD_AUDIO = ("audio_s3_key", "audio_file", "audio_1")
_OLD_IMAGE = ("image_s3_key", "image_file", "condition_image")


def parse_job(raw: object) -> tuple[Job, tuple[Deprecation, ...]]:
    """A checked job and the deprecated keys that it used. Raises JobFault or PersonsFault."""
    if not isinstance(raw, dict):
        msg = f"a job is a JSON object, not {type(raw).__name__}"
        raise JobFault("job.invalid", msg)
    translated, deprecations = _from_v7x(raw)
    try:
        return Job.model_validate(translated), deprecations
    except ValidationError as error:
        raise _fault(error) from None


def _from_v7x(raw: dict[str, Any]) -> tuple[dict[str, Any], tuple[Deprecation, ...]]:
    job = dict(raw)
    notes: list[Deprecation] = []

    def move(old: str, new: str, value: Any) -> None:
        key = new.partition(".")[0]
        if key in raw:
            msg = f"{old} and {key} say the same thing twice"
            raise JobFault("job.conflict", msg, field=old, hint=f"keep {key}")
        notes.append(Deprecation(key=old, use=new))
        if "." in new:
            job.setdefault(key, {})[new.partition(".")[2]] = value
        else:
            job[new] = value

    for group, new in ((_OLD_AUDIO, "audio.person1"), (_OLD_IMAGE, "image")):
        used = [key for key in group if key in raw]
        if len(used) > 1:
            msg = f"{used[0]} and {used[1]} say the same thing twice"
            raise JobFault("job.conflict", msg, field=used[1], hint=f"use {new} alone")
        for old in used:
            value = job.pop(old)
            move(old, new, {"s3": {"key": value}} if old.endswith("_s3_key") else _old_source(value))
    if "audio_2" in job:
        value = job.pop("audio_2")
        move("audio_2", "audio.person2", _old_source(value))
    if "turbo" in job:
        if _is_true("turbo", job.pop("turbo")):
            move("turbo", "quality", "turbo")
        else:
            notes.append(Deprecation(key="turbo", use="quality"))
    for old, new in (("output_format", "output.format"), ("sampling_steps", "sample_steps")):
        if old in job:
            value = job.pop(old)
            move(old, new, value)
    return job, tuple(notes)


def _is_true(key: str, value: object) -> bool:
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        raise JobFault("job.invalid", "this is neither true nor false", field=key) from None


def _old_source(value: object) -> object:
    """Bare base64 of a file that is recognised by its first bytes; the old images took it under these keys.

    A file name that happens to look like base64 is not one: it has no image's or sound's first bytes.
    """
    if isinstance(value, str) and len(value) >= 64 and "://" not in value[:32]:
        try:
            head = base64.b64decode("".join(value[:64].split())[:32], validate=True)
        except ValueError:
            return value
        if media_kind(head) is not None:
            return {"base64": value}
    return value


def _fault(error: ValidationError) -> JobFault:
    """The first problem, in a caller's words; nothing of what they sent is repeated but its name."""
    first = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(str(step) for step in first["loc"] if not str(step).startswith("function-"))
    if first["type"] == "extra_forbidden":
        return JobFault("job.unknown_key", "there is no such key", field=field)
    if first["type"] == "missing":
        return JobFault("job.missing", "this is needed", field=field)
    return JobFault("job.invalid", first["msg"].removeprefix("Value error, "), field=field)


def json_schema() -> dict[str, Any]:
    """The JSON schema of a job."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Job.model_json_schema()}


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2))  # noqa: T201 - the command's whole purpose
