"""What shared objects in wheels say, read from as few of their bytes as possible."""

from __future__ import annotations

import io
import re
import struct
from typing import TYPE_CHECKING

from elftools.common.exceptions import ELFError
from elftools.elf.dynamic import DynamicSegment
from elftools.elf.elffile import ELFFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["cudart_needed", "sass_of"]

_CUDART = re.compile(rb"\0(libcudart\.so\.\d+(?:\.\d+)*)\0")
# No NUL before it: a compiler may lay the constant right behind another one that is not a C string.
_ARCHS = re.compile(rb"(sm_\d+[a-z]?(?: (?:sm|compute)_\d+[a-z]?)+)\0")
_OVERLAP = 1024  # a match may lie across two pieces
_PT_LOAD, _PT_DYNAMIC = 1, 2
_MOST = 48 << 20  # bytes of a library looked at before giving up


def cudart_needed(pieces: Iterable[bytes]) -> str | None:
    """The CUDA runtime that a library asks the loader for ("libcudart.so.12"), None if it asks for none.

    Reads up to the first such name in the dynamic string table, which comes first in the file: `.dynamic`
    itself lies at its end, a hundred megabytes later in some. The table holds names of libraries and symbols
    only, so a library's name there is one it needs (or its own). Where the whole library was read, DT_NEEDED
    itself is the answer.
    """
    data = bytearray()
    limit = _MOST
    for piece in pieces:
        before = max(0, len(data) - _OVERLAP)
        data += piece
        if not before and len(data) > 64:
            if data[:4] != b"\x7fELF":
                return None
            limit = _first_segment(bytes(data[:4096]))
        found = _CUDART.search(data, before)
        if found:
            return found.group(1).decode()
        if len(data) > min(limit, _MOST):
            return None
    needed = [name for name in _dt_needed(bytes(data)) if name.startswith("libcudart.so")]
    return needed[0] if needed else None


def _first_segment(head: bytes) -> int:
    """End of the first loadable segment, which holds the dynamic string table. ELF64, little-endian."""
    try:
        offset, entry, count = (
            struct.unpack_from("<Q", head, 32)[0],
            *struct.unpack_from("<HH", head, 54),
        )
        for index in range(count):
            kind, _flags, at, _va, _pa, size = struct.unpack_from("<IIQQQQ", head, offset + index * entry)
            if kind == _PT_LOAD:
                return int(at + size)
    except struct.error:
        pass
    return _MOST


def _dt_needed(data: bytes) -> Iterator[str]:
    try:
        for segment in ELFFile(io.BytesIO(data)).iter_segments("PT_DYNAMIC"):
            assert isinstance(segment, DynamicSegment)
            for tag in segment.iter_tags("DT_NEEDED"):
                yield str(tag.needed)  # type: ignore[attr-defined]
    except (ELFError, AssertionError, ValueError):
        return  # cut off or foreign: nothing to say


def sass_of(pieces: Iterable[bytes]) -> tuple[str, ...]:
    """GPU architectures that torch was compiled for, as compute capabilities ("8.0", "9.0a"), oldest first.

    It is the string that `torch._C._cuda_getArchFlags()` returns, in libtorch_python.so's constants; reading
    stops there.
    """
    rest = b""
    for piece in pieces:
        data = rest + piece
        found = _ARCHS.search(data)
        if found:
            words = [word for word in found.group(1).decode().split() if word.startswith("sm_")]
            return tuple(_capability(word.removeprefix("sm_")) for word in words)
        rest = data[-_OVERLAP:]
    return ()


def _capability(digits: str) -> str:
    number, suffix = re.fullmatch(r"(\d+)([a-z]?)", digits).groups()  # type: ignore[union-attr]
    return f"{number[:-1]}.{number[-1]}{suffix}"
