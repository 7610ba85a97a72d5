"""Members of a wheel without the wheel: by HTTP Range its central directory and single files."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from typing import TYPE_CHECKING, Protocol

from mtbuild.errors import InfrastructureError
from mtbuild.plan.fetch import NoRanges

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mtbuild.plan.fetch import Fetcher

__all__ = ["Archive", "LocalArchive", "RemoteArchive"]

_TAIL = 32768  # holds the whole central directory of most wheels; torch's needs one more request
_LOCAL_HEADER = 30  # bytes, before name and extra field (APPNOTE.TXT 4.3.7)
_SLACK = 256  # for an extra field that the central directory doesn't tell


class Archive(Protocol):
    """What facts are read from."""

    @property
    def members(self) -> tuple[zipfile.ZipInfo, ...]: ...

    def read(self, name: str) -> bytes: ...

    def pieces(self, name: str) -> Iterator[bytes]: ...


class RemoteArchive:
    """A zip behind HTTP Range. Raises fetch.NoRanges where the server has none."""

    def __init__(self, fetcher: Fetcher, url: str, *, size: int | None = None) -> None:
        self._fetcher, self._url = fetcher, url
        try:
            tail = fetcher.range(url, -_TAIL, -1)
        except NoRanges:
            if size is None:
                raise
            # Some servers count from the start only; the page tells where the end is.
            tail = fetcher.range(url, max(0, size - _TAIL), size - 1)
        if tail.total is None:
            msg = f"a range of {url.rpartition('/')[2]} came without Content-Range"
            raise InfrastructureError(msg, fix="check the index; its answers break RFC 9110")
        self.size = tail.total
        try:
            with zipfile.ZipFile(_Growing(fetcher, url, tail.content, tail.total)) as file:
                self.members = tuple(file.infolist())
        except zipfile.BadZipFile as error:
            msg = f"{url.rpartition('/')[2]} is no wheel: {error}"
            raise InfrastructureError(msg, fix="check the index; the file is damaged") from error
        self._by_name = {member.filename: member for member in self.members}

    def read(self, name: str) -> bytes:
        """One member, whole."""
        return b"".join(self.pieces(name, first=self._by_name[name].compress_size + _SLACK))

    def pieces(self, name: str, first: int = 64 << 10) -> Iterator[bytes]:
        """One member, inflated piece by piece, so that a reader can stop before paying for all of it.

        `first` is the size in bytes of the first read; later ones double, up to 2 MiB.
        """
        member = self._by_name[name]
        start, size = member.header_offset, first
        end = start + _LOCAL_HEADER + len(name.encode()) + _SLACK + member.compress_size
        end = min(end, self.size) - 1
        data = self._range(start, min(start + _LOCAL_HEADER + len(name.encode()) + size, end + 1) - 1)
        at = start + len(data)
        names, extra = struct.unpack("<HH", data[26:30])
        data = data[_LOCAL_HEADER + names + extra :]
        left = member.compress_size
        inflate = zlib.decompressobj(-15) if member.compress_type == zipfile.ZIP_DEFLATED else None
        while True:
            data = data[:left]
            left -= len(data)
            yield inflate.decompress(data) if inflate else data
            if left <= 0 or at > end:
                return
            size = min(size * 2, 2 << 20)
            data = self._range(at, min(at + size - 1, end))
            at += len(data)

    def _range(self, first: int, last: int) -> bytes:
        return self._fetcher.range(self._url, first, last).content


class LocalArchive:
    """The last rung: the whole wheel, in a file."""

    def __init__(self, path: Path) -> None:
        self._file = zipfile.ZipFile(path)
        self.members = tuple(self._file.infolist())

    def read(self, name: str) -> bytes:
        """One member, whole."""
        return self._file.read(name)

    def pieces(self, name: str) -> Iterator[bytes]:
        """One member, piece by piece."""
        with self._file.open(name) as member:
            while piece := member.read(1 << 20):
                yield piece

    def close(self) -> None:
        """Lets go of the file."""
        self._file.close()


class _Growing(io.RawIOBase):
    """The end of a file that fetches what lies before it when asked: all that zipfile needs."""

    def __init__(self, fetcher: Fetcher, url: str, tail: bytes, size: int) -> None:
        self._fetcher, self._url, self._tail, self._size = fetcher, url, tail, size
        self._position = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        if self._position < 0:
            msg = "before the start"
            raise OSError(msg)
        return self._position

    def read(self, size: int = -1) -> bytes:
        start = self._size - len(self._tail)
        if self._position < start:
            missing = self._fetcher.range(self._url, self._position, start - 1)
            self._tail = missing.content + self._tail
            start = self._position
        begin = self._position - start
        data = self._tail[begin:] if size < 0 else self._tail[begin : begin + size]
        self._position += len(data)
        return data
