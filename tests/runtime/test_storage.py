"""S3 against moto's server process, with a faulty proxy in between: what arrives is what was stored."""

from __future__ import annotations

import hashlib
import itertools
import os
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest

from multitalk_runtime.errors import Fault
from multitalk_runtime.settings import Settings
from multitalk_runtime.storage import PART, Storage, check_allowed

if TYPE_CHECKING:
    from pathlib import Path

DATA = os.urandom(3_000_000)


def storage(endpoint: str, **settings: Any) -> Storage:
    given: dict[str, Any] = {"s3_allowed": ("media",), "fetch_s": 20.0, **settings}
    return Storage(Settings(s3_endpoint=endpoint, **given), wait=lambda _: None)


def get(store: Storage, key: str, target: Path, max_bytes: int = 64 << 20) -> bytes:
    assert store.get("media", key, target, max_bytes=max_bytes, field="image") == target.stat().st_size
    return target.read_bytes()


def refused(
    store: Storage, key: str, target: Path, *, bucket: str = "media", max_bytes: int = 64 << 20
) -> str:
    with pytest.raises(Fault) as raised:
        store.get(bucket, key, target, max_bytes=max_bytes, field="image")
    assert raised.value.field == "image"
    assert not target.exists(), "a failed download left a file"
    return raised.value.code


def test_what_goes_up_comes_down(s3: Any, s3_server: str, tmp_path: Path) -> None:
    (tmp_path / "up").write_bytes(DATA)
    store = storage(s3_server)
    store.put(tmp_path / "up", "media", "out/video.mp4", content_type="video/mp4", field="output")
    head = s3.head_object(Bucket="media", Key="out/video.mp4")
    assert head["ContentType"] == "video/mp4"
    assert head["Metadata"] == {"mt-sha256": hashlib.sha256(DATA).hexdigest()}
    assert get(store, "out/video.mp4", tmp_path / "down") == DATA
    url = store.presign("media", "out/video.mp4", expires_s=60, field="output")
    assert "test-secret" not in url
    with urllib.request.urlopen(url, timeout=10) as answer:
        assert answer.read() == DATA


def test_a_large_file_goes_up_in_parts_and_an_object_of_parts_is_verified(
    s3: Any, s3_server: str, tmp_path: Path
) -> None:
    data = os.urandom(2 * PART + 12345)
    (tmp_path / "up").write_bytes(data)
    store = storage(s3_server)
    store.put(tmp_path / "up", "media", "big", content_type="video/mp4", field="output")
    assert s3.head_object(Bucket="media", Key="big")["ETag"].strip('"').endswith("-3")
    assert get(store, "big", tmp_path / "down") == data
    # Somebody else's upload in parts has no SHA-256 of ours.
    s3.upload_file(str(tmp_path / "up"), "media", "theirs")
    assert "-" in s3.head_object(Bucket="media", Key="theirs")["ETag"]
    assert get(store, "theirs", tmp_path / "down2") == data


def test_a_broken_download_goes_on_where_it_stopped(s3: Any, proxy: Any, tmp_path: Path) -> None:
    s3.put_object(Bucket="media", Key="a", Body=DATA)
    proxy.plan = [1_000_000, "reset", 700_000, "503"]
    assert get(storage(proxy.url), "a", tmp_path / "down") == DATA
    begins = list(dict.fromkeys(proxy.ranges))
    assert (begins[0], len(begins)) == (0, 3), "not resumed, or begun anew"
    assert 900_000 < begins[1] <= 1_000_000 < 1_600_000 < begins[2] <= 1_700_000
    assert sum(line.startswith("GET") for line in proxy.requests) == 5


def test_an_object_that_changes_while_it_is_read_is_not_mixed(s3: Any, proxy: Any, tmp_path: Path) -> None:
    s3.put_object(Bucket="media", Key="a", Body=DATA)

    def replace(_: float) -> None:  # between the break and the next try
        s3.put_object(Bucket="media", Key="a", Body=DATA[::-1])

    proxy.plan = [1_000_000]
    store = Storage(Settings(s3_endpoint=proxy.url, s3_allowed=("media",), fetch_s=20.0), wait=replace)
    with pytest.raises(Fault) as raised:
        store.get("media", "a", tmp_path / "x", max_bytes=64 << 20, field="image")
    assert raised.value.code == "storage.checksum"
    assert not (tmp_path / "x").exists()


def test_the_waits_between_tries_grow(s3: Any, proxy: Any, tmp_path: Path) -> None:
    s3.put_object(Bucket="media", Key="a", Body=DATA)
    waits: list[float] = []
    proxy.plan = [0] * 30  # an answer without a byte, each time
    store = Storage(Settings(s3_endpoint=proxy.url, s3_allowed=("media",), fetch_s=20.0), wait=waits.append)
    with pytest.raises(Fault) as raised:
        store.get("media", "a", tmp_path / "x", max_bytes=64 << 20, field="image")
    assert raised.value.code == "storage.unavailable"
    assert len(waits) >= 3
    assert all(later >= 2 * sooner for sooner, later in itertools.pairwise(waits)), waits


def test_bytes_that_came_wrong_are_fetched_again_and_then_refused(
    s3: Any, proxy: Any, tmp_path: Path
) -> None:
    s3.put_object(Bucket="media", Key="a", Body=DATA)
    proxy.plan = ["flip"]
    assert get(storage(proxy.url), "a", tmp_path / "down") == DATA
    proxy.plan = ["flip", "flip"]
    assert refused(storage(proxy.url), "a", tmp_path / "again") == "storage.checksum"
    # The same for what we stored ourselves (by its SHA-256), and for an object of parts (by its ETag).
    (tmp_path / "up").write_bytes(DATA)
    storage(proxy.url).put(tmp_path / "up", "media", "ours", content_type="video/mp4", field="output")
    (tmp_path / "large").write_bytes(DATA * 4)
    s3.upload_file(str(tmp_path / "large"), "media", "parts")
    for key in ("ours", "parts"):
        proxy.plan = ["flip", "flip"]
        assert refused(storage(proxy.url), key, tmp_path / "again") == "storage.checksum"


