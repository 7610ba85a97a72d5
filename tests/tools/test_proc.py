"""The one place that runs programs: output, logs, errors, time limits, and nothing left running."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

import pytest

from mtbuild.errors import CommandError
from mtbuild.proc import run

if TYPE_CHECKING:
    from pathlib import Path

PYTHON = sys.executable


def alive(pid: int) -> bool:
    """A zombie that waits for init to collect it runs no more."""
    try:
        with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123 - one short read
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_output_lines_and_log_are_kept(tmp_path: Path) -> None:
    lines: list[str] = []
    log = tmp_path / "log"
    code = "import sys; print('one'); print('two', file=sys.stderr); print(sys.stdin.read())"
    done = run([PYTHON, "-c", code], timeout_s=30, stdin="three", on_line=lines.append, log=log)
    assert (done.output, done.errors, done.returncode) == ("one\nthree\n", "two\n", 0)
    assert sorted(lines) == ["one", "three", "two"]
    assert sorted(log.read_text().split()) == ["one", "three", "two"]


def test_a_bad_end_quotes_the_command_and_its_last_words() -> None:
    with pytest.raises(CommandError, match="ended with status 3") as raised:
        run(
            [PYTHON, "-c", "import sys; print('it broke', file=sys.stderr); sys.exit(3)"],
            timeout_s=30,
            fix="do so",
        )
    assert raised.value.returncode == 3
    assert "it broke" in raised.value.message
    assert raised.value.exit_code == 3
    assert run([PYTHON, "-c", "raise SystemExit(4)"], timeout_s=30, check=False).returncode == 4


def test_a_missing_program_is_named() -> None:
    with pytest.raises(CommandError, match="can't run no-such-program") as raised:
        run(["no-such-program"], timeout_s=5)
    assert raised.value.fix == "install no-such-program or correct its path"


def test_a_time_out_ends_the_whole_group(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    code = (
        "import subprocess, sys, pathlib, time;"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        f"pathlib.Path({os.fspath(note)!r}).write_text(str(child.pid)); time.sleep(60)"
    )
    started = time.monotonic()
    with pytest.raises(CommandError, match="did not end within 2 s"):
        run([PYTHON, "-c", code], timeout_s=2)
    assert time.monotonic() - started < 30
    deadline = time.monotonic() + 10
    child = int(note.read_text())
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)
