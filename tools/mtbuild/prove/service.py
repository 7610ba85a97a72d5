"""A background program that outlives the command that started it, and is known again by the next one.

A process id alone proves nothing: ids are used again, and a record may be from before a reboot. The record
therefore also holds the kernel's start time of the process and the boot's id, and only a process that
matches all three is ever signalled.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import filelock

from mtbuild.errors import CommandError, InfrastructureError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["Service", "boot_id", "locked", "remove"]

_LOG_LIMIT = 8 << 20  # bytes; a log longer than that is begun anew (one generation kept) at the next start
_POLL_S = 0.1


def boot_id() -> str:
    """Changes with every boot of the kernel."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _started(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot, or None if it is gone or a zombie (proc(5)).

    A zombie whose other threads still run is not gone yet: they keep its files, ports among them, open.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold blanks and brackets
    threads = int(fields[17])  # counts the zombie itself
    return None if fields[0] == "X" or (fields[0] == "Z" and threads < 2) else int(fields[19])


@dataclass(frozen=True, kw_only=True)
class Service:
    """A program with its log and the record of its process, all in `folder`."""

    name: str
    folder: Path

    @property
    def record(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def pid(self) -> int | None:
        """The running process that `start` made, or None: never started, ended, or another boot."""
        try:
            known = json.loads(self.record.read_text(encoding="utf-8"))
            pid, started, boot = int(known["pid"]), int(known["started"]), str(known["boot"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return pid if boot == boot_id() and _started(pid) == started else None

    def start(self, command: Sequence[str | Path], *, env: Mapping[str, str]) -> int:
        """Start it in a session of its own, output to the log; returns its process id. It gets only `env`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.log.exists() and self.log.stat().st_size > _LOG_LIMIT:
            self.log.replace(self.log.with_suffix(".log.1"))
        words = [os.fspath(word) for word in command]
        try:
            with self.log.open("ab") as sink:
                # The one place beside proc.run: this program is meant to outlive us.
                process = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=sink,
                    cwd="/",
                    env=dict(env),
                    start_new_session=True,  # Ctrl-C in our terminal is not meant for it
                )
        except OSError as error:
            msg = f"can't run {words[0]}: {error.strerror or error}"
            raise CommandError(msg, returncode=None, fix="run `make clean-engine` and try again") from error
        process.returncode = 0  # it is nobody's child from now on; keeps Python from warning about it
        started = _started(process.pid)
        text = json.dumps({"pid": process.pid, "started": started or 0, "boot": boot_id()})
        fresh = self.record.with_suffix(".new")
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(self.record)
        return process.pid

    def stop(self, *, patience_s: float) -> bool:
        """End it, first kindly; True if it ran. Its record is removed."""
        pid = self.pid()
        if pid is not None:
            for sign, wait_s in ((signal.SIGTERM, patience_s), (signal.SIGKILL, 10.0)):
                os.kill(pid, sign)
                if self._gone(wait_s):
                    break
        self.record.unlink(missing_ok=True)
        return pid is not None

    def _gone(self, wait_s: float) -> bool:
        end = time.monotonic() + wait_s
        while time.monotonic() < end:
            if self.pid() is None:
                return True
            time.sleep(_POLL_S)
        return False

    def tail(self, lines: int = 12) -> str:
        """The end of its log, for error messages."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - 65536))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return ""
        return "".join(f"  | {line}\n" for line in text.splitlines()[-lines:])


@contextlib.contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Only one process starts or stops a thing at a time; the others wait and find it done."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(folder / f"{name}.lock", timeout=900):
            yield
    except filelock.Timeout as error:
        msg = f"another mtbuild has been busy with {folder} for 15 minutes"
        raise InfrastructureError(msg, fix="look for it with `ps`, end it, and try again") from error


def remove(folder: Path) -> None:
    """Remove a folder and all in it; InfrastructureError names what could not be removed."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        msg = f"can't remove {error.filename or folder}: {error.strerror or error}"
        raise InfrastructureError(
            msg, fix="remove the folder as root; see `mount` for what is still mounted there"
        ) from error
