"""`/sbin/ldconfig -p` answers: Triton asks it where libcuda is, and dies with it where it fails."""

from __future__ import annotations

import subprocess
from pathlib import Path

from result import CheckResult, Context, failed, passed

ID = "ldconfig"
TIERS = ("cpu", "gpu")
LIMIT_S = 30


def run(ctx: Context) -> CheckResult:
    """Call it as Triton does, and read what it lists."""
    if not Path("/sbin/ldconfig").exists():
        return failed(
            "there is no /sbin/ldconfig",
            diagnosis="Triton calls it by this path: FileNotFoundError: [Errno 2] … '/sbin/ldconfig'",
            fix="install libc-bin, or set TRITON_LIBCUDA_PATH to where the driver is mounted",
        )
    done = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, timeout=20)
    if done.returncode != 0:
        return failed(
            f"/sbin/ldconfig -p ends with status {done.returncode}",
            detail=done.stdout + done.stderr,
            diagnosis="the image has no /etc/ld.so.cache: CalledProcessError: Command "
            "'['/sbin/ldconfig', '-p']' …",
            fix="RUN ldconfig as the last step that installs libraries",
        )
    names = [line.split()[0] for line in done.stdout.splitlines() if "=>" in line]
    if not any(name.startswith("libc.so") for name in names):
        return failed(
            "/sbin/ldconfig -p lists no libc",
            detail=done.stdout[:1000],
            diagnosis="the linker cache belongs to another root",
            fix="RUN ldconfig in the image itself",
        )
    baked = [name for name in names if name.startswith("libcuda.so")]
    return passed(
        f"/sbin/ldconfig -p lists {len(names)} libraries",
        ldconfig__libraries=len(names),
        ldconfig__libcuda=baked,
    )
