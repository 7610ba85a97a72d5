"""Where a video goes: S3 or base64, decided before the work, and never a path on the worker."""

from __future__ import annotations

import base64
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest

from multitalk_runtime import outputs
from multitalk_runtime.errors import Fault
from multitalk_runtime.job import parse_job
from multitalk_runtime.settings import Settings
from multitalk_runtime.storage import Storage

if TYPE_CHECKING:
    from pathlib import Path


def plan(output: dict[str, Any], settings: Settings) -> outputs.Destination | None:
    return outputs.plan(parse_job({"output": output})[0], settings=settings, storage=Storage(settings))


def code(output: dict[str, Any], settings: Settings) -> tuple[str, str]:
    with pytest.raises(Fault) as raised:
        plan(output, settings)
    return raised.value.code, raised.value.field


@pytest.fixture
def video(tmp_path: Path) -> Path:
    path = tmp_path / "video.mp4"
    path.write_bytes(b"video" * 100)
    return path


def test_base64_is_the_default_and_bounded(video: Path) -> None:
    settings = Settings(s3_bucket="media")
    assert plan({}, settings) is None
    reply = outputs.deliver(video, None, settings=settings, storage=Storage(settings))
    assert base64.b64decode(reply["video_base64"]) == video.read_bytes()
    small = Settings(max_result_bytes=499)
    with pytest.raises(Fault) as raised:
        outputs.deliver(video, None, settings=small, storage=Storage(small))
    assert raised.value.code == "too_large.result"


def test_s3_gives_a_url_that_works_and_a_key_nobody_guesses(s3: Any, s3_server: str, video: Path) -> None:
    settings = Settings(s3_endpoint=s3_server, s3_bucket="media", s3_allowed=("media/in",))
    first, second = plan({"format": "s3"}, settings), plan({"format": "s3"}, settings)
    assert first and second
    assert first.bucket == "media"
    assert first.key.startswith("results/")
    assert first.key != second.key
    reply = outputs.deliver(video, first, settings=settings, storage=Storage(settings))
    with urllib.request.urlopen(reply["video_url"], timeout=10) as answer:
        assert answer.read() == video.read_bytes()
        assert answer.headers["Content-Type"] == "video/mp4"
    assert "video_base64" not in reply
    assert str(video.parent) not in str(reply)


def test_a_job_writes_only_where_the_operator_allows(s3: Any, s3_server: str) -> None:
    settings = Settings(s3_endpoint=s3_server, s3_bucket="media", s3_allowed=("media/out",))
    found = plan({"format": "s3", "key": "out/mine.mp4"}, settings)
    assert found == outputs.Destination(bucket="media", key="out/mine.mp4", expires_s=86_400)
    for key in ("in/mine.mp4", "out/../in/x.mp4", "/out/x", "out//x"):
        assert code({"format": "s3", "key": key}, settings) == ("forbidden.bucket", "output.key")
    assert code({"format": "s3", "bucket": "other"}, settings) == ("forbidden.bucket", "output.bucket")


def test_without_a_bucket_or_credentials_this_is_said_before_the_work(
    s3: Any, s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert code({"format": "s3"}, Settings()) == ("output.no_storage", "output.bucket")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    settings = Settings(s3_endpoint=s3_server, s3_bucket="media")
    assert code({"format": "s3"}, settings) == ("storage.credentials", "output")


def test_a_failing_storage_is_an_error_and_no_path(s3: Any, s3_server: str, video: Path) -> None:
    settings = Settings(s3_endpoint=s3_server, s3_bucket="gone", s3_allowed=("gone",))
    with pytest.raises(Fault) as raised:
        outputs.deliver(video, plan({"format": "s3"}, settings), settings=settings, storage=Storage(settings))
    assert raised.value.code == "storage.not_found"
    assert str(video) not in str(raised.value.to_json())
