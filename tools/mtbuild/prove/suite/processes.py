"""A process in a group of its own: waited for, ended with all that it started, and how it ended in words."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress


def finish(process: subprocess.Popen, limit_s: float) -> bool:
    """Wait for a process that leads its session, then kill its group. Whether it was late."""
    late = False
    try:
        process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        late = True
    # what it leaves running holds pipes open and the container busy
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return late


def ending(process: subprocess.Popen) -> str:
    """How it ended: "signal 11" or "status 7"."""
    code = process.returncode
    return f"signal {-code}" if code < 0 else f"status {code}"
