"""The suite's files as the host handles them: digest, mounts in a container, time limits."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtbuild.digest import Digest
from mtbuild.proc import run

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["SUITE", "lay_out", "limit_s", "suite_digest", "suite_files"]

SUITE = Path(__file__).resolve().parent / "suite"
_SLACK_S = 60.0  # for starting Python in a cold image, on top of the checks' own limits


def suite_files() -> list[Path]:
    """What is mounted into a container, and what the digest is over."""
    return sorted(path for path in SUITE.rglob("*") if path.suffix in (".py", ".json"))


def suite_digest() -> Digest:
    """Of the suite's files: evidence names the suite that it comes from."""
    total = hashlib.sha256()
    for file in suite_files():
        data = file.read_bytes()
        total.update(f"{file.relative_to(SUITE)}\0{len(data)}\0".encode())
        total.update(data)
    return Digest(total.hexdigest())


def lay_out(folder: Path, request: dict[str, Any]) -> dict[Path, tuple[str, str]]:
    """Copy the suite and the request to where any user of a container can read them; the mounts for them."""
    suite, out = folder / "suite", folder / "out"
    for file in suite_files():
        target = suite / file.relative_to(SUITE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    (folder / "request.json").write_text(json.dumps(request, indent=2), encoding="utf-8")
    out.mkdir()
    for place in (suite, *suite.rglob("*"), folder / "request.json"):  # whatever this process's umask is
        place.chmod(0o755 if place.is_dir() else 0o644)
    out.chmod(0o777)
    return {
        suite.resolve(): ("/mtbuild/suite", "ro"),
        (folder / "request.json").resolve(): ("/mtbuild/request.json", "ro"),
        out.resolve(): ("/mtbuild/out", "rw"),
    }


def limit_s(checks: Iterable[str]) -> float:
    """The sum of the checks' own limits; the suite is asked, since nothing here imports it."""
    listed = run([sys.executable, SUITE, "--list"], timeout_s=60).output
    limits = {check["id"]: check["limit_s"] for check in json.loads(listed)}
    return float(sum(limits.get(name, 0) for name in checks)) + _SLACK_S
