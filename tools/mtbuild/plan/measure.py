"""Writes `data/torch_sass.json` anew: `python -m mtbuild.plan.measure`. Reads about 6 MB a torch wheel.

For every released torch from 2.1 on and the Pythons that images use, the architectures that the wheel itself
names. A release that isn't in the file is read the same way at plan time, so the file only saves bytes.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from mtbuild.plan import members, native
from mtbuild.plan.archive import RemoteArchive
from mtbuild.plan.index import Index
from mtbuild.plan.reading import ARCHS_MEMBER
from mtbuild.plan.select import usable
from mtbuild.plan.tags import Target

if TYPE_CHECKING:
    from mtbuild.plan.index import Link

_SINCE = Version("2.1")
_PYTHONS = ("3.11", "3.12")


def main() -> None:
    """Measures and writes; prints one line a wheel to stderr."""
    index = Index.from_environment()
    versions = index.versions("torch")
    links: dict[str, Link] = {}
    for python in _PYTHONS:
        target = Target(python=python, platform="linux/amd64", glibc="2.39")
        links |= {link.filename: link for version, link in usable(versions, target) if version >= _SINCE}

    def measure(link: Link) -> tuple[Link, str, tuple[str, ...]]:
        archive = RemoteArchive(index.fetcher, link.url, size=link.size)
        local, _ = members.torch_cuda(archive.read("torch/version.py").decode())
        sass = native.sass_of(archive.pieces(ARCHS_MEMBER))
        sys.stderr.write(f"{link.filename}: {' '.join(sass)}\n")
        return link, local or "", sass

    releases: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(4) as pool:
        for link, local, sass in pool.map(measure, links.values()):
            if not sass or link.sha256 is None:
                continue  # a CPU build, or an index without hashes
            release = releases.setdefault(local, {"version": local, "sass": list(sass), "wheels": {}})
            if release["sass"] != list(sass):
                raise SystemExit(f"{link.filename} differs from its sisters: {sass}")  # noqa: EM102
            release["wheels"][link.filename] = link.sha256
    data = {
        "about": "Compute capabilities with machine code in torch's wheels, by wheel hash; no PTX in any.",
        "source": f"measured: the string in each wheel's {ARCHS_MEMBER}, which _cuda_getArchFlags() returns",
        "command": "python -m mtbuild.plan.measure",
        "releases": sorted(releases.values(), key=lambda release: Version(release["version"])),
    }
    path = Path(__file__).with_name("data") / "torch_sass.json"
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    sys.stderr.write(f"{path}: {len(releases)} releases, {index.bytes / 1e6:.0f} MB read\n")


if __name__ == "__main__":
    main()
