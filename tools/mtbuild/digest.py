"""Digests and references by digest: the only way an image is named between the acts.

`Reference` deliberately has no tag: a tag can't be passed where a digest is needed (promise 2).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from mtbuild.errors import InputError

__all__ = ["Digest", "Reference"]

_HEX = re.compile(r"[0-9a-f]{64}\Z")
_PART = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"  # a path component, by the OCI distribution spec
_REPOSITORY = re.compile(rf"{_PART}(?:/{_PART})*\Z")


@dataclass(frozen=True, order=True)
class Digest:
    """A sha256 digest of bytes. `hex` is 64 lower-case hex digits; anything else is an InputError."""

    hex: str

    def __post_init__(self) -> None:
        if not _HEX.match(self.hex):
            msg = f"{self.hex!r} is not a sha256 digest (64 lower-case hex digits)"
            raise InputError(msg, fix="pass the digest that `mtbuild build --json` printed")

    @classmethod
    def parse(cls, text: str) -> Digest:
        """From `sha256:<hex>`."""
        algorithm, _, digits = text.partition(":")
        if algorithm != "sha256":
            msg = f"{text!r} is not a digest of the form sha256:<64 hex digits>"
            raise InputError(msg, fix="pass the digest that `mtbuild build --json` printed")
        return cls(digits)

    @classmethod
    def of(cls, data: bytes) -> Digest:
        """Of these bytes."""
        return cls(hashlib.sha256(data).hexdigest())

    def __str__(self) -> str:
        return f"sha256:{self.hex}"

    @property
    def short(self) -> str:
        """The first 12 hex digits, for people."""
        return self.hex[:12]


@dataclass(frozen=True, order=True)
class Reference:
    """`host[:port]/path@sha256:…`. `host` is the registry, `path` the repository in it."""

    host: str
    path: str
    digest: Digest

    @classmethod
    def parse(cls, text: str) -> Reference:
        """From text; raises InputError for a tag, a missing digest or a missing registry."""
        name, at, digest = text.partition("@")
        if not at:
            msg = f"{text!r} names no digest: a tag can move between the test and the publication"
            raise InputError(msg, fix="pass NAME@sha256:…, as printed by `mtbuild build`")
        host, slash, path = name.partition("/")
        if not slash or not (("." in host) or (":" in host) or host == "localhost"):
            msg = f"{text!r} names no registry"
            raise InputError(msg, fix="write HOST[:PORT]/REPOSITORY@sha256:…")
        if not _REPOSITORY.match(path):
            tagged = ":" in path
            msg = f"{path!r} is not a repository name" + (" (it carries a tag)" if tagged else "")
            raise InputError(msg, fix="write HOST[:PORT]/REPOSITORY@sha256:… without a tag")
        return cls(host=host, path=path, digest=Digest.parse(digest))

    @property
    def repository(self) -> str:
        """`host/path`, without the digest."""
        return f"{self.host}/{self.path}"

    def __str__(self) -> str:
        return f"{self.repository}@{self.digest}"
