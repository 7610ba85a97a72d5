"""What the wheels themselves say, read in kilobytes and kept by wheel hash.

The ladder: PEP 658 metadata (asked for even where the page doesn't advertise it), then HTTP Range into the
zip, then the whole wheel, its size announced. Facts about a published wheel never change, so they are kept.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import threading
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.utils import canonicalize_name, parse_wheel_filename

from mtbuild.errors import InfrastructureError
from mtbuild.plan.index import write_atomically
from mtbuild.plan.members import CppLib, FlashWindow
from mtbuild.plan.once import Once
from mtbuild.plan.select import choose
from mtbuild.plan.tags import Target

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mtbuild.plan.archive import Archive
    from mtbuild.plan.index import Index, Link

__all__ = ["CppLib", "FlashWindow", "Metadata", "WheelFacts", "Wheels"]

_SCHEMA = 2  # of the cache files; a change makes old ones unread


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """The two fields of METADATA that decide. `requires_dist`: the lines, without "Requires-Dist: "."""

    requires_dist: tuple[str, ...]
    requires_python: str | None


@dataclass(frozen=True, kw_only=True)
class WheelFacts:
    """What the rules need of one wheel. Sizes in bytes; what wasn't read or isn't there is None or ()."""

    filename: str
    name: str  # canonical
    version: str
    build: str  # wheel build number, "" for none
    sha256: str
    size: int
    tags: tuple[str, ...]  # expanded: "cp311-cp311-manylinux_2_28_x86_64"
    requires_dist: tuple[str, ...]  # the metadata's lines, without "Requires-Dist: "
    requires_python: str | None
    unpacked_size: int | None = None
    empty: bool = False  # beside its metadata it holds nothing, or empty files only
    local_version: str | None = None  # torch: "2.7.1+cu126"
    cuda: str | None = None  # torch: "12.6"
    cpp_lib: CppLib | None = None  # xformers
    needed_cudart: tuple[tuple[str, str], ...] = ()  # (member, "libcudart.so.12")
    sass: tuple[str, ...] = ()  # torch: compute capabilities with machine code, "8.0"
    sass_source: str = ""
    attention: tuple[str, ...] = ()  # aten schemas: what torch offers, what xformers accepts
    flash_window: FlashWindow | None = None  # xformers


class Wheels:
    """Reads facts through an index, cached under `cache` by sha256. Thread-safe; each wheel is read once.

    `bytes` counts what came over the network, `read` the wheels that weren't in the cache.
    """

    def __init__(self, index: Index, cache: Path, note: Callable[[str], None] | None = None) -> None:
        self.index = index
        index.keep_pages_in(cache)
        self._cache = cache
        self._note = note or (lambda text: None)
        self._lock = threading.Lock()
        self._once = Once()
        self.read = 0

    @property
    def bytes(self) -> int:
        """Bytes received so far."""
        return self.index.bytes

    def facts(self, project: str, version: str, *, python: str, platform: str, glibc: str) -> WheelFacts:
        """Of the wheel that an installer would take for this Python, platform and C library.

        Raises InputError where the index has no such version or no wheel of it that fits.
        """
        target = Target(python=python, platform=platform, glibc=glibc)
        return self.of(choose(self.index, project, version, target).or_raise(target))

    def of(self, link: Link) -> WheelFacts:
        """Everything, of one file."""
        return self._once(("facts", link.url), lambda: self._facts(link))

    def metadata(self, link: Link) -> Metadata:
        """METADATA only: a kilobyte or two."""
        return self._once(("metadata", link.url), lambda: self._metadata(link))

    def _facts(self, link: Link) -> WheelFacts:
        kept = self._kept(link, "facts")
        if kept is not None:
            return _from_json(kept)
        with self._lock:
            self.read += 1
        early = self._pep658(link)
        with self._archive(link) as (archive, size):
            from mtbuild.plan.reading import read_wheel

            facts = read_wheel(link, archive, size, early or _metadata_of(archive, link))
        self._keep(link, "facts", asdict(facts))
        return facts

    def _metadata(self, link: Link) -> Metadata:
        kept = self._kept(link, "metadata") or self._kept(link, "facts")
        if kept is not None:
            return Metadata(
                requires_dist=tuple(kept["requires_dist"]), requires_python=kept["requires_python"]
            )
        found = self._pep658(link)
        if found is None:
            with self._archive(link) as (archive, _):
                found = _metadata_of(archive, link)
        self._keep(link, "metadata", asdict(found))
        return found

    def _pep658(self, link: Link) -> Metadata | None:
        """First rung. A server without it may answer anything, so the body must look like METADATA."""
        try:
            answer = self.index.fetcher.get(f"{link.url}.metadata")
        except InfrastructureError:
            return None
        if answer.status != 200 or not answer.content.lstrip().startswith(b"Metadata-Version:"):
            return None
        if link.metadata_sha256 and hashlib.sha256(answer.content).hexdigest() != link.metadata_sha256:
            self._note(
                f"{link.filename}.metadata has another hash than the index says; reading the wheel instead"
            )
            return None
        return _parse_metadata(answer.content)

    @contextmanager
    def _archive(self, link: Link) -> Iterator[tuple[Archive, int]]:
        """Second and third rung."""
        from mtbuild.plan.archive import LocalArchive, RemoteArchive
        from mtbuild.plan.fetch import NoRanges

        try:
            remote = RemoteArchive(self.index.fetcher, link.url, size=link.size)
        except NoRanges:
            pass
        else:
            yield remote, remote.size
            return
        size = f"{link.size / 1e6:,.1f} MB" if link.size else "of a size that the index doesn't say"
        self._note(f"{link.filename}: the index serves no byte ranges, so the whole wheel is read ({size})")
        self._cache.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=self._cache, prefix=".whole-"))
        try:
            path = folder / "wheel"
            self.index.fetcher.download(link.url, path, lambda done: None)
            _check(path, link)
            local = LocalArchive(path)
            yield local, path.stat().st_size
            local.close()
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _file(self, link: Link, kind: str) -> Path | None:
        # Without a hash a file may be replaced behind its name, so nothing is kept of it.
        return self._cache / kind / f"{link.sha256}.json" if link.sha256 else None

    def _kept(self, link: Link, kind: str) -> dict[str, Any] | None:
        path = self._file(link, kind)
        if path is None:
            return None
        try:
            data: dict[str, Any] = json.loads(path.read_bytes())
        except (OSError, ValueError):
            return None
        return data["facts"] if data.get("schema") == _SCHEMA else None

    def _keep(self, link: Link, kind: str, facts: dict[str, Any]) -> None:
        path = self._file(link, kind)
        if path is not None:
            write_atomically(path, json.dumps({"schema": _SCHEMA, "facts": facts}).encode())


def facts_from_json(data: dict[str, Any]) -> WheelFacts:
    """The inverse of `dataclasses.asdict`, through JSON."""
    return _from_json(data)


def _from_json(data: dict[str, Any]) -> WheelFacts:
    data = dict(data)
    for key in ("tags", "requires_dist", "sass", "attention"):
        data[key] = tuple(data[key])
    data["needed_cudart"] = tuple((member, soname) for member, soname in data["needed_cudart"])
    data["cpp_lib"] = CppLib(**data["cpp_lib"]) if data["cpp_lib"] else None
    data["flash_window"] = FlashWindow(**data["flash_window"]) if data["flash_window"] else None
    return WheelFacts(**data)


def _parse_metadata(content: bytes) -> Metadata:
    from packaging.metadata import parse_email

    raw, _ = parse_email(content)  # torch 2.1.2's fails strict validation, so the raw fields
    return Metadata(
        requires_dist=tuple(raw.get("requires_dist", ())), requires_python=raw.get("requires_python")
    )


def _metadata_of(archive: Archive, link: Link) -> Metadata:
    for member in archive.members:
        folder, _, name = member.filename.partition("/")
        if name == "METADATA" and folder.endswith(".dist-info"):
            return _parse_metadata(archive.read(member.filename))
    msg = f"{link.filename} has no METADATA: it is no wheel"
    raise InfrastructureError(msg, fix="check the index; the file is damaged")


def _check(path: Path, link: Link) -> None:
    if link.sha256 is None:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != link.sha256:
        msg = f"{link.filename} has sha256 {found}, but the index says {link.sha256}"
        raise InfrastructureError(
            msg, fix="try again; if it stays so, the index or a proxy before it is damaged"
        )


def identity(link: Link) -> tuple[str, str, str, tuple[str, ...]]:
    """(canonical name, version, build number, expanded tags) of a wheel's file name."""
    name, version, build, tags = parse_wheel_filename(link.filename)
    number = f"{build[0]}{build[1]}" if build else ""
    return canonicalize_name(name), str(version), number, tuple(sorted(str(tag) for tag in tags))
