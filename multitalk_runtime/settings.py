"""What this worker's operator allows and limits, from the environment and from nowhere else.

A job can name buckets, paths and addresses; only what stands here is used. The worker's rights are not the
caller's, so nothing is allowed by default but public web addresses.

| variable | default | meaning |
|---|---|---|
| `MODEL_PATH` | `/models`, else `/runpod-volume/models` | folder of the models (or set the three below) |
| `MT_WAN_DIR`, `MT_MULTITALK_DIR`, `MT_WAV2VEC_DIR` | under `MODEL_PATH` | the models one by one |
| `MT_LORA` | | LoRA files with scales, `file[:scale],…`, merged at start; quality `turbo` needs one |
| `MT_QUALITY` | `exact` | of jobs that name none, and whether linears are loaded for fp8 (`fast`) |
| `MT_DEVICE` | the GPU, or the CPU | where the models run, as torch names it |
| `MT_ATTENTION` | the quality's | attention backend |
| `MT_OFFLOAD` | `true` | models wait in RAM where the GPU has no room for all |
| `MT_S3_BUCKETS` | `AWS_S3_BUCKET_NAME` | `bucket` or `bucket/prefix` that jobs may use, comma-separated |
| `AWS_S3_BUCKET_NAME` | | bucket of keys without one, and of results |
| `MT_S3_OUTPUT_PREFIX` | `results/` | where results go in that bucket |
| `BUCKET_ENDPOINT_URL` | AWS's | the storage's address |
| `AWS_REGION` | boto3's | |
| `MT_VOLUMES` | | folders whose files jobs may read, comma-separated |
| `MT_ALLOW_ADDRESSES` | | private networks that URLs may lead to, as CIDR, comma-separated |
| `MT_MAX_IMAGE_BYTES`, `MT_MAX_AUDIO_BYTES` | 32 MiB, 256 MiB | of one input |
| `MT_MAX_PIXELS` | 64 million | of the image, before decoding |
| `MT_MAX_AUDIO_S` | 600 | seconds of one track |
| `MT_MAX_RESULT_BYTES` | 16 MiB | of a video returned as base64 |
| `MT_FETCH_S` | 60 | time for one download, seconds |
| `MT_JOB_S` | 7200 | time for one job, seconds |
| `MT_TOKEN` | | bearer token of `serve`; without one it binds to loopback only |
| `MT_MAX_BODY_BYTES` | 48 MiB | of one request to `serve` |
| `MT_STATE_DIR` | `/tmp/multitalk` | where `serve` keeps its queue and its results |
| `MT_QUEUE` | 16 | jobs that may wait in `serve` |
| `MT_RESULT_TTL_S` | 3600 | how long `serve` keeps a finished job, seconds |
| `MT_RESULT_QUOTA_BYTES` | 4 GiB | of all results that `serve` keeps |
| `MT_DRAIN_S` | 600 | how long a running job may still take after SIGTERM, seconds |
"""

from __future__ import annotations

import ipaddress
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from wan.quality import QUALITIES

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Lora", "Settings", "SettingsError"]