def test_an_upload_is_tried_again_and_a_damaged_one_is_not_taken(s3: Any, proxy: Any, tmp_path: Path) -> None:
    (tmp_path / "up").write_bytes(DATA)
    proxy.plan = ["reset", "503"]
    storage(proxy.url).put(tmp_path / "up", "media", "a", content_type="video/mp4", field="output")
    assert s3.get_object(Bucket="media", Key="a")["Body"].read() == DATA
    proxy.plan = ["mangle"]
    with pytest.raises(Fault) as raised:
        storage(proxy.url).put(tmp_path / "up", "media", "b", content_type="video/mp4", field="output")
    assert raised.value.code == "storage.checksum"


def test_a_part_that_breaks_off_goes_up_again(s3: Any, proxy: Any, tmp_path: Path) -> None:
    data = os.urandom(2 * PART + 5)
    (tmp_path / "up").write_bytes(data)
    proxy.plan = ["", "", "reset", "503"]  # the start and the first part are well
    storage(proxy.url).put(tmp_path / "up", "media", "a", content_type="video/mp4", field="output")
    assert s3.get_object(Bucket="media", Key="a")["Body"].read() == data
    assert not proxy.plan
    assert len([line for line in proxy.requests if "partNumber=2" in line]) == 3


def test_a_failed_upload_in_parts_leaves_nothing(s3: Any, proxy: Any, tmp_path: Path) -> None:
    (tmp_path / "up").write_bytes(os.urandom(2 * PART))
    proxy.plan = ["", "mangle"]  # the start of the upload is well, its first part is not
    with pytest.raises(Fault) as raised:
        storage(proxy.url).put(tmp_path / "up", "media", "a", content_type="video/mp4", field="output")
    assert raised.value.code == "storage.checksum"
    assert not s3.list_multipart_uploads(Bucket="media").get("Uploads")


def test_a_storage_that_never_answers_is_given_up(s3: Any, proxy: Any, tmp_path: Path) -> None:
    s3.put_object(Bucket="media", Key="a", Body=DATA)
    proxy.plan = ["reset"] * 200
    assert refused(storage(proxy.url), "a", tmp_path / "down") == "storage.unavailable"
    proxy.plan = ["stall"] * 200
    assert refused(storage(proxy.url, fetch_s=1.0), "a", tmp_path / "down") == "storage.unavailable"
    assert refused(storage("http://127.0.0.1:9"), "a", tmp_path / "down") == "storage.unavailable"


def test_what_is_not_there_too_large_or_not_allowed(s3: Any, s3_server: str, tmp_path: Path) -> None:
    s3.put_object(Bucket="media", Key="a", Body=DATA)
    s3.create_bucket(Bucket="other")
    store = storage(s3_server)
    assert refused(store, "missing", tmp_path / "x") == "storage.not_found"
    assert refused(store, "a", tmp_path / "x", max_bytes=100) == "too_large.bytes"
    assert refused(store, "a", tmp_path / "x", bucket="other") == "forbidden.bucket"
    assert refused(storage(s3_server, s3_allowed=("gone",)), "a", tmp_path / "x", bucket="gone") == (
        "storage.not_found"
    )


def test_without_credentials_this_is_said_early(
    s3: Any, s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(Fault) as raised:
        storage(s3_server).check_credentials(field="output")
    assert raised.value.code == "storage.credentials"
    assert refused(storage(s3_server), "a", tmp_path / "x") == "storage.credentials"
    monkeypatch.setenv("BUCKET_ACCESS_KEY_ID", "theirs")  # RunPod's pair does as well
    monkeypatch.setenv("BUCKET_SECRET_ACCESS_KEY", "secret")
    storage(s3_server).check_credentials(field="output")
    for name in ("BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    (tmp_path / "shared").write_text("[default]\naws_access_key_id = file\naws_secret_access_key = secret\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "shared"))  # and so does the usual file
    s3.put_object(Bucket="media", Key="a", Body=DATA)
    assert get(storage(s3_server), "a", tmp_path / "y") == DATA


@pytest.mark.parametrize(
    ("entry", "bucket", "key", "allowed"),
    [
        ("media", "media", "a/b", True),
        ("media/in", "media", "in/b", True),
        ("s3://media/in/", "media", "in/b", True),
        ("media/in", "media", "inner/b", False),
        ("media/in", "media", "in", False),
        ("media/in", "media", "out/b", False),
        ("media/in", "media", "in/../out/b", False),
        ("media/in", "media", "in/./b", False),
        ("media", "media", "/a", False),
        ("media", "media", "a//b", False),
        ("media", "media", "a\\b", False),
        ("media", "media", "a\nb", False),
        ("media", "media2", "a", False),
        ("", "media", "a", False),
    ],
)
def test_the_allowlist(entry: str, bucket: str, key: str, allowed: bool) -> None:
    settings = Settings(s3_allowed=(entry,) if entry else ())
    if allowed:
        check_allowed(bucket, key, settings=settings, field="image")
        return
    with pytest.raises(Fault) as raised:
        check_allowed(bucket, key, settings=settings, field="image")
    assert raised.value.code == "forbidden.bucket"
