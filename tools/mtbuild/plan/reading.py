"""From an open wheel to its facts: which members are looked at, for which kind of package."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from mtbuild.plan import members
from mtbuild.plan.wheels import Metadata, WheelFacts, identity

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mtbuild.plan.archive import Archive
    from mtbuild.plan.index import Link

__all__ = ["ARCHS_MEMBER", "measured_releases", "measured_sass", "read_wheel"]

ARCHS_MEMBER = "torch/lib/libtorch_python.so"
_SCHEMAS_MEMBER = "torchgen/packaged/ATen/native/native_functions.yaml"
_NO_CODE = (".dist-info/", ".data/data/share/doc")


def read_wheel(link: Link, archive: Archive, size: int, metadata: Metadata) -> WheelFacts:
    """Reads what this kind of wheel has to say: torch, an extension of torch, or any other."""
    name, version, build, tags = identity(link)
    names = {member.filename for member in archive.members}
    facts = {
        "filename": link.filename,
        "name": name,
        "version": version,
        "build": build,
        "sha256": link.sha256 or "",
        "size": size,
        "tags": tags,
        "requires_dist": metadata.requires_dist,
        "requires_python": metadata.requires_python,
        "unpacked_size": sum(member.file_size for member in archive.members),
        "empty": not any(m.file_size for m in archive.members if not _is_about(m.filename)),
    }
    if name == "torch":
        facts |= _torch(link, archive, names)
    elif name == "xformers" or _extends_torch(metadata):
        facts |= _extension(archive, names)
    return WheelFacts(**facts)  # type: ignore[arg-type]


def _torch(link: Link, archive: Archive, names: set[str]) -> dict[str, object]:
    from mtbuild.plan import native  # here and below: a warm plan reads no wheel, so it needs no ELF reader

    local, cuda = members.torch_cuda(archive.read("torch/version.py").decode())
    facts: dict[str, object] = {"local_version": local, "cuda": cuda}
    needed = native.cudart_needed(_pieces(archive, names, "torch/lib/libtorch_global_deps.so"))
    if needed:
        facts["needed_cudart"] = (("torch/lib/libtorch_global_deps.so", needed),)
    if _SCHEMAS_MEMBER in names:
        facts["attention"] = members.attention_offered(archive.read(_SCHEMAS_MEMBER).decode())
    if cuda is None:
        return facts
    measured = measured_sass(link.sha256 or "")
    if measured:
        return facts | {"sass": measured, "sass_source": f"measured in this wheel's {ARCHS_MEMBER}"}
    sass = native.sass_of(_pieces(archive, names, ARCHS_MEMBER))
    return facts | {"sass": sass, "sass_source": f"read from {ARCHS_MEMBER}" if sass else ""}


def _extension(archive: Archive, names: set[str]) -> dict[str, object]:
    from mtbuild.plan import native

    facts: dict[str, object] = {}
    if "xformers/cpp_lib.json" in names:
        facts["cpp_lib"] = members.cpp_lib(archive.read("xformers/cpp_lib.json").decode())
    if "xformers/ops/fmha/flash.py" in names:
        facts["flash_window"] = members.flash_window(archive.read("xformers/ops/fmha/flash.py").decode())
    compat = "xformers/ops/fmha/torch_attention_compat.py"
    if compat in names:
        facts["attention"] = members.attention_wanted(archive.read(compat).decode())
    libraries = sorted(n for n in names if n.endswith(".so") or ".so." in n.rpartition("/")[2])
    needed = ((name, native.cudart_needed(archive.pieces(name))) for name in libraries)
    facts["needed_cudart"] = tuple((name, soname) for name, soname in needed if soname)
    return facts


def _pieces(archive: Archive, names: set[str], name: str) -> Iterable[bytes]:
    return archive.pieces(name) if name in names else ()


def _extends_torch(metadata: Metadata) -> bool:
    """Whether its native code may be bound to a torch: only then are its libraries worth reading."""
    for line in metadata.requires_dist:
        try:
            if canonicalize_name(Requirement(line).name) == "torch":
                return True
        except InvalidRequirement:
            continue
    return False


def _is_about(filename: str) -> bool:
    """Metadata and documentation, not code or data."""
    return any(part in filename for part in _NO_CODE)


@lru_cache(maxsize=1)
def _measured() -> tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]:
    """(local version, architectures, wheel hashes) of torch releases measured before."""
    data = json.loads(files("mtbuild.plan").joinpath("data/torch_sass.json").read_text(encoding="utf-8"))
    return tuple((r["version"], tuple(r["sass"]), tuple(r["wheels"].values())) for r in data["releases"])


def measured_sass(sha256: str) -> tuple[str, ...]:
    """Architectures of a torch wheel measured before, by its hash: saves 5 MB; unknown ones are read."""
    return next((sass for _, sass, hashes in _measured() if sha256 in hashes), ())


def measured_releases() -> dict[str, tuple[str, ...]]:
    """By local version ("2.7.1+cu126"): which torch has machine code for which GPUs."""
    return {version: sass for version, sass, _ in _measured()}