VOLUME_MODELS = Path("/runpod-volume/models")
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class SettingsError(Exception):
    """Raised for an environment variable that can't be used; names it."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA file and the scale that it is merged with."""

    file: Path
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The environment, read once. Sizes in bytes, times in seconds."""

    model_path: Path = Path("/models")
    wan_dir: Path | None = None
    multitalk_dir: Path | None = None
    wav2vec_dir: Path | None = None
    loras: tuple[Lora, ...] = ()
    device: str | None = None
    quality: str = "exact"
    attention: str | None = None
    offload: bool = True
    s3_allowed: tuple[str, ...] = ()  # "bucket" or "bucket/prefix"
    s3_bucket: str | None = None
    s3_output_prefix: str = "results/"
    s3_endpoint: str | None = None
    s3_region: str | None = None
    volumes: tuple[Path, ...] = ()
    allow_addresses: tuple[Network, ...] = ()
    max_image_bytes: int = 32 << 20
    max_audio_bytes: int = 256 << 20
    max_pixels: int = 64_000_000
    max_audio_s: float = 600.0
    max_result_bytes: int = 16 << 20
    fetch_s: float = 60.0
    job_s: float = 7200.0
    token: str | None = field(default=None, repr=False)
    max_body_bytes: int = 48 << 20
    state_dir: Path = Path(tempfile.gettempdir()) / "multitalk"
    queue: int = 16
    result_ttl_s: float = 3600.0
    result_quota_bytes: int = 4 << 30
    drain_s: float = 600.0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Read `os.environ` (or the mapping given); an empty variable counts as not set."""
        given = {
            key: value.strip()
            for key, value in (os.environ if environment is None else environment).items()
            if value.strip()
        }
        bucket = given.get("AWS_S3_BUCKET_NAME")
        default = cls()
        return cls(
            model_path=Path(given.get("MODEL_PATH", _model_path(default.model_path))),
            wan_dir=_path(given, "MT_WAN_DIR"),
            multitalk_dir=_path(given, "MT_MULTITALK_DIR"),
            wav2vec_dir=_path(given, "MT_WAV2VEC_DIR"),
            loras=tuple(_lora(item) for item in _items(given, "MT_LORA")),
            device=given.get("MT_DEVICE"),
            quality=_quality(given),
            attention=given.get("MT_ATTENTION"),
            offload=_switch(given, "MT_OFFLOAD", default.offload),
            s3_allowed=tuple(_items(given, "MT_S3_BUCKETS")) or ((bucket,) if bucket else ()),
            s3_bucket=bucket,
            s3_output_prefix=given.get("MT_S3_OUTPUT_PREFIX", default.s3_output_prefix),
            s3_endpoint=_endpoint(given),
            s3_region=given.get("AWS_REGION") or given.get("AWS_DEFAULT_REGION"),
            volumes=tuple(Path(item) for item in _items(given, "MT_VOLUMES")),
            allow_addresses=tuple(_network(item) for item in _items(given, "MT_ALLOW_ADDRESSES")),
            max_image_bytes=int(_number(given, "MT_MAX_IMAGE_BYTES", default.max_image_bytes)),
            max_audio_bytes=int(_number(given, "MT_MAX_AUDIO_BYTES", default.max_audio_bytes)),
            max_pixels=int(_number(given, "MT_MAX_PIXELS", default.max_pixels)),
            max_audio_s=_number(given, "MT_MAX_AUDIO_S", default.max_audio_s),
            max_result_bytes=int(_number(given, "MT_MAX_RESULT_BYTES", default.max_result_bytes)),
            fetch_s=_number(given, "MT_FETCH_S", default.fetch_s),
            job_s=_number(given, "MT_JOB_S", default.job_s),
            token=given.get("MT_TOKEN"),
            max_body_bytes=int(_number(given, "MT_MAX_BODY_BYTES", default.max_body_bytes)),
            state_dir=Path(given.get("MT_STATE_DIR", default.state_dir)),
            queue=int(_number(given, "MT_QUEUE", default.queue)),
            result_ttl_s=_number(given, "MT_RESULT_TTL_S", default.result_ttl_s),
            result_quota_bytes=int(_number(given, "MT_RESULT_QUOTA_BYTES", default.result_quota_bytes)),
            drain_s=_number(given, "MT_DRAIN_S", default.drain_s),
        )


def _model_path(usual: Path) -> Path:
    """Where the models are if nothing says so: the V7x images looked on RunPod's network volume."""
    return VOLUME_MODELS if not usual.is_dir() and VOLUME_MODELS.is_dir() else usual


def _items(given: Mapping[str, str], key: str) -> list[str]:
    return [item.strip() for item in given.get(key, "").split(",") if item.strip()]


def _path(given: Mapping[str, str], key: str) -> Path | None:
    return Path(given[key]) if key in given else None


def _number(given: Mapping[str, str], key: str, default: float) -> float:
    if key not in given:
        return default
    try:
        value = float(given[key])
    except ValueError:
        value = -1
    if not 0 < value < float("inf"):
        msg = f"{key}={given[key]!r} is not a positive number"
        raise SettingsError(msg)
    return value


def _switch(given: Mapping[str, str], key: str, default: bool) -> bool:
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if key not in given:
        return default
    if given[key].lower() not in words:
        msg = f"{key}={given[key]!r} is neither true nor false"
        raise SettingsError(msg)
    return words[given[key].lower()]


def _quality(given: Mapping[str, str]) -> str:
    name = given.get("MT_QUALITY", "exact")
    if name not in QUALITIES:
        msg = f"MT_QUALITY={name!r} is not one of {', '.join(QUALITIES)}"
        raise SettingsError(msg)
    return name


def _endpoint(given: Mapping[str, str]) -> str | None:
    text = given.get("BUCKET_ENDPOINT_URL")
    if text is not None and not text.startswith(("http://", "https://")):
        msg = "BUCKET_ENDPOINT_URL is not an http or https address; leave it empty for AWS"
        raise SettingsError(msg)
    return text


def _network(text: str) -> Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        msg = f"MT_ALLOW_ADDRESSES: {error}"
        raise SettingsError(msg) from error


def _lora(text: str) -> Lora:
    file, colon, scale = text.rpartition(":")
    if not colon:
        return Lora(file=Path(text))
    try:
        return Lora(file=Path(file), scale=float(scale))
    except ValueError as error:
        msg = f"MT_LORA: {text!r} is not FILE[:SCALE]"
        raise SettingsError(msg) from error
