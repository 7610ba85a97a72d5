"""A bytes-exact OCI client: what was served is what is kept, compared by digest, and sent on.

A manifest is never parsed and written again on its way: its digest is the digest of its bytes, and
that digest is what was tested (promise 3). Follows the OCI distribution specification 1.1.
"""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from mtbuild.digest import Digest, Reference
from mtbuild.errors import InputError
from mtbuild.publish.transport import NotInRegistryError, RegistryError, Transport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import httpx

__all__ = ["Descriptor", "Manifest", "Repository", "same_registry"]

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
_ACCEPT = ", ".join((MANIFEST, INDEX, "application/vnd.docker.distribution.manifest.v2+json", _DOCKER_LIST))
_MANIFEST_LIMIT = 4 * 2**20  # the specification's own limit
_CHUNK = 2**20
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\Z")


@dataclass(frozen=True, kw_only=True)
class Descriptor:
    """What a manifest or index says of one of its parts. `size` in bytes."""

    media_type: str
    digest: Digest
    size: int
    artifact_type: str = ""
    annotations: tuple[tuple[str, str], ...] = ()

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        return cls(
            media_type=data["mediaType"],
            digest=Digest.parse(data["digest"]),
            size=int(data["size"]),
            artifact_type=data.get("artifactType", ""),
            annotations=tuple(sorted((data.get("annotations") or {}).items())),
        )

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            "mediaType": self.media_type,
            "digest": str(self.digest),
            "size": self.size,
        }
        if self.artifact_type:
            data["artifactType"] = self.artifact_type
        if self.annotations:
            data["annotations"] = dict(self.annotations)
        return data


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A manifest or index exactly as it was served: `body` is never changed."""

    body: bytes
    media_type: str

    @property
    def digest(self) -> Digest:
        return Digest.of(self.body)

    @property
    def data(self) -> dict[str, Any]:
        """Its JSON, for reading only; raises RegistryError if it is none."""
        try:
            data = json.loads(self.body)
        except ValueError as error:
            msg = f"manifest {self.digest} is not JSON: {error}"
            raise RegistryError(msg) from error
        if not isinstance(data, dict):
            msg = f"manifest {self.digest} is not a JSON object"
            raise RegistryError(msg)
        return data

    @property
    def is_index(self) -> bool:
        return self.media_type in (INDEX, _DOCKER_LIST)

    @property
    def descriptor(self) -> Descriptor:
        return Descriptor(media_type=self.media_type, digest=self.digest, size=len(self.body))

    @property
    def blobs(self) -> tuple[Descriptor, ...]:
        """Config and layers, in that order; none for an index."""
        if self.is_index:
            return ()
        return tuple(Descriptor.from_json(part) for part in [self.data["config"], *self.data["layers"]])

    @property
    def children(self) -> tuple[Descriptor, ...]:
        """The manifests that an index lists."""
        return tuple(Descriptor.from_json(part) for part in self.data.get("manifests", ()) if self.is_index)


class Repository:
    """One repository of one registry, by its transport. Made by `open`; several may share a transport."""

    def __init__(self, transport: Transport, path: str) -> None:
        self.transport = transport
        self.path = path
        self._pull = (f"repository:{path}:pull",)
        self._push = (f"repository:{path}:pull,push",)

    @classmethod
    def open(cls, name: str, *, transport: Transport | None = None) -> Self:
        """From `HOST[:PORT]/PATH`; raises InputError for a tag, a digest or no registry."""
        parsed = repository_name(name)
        return cls(transport or Transport(parsed.host), parsed.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.transport.close()

    @property
    def name(self) -> str:
        return f"{self.transport.host}/{self.path}"

    def reference(self, digest: Digest) -> Reference:
        return Reference(host=self.transport.host, path=self.path, digest=digest)

    # manifests

    def find_manifest(self, which: Digest | str) -> Manifest | None:
        """A manifest by digest or tag, None where there is none.

        Raises RegistryError if what is served under a digest has other bytes.
        """

        def get() -> Manifest | None:
            target = f"/v2/{self.path}/manifests/{which}"
            answer = self.transport.send(
                "GET", target, scopes=self._pull, accept=(200,), headers={"Accept": _ACCEPT}, stream=True
            )
            try:
                body = _read(answer, _MANIFEST_LIMIT, what=f"manifest {which}")
            finally:
                answer.close()
            media_type = answer.headers.get("Content-Type", "").partition(";")[0].strip()
            return Manifest(body=body, media_type=media_type)

        if isinstance(which, str):
            check_tag(which)
        try:
            manifest = self.transport.retried(f"reading {which}", get)
        except NotInRegistryError:
            return None
        if manifest is not None and isinstance(which, Digest) and manifest.digest != which:
            msg = f"{self.name} serves other bytes ({manifest.digest}) under {which}"
            raise RegistryError(msg, fix="don't use that registry's copy: something changed it on the way")
        return manifest

    def manifest(self, which: Digest | str) -> Manifest:
        """As `find_manifest`, but raises NotInRegistryError where there is none."""
        found = self.find_manifest(which)
        if found is None:
            mark = "@" if isinstance(which, Digest) else ":"
            msg = f"{self.name}{mark}{which} is not in the registry"
            raise NotInRegistryError(msg, fix="check the repository and the digest, or build the cell again")
        return found

    def put_manifest(self, manifest: Manifest, *, tag: str | None = None) -> bool:
        """Put exactly these bytes, by digest or under a tag, and read them back.

        Returns whether the registry itself registered the manifest's subject (`OCI-Subject`). Raises
        RegistryError if the registry took the bytes for another digest.
        """
        which = manifest.digest if tag is None else check_tag(tag)

        def put() -> httpx.Response:
            target = f"/v2/{self.path}/manifests/{which}"
            headers = {"Content-Type": manifest.media_type}
            return self.transport.send(
                "PUT", target, scopes=self._push, accept=(200, 201), headers=headers, content=manifest.body
            )

        answer = self.transport.retried(f"writing {which}", put)
        told = answer.headers.get("Docker-Content-Digest", str(manifest.digest))
        if told != str(manifest.digest):
            msg = f"{self.name} took manifest {manifest.digest} for {told}"
            raise RegistryError(msg, fix="use a registry that keeps manifests byte for byte")
        back = self.manifest(which)
        if back.body != manifest.body:
            msg = f"{self.name} serves {back.digest} where {manifest.digest} was just written ({which})"
            raise RegistryError(msg, fix="is something else writing there? run the same command again")
        return "OCI-Subject" in answer.headers

    def tags(self) -> tuple[str, ...]:
        """All tags, sorted; none where the repository does not exist yet."""
        target: str | httpx.URL | None = f"/v2/{self.path}/tags/list?n=1000"
        found: list[str] = []
        while target is not None:
            here = target
            try:
                answer = self.transport.retried(
                    "listing tags",
                    lambda: self.transport.send("GET", here, scopes=self._pull, accept=(200,)),  # noqa: B023
                )
            except NotInRegistryError:
                break
            found += answer.json().get("tags") or []
            target = _next_page(answer)
        return tuple(sorted(found))

    def referrers(self, digest: Digest) -> tuple[Descriptor, ...] | None:
        """What the registry's referrers API lists for a digest; None where it has no such API."""
        target: str | httpx.URL | None = f"/v2/{self.path}/referrers/{digest}"
        found: list[Descriptor] = []
        while target is not None:
            here = target
            answer = self.transport.retried(
                "listing referrers",
                lambda: self.transport.send("GET", here, scopes=self._pull, accept=(200, 400, 404, 405)),  # noqa: B023
            )
            if answer.status_code != 200 or not answer.headers.get("Content-Type", "").startswith(INDEX):
                return None
            found += [Descriptor.from_json(part) for part in answer.json().get("manifests") or ()]
            target = _next_page(answer)
        return tuple(found)

    # blobs

    def has_blob(self, digest: Digest) -> bool:
        def head() -> bool:
            target = f"/v2/{self.path}/blobs/{digest}"
            return self.transport.send("HEAD", target, scopes=self._pull, accept=(200,)).status_code == 200

        try:
            return self.transport.retried(f"looking for blob {digest.short}", head)
        except NotInRegistryError:
            return False

    def blob(self, digest: Digest, *, limit: int = 8 * 2**20) -> bytes:
        """A small blob's bytes, at most `limit`; raises RegistryError if they are others than its digest."""

        def get() -> bytes:
            with self._stream(digest) as parts:
                return _read(parts, limit, what=f"blob {digest}")

        data = self.transport.retried(f"reading blob {digest.short}", get)
        if Digest.of(data) != digest:
            msg = f"{self.name} serves other bytes ({Digest.of(data)}) under blob {digest}"
            raise RegistryError(msg, fix="don't use that registry's copy: something changed it on the way")
        return data

    def put_blob(self, data: bytes, *, media_type: str) -> Descriptor:
        """Store bytes, if they are not there yet."""
        descriptor = Descriptor(media_type=media_type, digest=Digest.of(data), size=len(data))
        if not self.has_blob(descriptor.digest):
            self._upload(descriptor, lambda: iter((data,)), mount=None)
        return descriptor

    def copy_blob(self, source: Repository, blob: Descriptor) -> None:
        """Bring a blob over from another repository: mounted within one registry, else streamed.

        At most one chunk is held in memory; the bytes are hashed on the way. Raises RegistryError if they
        are not the digest's.
        """
        if self.has_blob(blob.digest):
            return

        def content() -> Iterator[bytes]:
            taken = hashlib.sha256()
            with source._stream(blob.digest) as answer:
                for part in answer.iter_raw(_CHUNK):
                    taken.update(part)
                    yield part
            if taken.hexdigest() != blob.digest.hex:
                msg = f"{source.name} serves other bytes under blob {blob.digest}"
                raise RegistryError(msg, fix="don't use that registry's copy; build the cell again")

        self._upload(blob, content, mount=source.path if same_registry(self, source) else None)

    def _upload(self, blob: Descriptor, content: Callable[[], Iterator[bytes]], *, mount: str | None) -> None:
        def upload() -> None:
            target = f"/v2/{self.path}/blobs/uploads/"
            scopes: tuple[str, ...] = self._push
            if mount is not None:
                target += f"?mount={blob.digest}&from={mount}"
                scopes = (*self._push, f"repository:{mount}:pull")
            answer = self.transport.send("POST", target, scopes=scopes, accept=(201, 202))
            if answer.status_code == 201 and mount is not None:
                return
            place = self.transport.base.join(answer.headers["Location"])
            self.transport.send(
                "PUT",
                place.copy_merge_params({"digest": str(blob.digest)}),
                scopes=scopes,
                accept=(201,),
                headers={"Content-Type": "application/octet-stream", "Content-Length": str(blob.size)},
                content=content,
            )

        self.transport.retried(f"writing blob {blob.digest.short}", upload)

    @contextmanager
    def _stream(self, digest: Digest) -> Iterator[httpx.Response]:
        answer = self.transport.send(
            "GET",
            f"/v2/{self.path}/blobs/{digest}",
            scopes=self._pull,
            accept=(200,),
            headers={"Accept-Encoding": "identity"},  # its bytes, not a proxy's compression of them
            stream=True,
        )
        try:
            yield answer
        finally:
            answer.close()


