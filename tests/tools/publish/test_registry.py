"""The registry client against a real registry, directly and through a proxy that makes faults."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import httpx
import pytest
from publish_samples import proxy, push_image

from mtbuild.digest import Digest
from mtbuild.errors import InputError
from mtbuild.publish.registry import Descriptor, Manifest, Repository
from mtbuild.publish.transport import (
    NotInRegistryError,
    RegistryError,
    RegistryUnavailableError,
    Transport,
    is_loopback,
)

if TYPE_CHECKING:
    from pathlib import Path


def through(host: str, name: str) -> Repository:
    """The same repository by way of a proxy."""
    path = name.partition("/")[2]
    return Repository(Transport(host, pause_s=0.01), path)


def test_a_manifest_comes_back_byte_for_byte(staging: Repository) -> None:
    manifest = push_image(staging)
    url = f"http://{staging.transport.host}/v2/{staging.path}/manifests/{manifest.digest}"
    body = httpx.get(url, headers={"Accept": manifest.media_type}).content
    assert body == manifest.body  # a second client sees the very bytes, odd white space and all
    assert staging.manifest(manifest.digest) == manifest
    assert json.loads(body)["layers"][0]["digest"] == str(manifest.blobs[1].digest)


def test_a_copy_within_a_registry_is_mounted_and_keeps_its_digest(
    staging: Repository, release: Repository
) -> None:
    manifest = push_image(staging)
    for blob in manifest.blobs:
        assert not release.has_blob(blob.digest)
        release.copy_blob(staging, blob)
    release.put_manifest(manifest, tag="a-tag")
    assert release.manifest("a-tag").body == manifest.body


def test_a_mount_needs_no_upload(registry: str, names: tuple[str, str]) -> None:
    with proxy(registry) as (host, faults):
        near = Transport(host, pause_s=0.01)
        one, other = (Repository(near, name.partition("/")[2]) for name in names)
        blob = one.put_blob(b"x" * 1000, media_type="a/b")
        faults.requests.clear()
        other.copy_blob(one, blob)
    assert [r.split()[0] for r in faults.requests] == ["HEAD", "POST"]
    assert f"from={one.path}" in faults.requests[1]


def test_between_registries_a_blob_is_streamed(registry: str, names: tuple[str, str]) -> None:
    with proxy(registry) as (host, _):  # another host:port, so another registry to the client
        one, other = through(host, names[0]), Repository.open(names[1])
        data = bytes(range(256)) * 20_000  # more than one chunk
        blob = one.put_blob(data, media_type="a/b")
        other.copy_blob(one, blob)
        assert other.blob(blob.digest) == data


def test_bytes_that_changed_on_the_way_are_refused(registry: str, names: tuple[str, str]) -> None:
    with proxy(registry) as (host, faults):
        bent, straight = through(host, names[0]), Repository.open(names[1])
        manifest = push_image(bent)
        faults.rewrite = lambda _, body: (
            body.replace(b"zstd", b"gzip") if b"zstd" in body else b"?" + body[1:]
        )
        with pytest.raises(RegistryError, match="other bytes"):
            bent.manifest(manifest.digest)
        with pytest.raises(RegistryError, match="other bytes"):
            bent.blob(manifest.blobs[1].digest)
        with pytest.raises(RegistryError, match="other bytes"):
            straight.copy_blob(bent, manifest.blobs[1])
        assert not straight.has_blob(manifest.blobs[1].digest)


def test_what_may_pass_is_tried_again(registry: str, names: tuple[str, str]) -> None:
    with proxy(registry) as (host, faults):
        repository = through(host, names[0])
        faults.statuses = [503, 429, 502]
        assert repository.put_blob(b"data", media_type="a/b").size == 4
        assert repository.blob(Digest.of(b"data")) == b"data"


def test_what_is_not_there_is_asked_for_once(registry: str, names: tuple[str, str]) -> None:
    with proxy(registry) as (host, faults):
        repository = through(host, names[0])
        missing = Digest.of(b"nowhere")
        assert repository.find_manifest(missing) is None
        assert not repository.has_blob(missing)
        assert repository.tags() == ()
        assert len(faults.requests) == 3
        with pytest.raises(NotInRegistryError) as caught:
            repository.manifest(missing)
        assert caught.value.exit_code == 2
        assert str(missing) in caught.value.message


def test_a_registry_that_is_away_is_one_clear_error() -> None:
    repository = Repository(Transport("127.0.0.1:9", pause_s=0.001), "any/where")
    with pytest.raises(RegistryUnavailableError) as caught:
        repository.find_manifest("tag")
    assert caught.value.exit_code == 3
    assert "127.0.0.1:9 does not answer" in caught.value.message
    assert "tried 4 times" in caught.value.message


def test_a_registry_that_keeps_failing_is_given_up(registry: str, names: tuple[str, str]) -> None:
    with proxy(registry) as (host, faults):
        faults.statuses = [503] * 50
        with pytest.raises(RegistryUnavailableError, match="status 503"):
            through(host, names[0]).find_manifest("tag")
        assert len(faults.requests) == 4


def test_tags_come_in_pages(registry: str, names: tuple[str, str]) -> None:
    with proxy(registry) as (host, faults):
        repository = through(host, names[0])
        manifest = push_image(repository)
        for number in range(5):
            repository.put_manifest(manifest, tag=f"t{number}")
        faults.page = 2
        faults.requests.clear()
        assert repository.tags() == (f"bld-{manifest.digest.short}", "t0", "t1", "t2", "t3", "t4")
        assert len(faults.requests) == 3


@pytest.mark.parametrize(
    "name", ["localhost/x:tag", "127.0.0.1:5000", f"a.b/c@sha256:{'0' * 64}", "nohost", "a.b/C"]
)
def test_a_repository_is_named_without_tag_and_digest(name: str) -> None:
    with pytest.raises(InputError, match="is not a repository"):
        Repository.open(name)


@pytest.mark.parametrize("tag", ["", "-x", "a b", "x" * 129, "a/b"])
def test_what_is_no_tag_is_refused_before_any_request(staging: Repository, tag: str) -> None:
    with pytest.raises(InputError, match="is not a tag"):
        staging.find_manifest(tag)


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1:5000", True),
        ("127.9.9.9", True),
        ("localhost:1", True),
        ("[::1]:5000", True),
        ("localhost.example.org", False),
        ("127.0.0.1.example.org", False),
        ("10.0.0.1:5000", False),
        ("ghcr.io", False),
    ],
)
def test_plain_http_is_for_loopback_only(host: str, local: bool) -> None:
    assert is_loopback(host) is local
    with Transport(host) as transport:
        assert transport.base.scheme == ("http" if local else "https")


def test_a_descriptor_keeps_what_it_read() -> None:
    data = {
        "mediaType": "a/b",
        "digest": str(Digest.of(b"x")),
        "size": 1,
        "artifactType": "c/d",
        "annotations": {"k": "v"},
    }
    assert Descriptor.from_json(data).to_json() == data


def test_an_index_lists_children_and_no_blobs(staging: Repository, tmp_path: Path) -> None:
    child = push_image(staging)
    media_type = "application/vnd.oci.image.index.v1+json"
    body = json.dumps(
        {"schemaVersion": 2, "mediaType": media_type, "manifests": [child.descriptor.to_json()]}
    )
    index = Manifest(body=body.encode(), media_type=media_type)
    staging.put_manifest(index)
    served = staging.manifest(index.digest)
    assert served.is_index
    assert served.blobs == ()
    assert [part.digest for part in served.children] == [child.digest]
