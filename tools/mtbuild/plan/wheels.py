"""What the wheels themselves say, read in kilobytes and kept by wheel hash."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mtbuild.plan.index import Index

__all__ = ["CppLib", "WheelFacts", "Wheels"]


@dataclass(frozen=True, kw_only=True)
class CppLib:
    """`xformers/cpp_lib.json`: what the native code was really built for. `cuda` as "12.8"."""

    torch: str
    cuda: str | None
    arch_list: str
    text: str  # the file's own words, for quotes


@dataclass(frozen=True, kw_only=True)
class WheelFacts:
    """Everything the rules need of one wheel. Sizes in bytes; what was not read or is not there is None or ()."""

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
    empty: bool = False  # holds no module, no library, no data: a placeholder
    local_version: str | None = None  # torch: "2.7.1+cu126"
    cuda: str | None = None  # torch: "12.6"
    cpp_lib: CppLib | None = None  # xformers
    needed_cudart: tuple[tuple[str, str], ...] = ()  # (member, "libcudart.so.12")
    sass: tuple[str, ...] = ()  # torch: compute capabilities with machine code, "8.0"
    sass_source: str = ""


class Wheels:
    """Reads facts through an index, cached under `cache` by sha256."""

    def __init__(self, index: Index, cache: Path, note: Callable[[str], None]) -> None:
        raise NotImplementedError

    def facts(self, project: str, version: str, *, python: str, platform: str, glibc: str) -> WheelFacts:
        """Of the wheel that an installer would take for this Python, platform and C library."""
        raise NotImplementedError
