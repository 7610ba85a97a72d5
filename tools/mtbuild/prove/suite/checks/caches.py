"""Every compile cache has a place that can be written and executed from.

Triton and torch load shared objects from their caches: a tmpfs without `exec` gives
"failed to map segment from shared object", a folder of root's "PermissionError".
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sysconfig
from pathlib import Path

from result import CheckResult, Context, failed, passed

ID = "caches"
TIERS = ("cpu", "gpu")
LIMIT_S = 60


def run(ctx: Context) -> CheckResult:
    """Write into each cache's folder and load a library from it."""
    library = _some_library()
    for name, folder in _folders(ctx).items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f"mtbuild-probe-{os.getpid()}.so"
            shutil.copyfile(library, probe)
            probe.chmod(0o755)
        except OSError as error:
            return failed(
                f"{name}: {folder} can't be written: {error.strerror}",
                detail=f"uid {os.getuid()}, gid {os.getgid()}; {_mode(folder)}",
                diagnosis="a tmpfs keeps the mode of the folder it covers, and a read-only "
                "root has no other place",
                fix=f"give /cache mode 1777 in the image and point {name} below it (ENV {name}=/cache/…)",
            )
        try:
            ctypes.CDLL(str(probe))
        except OSError as error:
            return failed(
                f"{name}: nothing can be executed from {folder}",
                detail=str(error),
                diagnosis="the mount is noexec (Docker's default for a tmpfs): ImportError: "
                "… failed to map segment from shared object",
                fix="mount it with exec: --tmpfs /cache:rw,exec,mode=1777",
            )
        finally:
            probe.unlink(missing_ok=True)
    places = {name: str(folder) for name, folder in _folders(ctx).items()}
    return passed(f"{len(places)} caches can be written and executed from", caches__folders=places)


def _folders(ctx: Context) -> dict:
    """Where each cache really is, by the rules of the program that uses it."""
    env = os.environ
    home = Path(env.get("HOME", "/"))
    triton = env.get("TRITON_CACHE_DIR") or Path(env.get("TRITON_HOME") or home) / ".triton/cache"
    inductor = (
        env.get("TORCHINDUCTOR_CACHE_DIR") or Path(env.get("TMPDIR", "/tmp")) / f"torchinductor_{os.getuid()}"
    )
    folders = {
        "TRITON_CACHE_DIR": Path(triton),
        "TORCHINDUCTOR_CACHE_DIR": Path(inductor),
        "/cache": ctx.cache,
    }
    # caches that only these variables move, and that their owners do without where they can't write
    folders.update({name: Path(env[name]) for name in ("CUDA_CACHE_PATH", "XDG_CACHE_HOME") if name in env})
    return folders


def _some_library() -> Path:
    """A small shared object of this Python that loads by itself."""
    folder = Path(sysconfig.get_path("platstdlib")) / "lib-dynload"
    found = sorted(folder.glob("*.so"), key=lambda path: path.stat().st_size)
    if found:
        return found[0]
    for place in (
        "/lib/x86_64-linux-gnu/libm.so.6",
        "/usr/lib64/libm.so.6",
        "/lib/aarch64-linux-gnu/libm.so.6",
    ):
        if Path(place).exists():
            return Path(place)
    msg = f"no shared object to try with: {folder} is empty"
    raise FileNotFoundError(msg)


def _mode(folder: Path) -> str:
    while not folder.exists():
        folder = folder.parent
    status = folder.stat()
    return f"{folder} has mode {status.st_mode & 0o7777:o}, owner {status.st_uid}:{status.st_gid}"
