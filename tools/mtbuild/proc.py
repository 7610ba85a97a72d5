"""The one place where mtbuild runs other programs.

Every call has a time limit, never a shell, and ends in a result or a typed error that quotes the
command and the end of its output. A time-out or Ctrl-C ends the whole process group, so that nothing
that a command started runs on.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from mtbuild.errors import CommandError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

__all__ = ["Completed", "run", "which"]

_TAIL = 40  # lines of output quoted in an error


@dataclass(frozen=True, kw_only=True)
class Completed:
    """What a program did: `output` is stdout, `errors` stderr (both text), `seconds` wall time."""

    command: tuple[str, ...]
    returncode: int
    output: str
    errors: str
    seconds: float


def which(program: str) -> str:
    """Absolute path of a program; raises CommandError if PATH has none."""
    path = shutil.which(program)
    if path is None:
        msg = f"{program} is not installed"
        raise CommandError(msg, returncode=None, fix=f"install {program} or run `make setup`")
    return path


def run(
    command: Sequence[str | Path],
    *,
    timeout_s: float,
    check: bool = True,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: str | bytes | None = None,
    on_line: Callable[[str], None] | None = None,
    log: Path | None = None,
    fix: str = "",
) -> Completed:
    """Run a command to its end.

    `env` is added to the environment; `on_line` sees each line of stdout and stderr as it comes; `log`
    gets both, appended. With `check`, an exit status other than 0 raises CommandError; a time-out or a
    missing program always does.
    """
    words = tuple(os.fspath(word) for word in command)
    started = time.monotonic()
    try:
        process = subprocess.Popen(
            words,
            cwd=cwd,
            env={**_environment(), **(env or {})},
            stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # its own group, so that all of it can be ended
        )
    except OSError as error:
        msg = f"can't run {words[0]}: {error.strerror or error}"
        raise CommandError(
            msg, returncode=None, fix=fix or f"install {words[0]} or correct its path"
        ) from error
    sink = log.open("a", encoding="utf-8") if log is not None else None
    lock = threading.Lock()
    out: list[str] = []
    err: list[str] = []

    def drain(stream: IO[bytes], into: list[str]) -> None:
        for raw in stream:
            line = raw.decode("utf-8", "replace")
            with lock:
                into.append(line)
                if sink is not None:
                    sink.write(line)
                if on_line is not None:
                    on_line(line.rstrip("\r\n"))

    assert process.stdout is not None and process.stderr is not None
    readers = [
        threading.Thread(target=drain, args=(process.stdout, out), daemon=True),
        threading.Thread(target=drain, args=(process.stderr, err), daemon=True),
    ]
    for reader in readers:
        reader.start()
    try:
        if stdin is not None and process.stdin is not None:
            data = stdin.encode() if isinstance(stdin, str) else stdin
            try:
                process.stdin.write(data)
                process.stdin.close()
            except BrokenPipeError:
                pass  # the program ended without reading it; its exit status tells
        try:
            returncode = process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            _end(process)
            msg = f"{shlex.join(words)} did not end within {timeout_s:g} s\n{_tail(out, err)}"
            raise CommandError(msg, returncode=None, output="".join(out + err), fix=fix) from error
        except BaseException:
            _end(process)
            raise
        for reader in readers:
            reader.join(timeout=5)
    finally:
        if sink is not None:
            with lock:
                sink.close()
                sink = None
    done = Completed(
        command=words,
        returncode=returncode,
        output="".join(out),
        errors="".join(err),
        seconds=time.monotonic() - started,
    )
    if check and returncode != 0:
        msg = f"{shlex.join(words)} ended with status {returncode}\n{_tail(out, err)}"
        raise CommandError(msg, returncode=returncode, output=done.output + done.errors, fix=fix)
    return done


def _environment() -> dict[str, str]:
    """Ours, but for the signing key: no program that mtbuild runs has any use for it."""
    return {name: value for name, value in os.environ.items() if name != "MTBUILD_SIGNING_KEY"}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the whole group to end, then make it."""
    for sign, patience_s in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            return
        try:
            process.wait(timeout=patience_s)
            return
        except subprocess.TimeoutExpired:
            continue


def _tail(out: list[str], err: list[str]) -> str:
    lines = (err or out)[-_TAIL:]
    return "".join(f"  | {line.rstrip()}\n" for line in lines)