def repository_name(name: str) -> Reference:
    """`HOST[:PORT]/PATH` in its parts (the digest is of nothing); InputError for anything else."""
    try:
        return Reference.parse(f"{name}@sha256:{'0' * 64}")
    except InputError as error:
        msg = f"{name!r} is not a repository"
        raise InputError(msg, fix="write HOST[:PORT]/REPOSITORY, without tag and digest") from error


def same_registry(one: Repository, other: Repository) -> bool:
    return one.transport.host == other.transport.host


def check_tag(tag: str) -> str:
    """The tag, if the specification allows it; raises InputError."""
    if not _TAG.match(tag):
        msg = f"{tag!r} is not a tag (letters, digits, '.', '_', '-'; at most 128)"
        raise InputError(msg, fix="shorten or correct the cell's versions or the alias in matrix.yaml")
    return tag


def _read(response: httpx.Response, limit: int, *, what: str) -> bytes:
    data = bytearray()
    for part in response.iter_bytes(_CHUNK):
        data += part
        if len(data) > limit:
            msg = f"{what} is larger than {limit} bytes"
            raise RegistryError(msg, fix="is this the right digest? nothing that big belongs there")
    return bytes(data)


def _next_page(answer: httpx.Response) -> httpx.URL | None:
    link = answer.links.get("next", {}).get("url")
    return answer.url.join(link) if link else None
