"""The image works as an ordinary user and as any uid with gid 0, with a read-only root and no rights.

Platforms choose the uid (OpenShift: random, gid 0). What breaks then: files that only root may read, a user
without a name (`getpass.getuser`), a home that is `/`.
"""

from __future__ import annotations

import getpass
import os
import sys
from pathlib import Path

from result import CheckResult, Context, failed, passed

ID = "users"
TIERS = ("cpu", "gpu")
LIMIT_S = 120


def run(ctx: Context) -> CheckResult:
    """Who runs, what is unreadable, what could be written that must not be."""
    who = f"{os.getuid()}:{os.getgid()}"
    if who != ctx.request["user"]:
        return failed(
            f"runs as {who}, was started as {ctx.request['user']}",
            diagnosis="the image's entry point changes the user",
            fix="leave the user to whoever starts the container",
        )
    rights = _status()
    if int(rights.get("CapEff", "0"), 16) or rights.get("NoNewPrivs") != "1":
        return failed(
            f"has rights that it should not have (CapEff {rights.get('CapEff')}, NoNewPrivs "
            f"{rights.get('NoNewPrivs')})",
            diagnosis="the container was not started with cap-drop ALL and no-new-privileges",
            fix="smoke through `mtbuild smoke`, which starts it so",
        )
    written = [str(place) for place in (Path("/"), Path(sys.prefix), *_packages()) if _writable(place)]
    if written:
        return failed(
            f"could write to {', '.join(written)}",
            diagnosis="the root is not read-only, so a run can change what the next one imports",
            fix="start with --read-only; keep caches under /cache",
        )
    closed = [path for place in _packages() for path in _unreadable(place)]
    if closed:
        return failed(
            f"{len(closed)} files of the Python environment can't be read as {who}",
            detail="\n".join(closed[:20]),
            diagnosis="the image was built with a tight umask, for one user only",
            fix="RUN chmod -R a+rX on the environment, in the step that fills it",
        )
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        name = None
    if name is None and not os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        return failed(
            f"uid {os.getuid()} has no name, and TORCHINDUCTOR_CACHE_DIR is not set",
            diagnosis="torch asks for the user's name to choose its cache folder: KeyError: "
            "'getpwuid(): uid not found'",
            fix="ENV TORCHINDUCTOR_CACHE_DIR=/cache/inductor (and USER) in the image",
        )
    return passed(f"works as {who}" + (f" ({name})" if name else " (no name)"))


def _status() -> dict:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _packages() -> list:
    return [Path(place) for place in sys.path if Path(place).is_dir() and "mtbuild" not in Path(place).parts]


def _writable(folder: Path) -> bool:
    probe = folder / f".mtbuild-probe-{os.getpid()}"
    try:
        probe.touch()
    except OSError:
        return False
    probe.unlink()
    return True


def _unreadable(folder: Path) -> list:
    closed: list = []
    opened: list = []
    for place, _, files in os.walk(folder, onerror=lambda error: closed.append(str(error.filename))):
        opened += (f"{place}/{name}" for name in files)
    return closed + [path for path in opened if not _readable(path)]


def _readable(path: str) -> bool:
    return os.access(path, os.R_OK) or (os.path.islink(path) and not os.path.exists(path))  # noqa: PTH114, PTH110
