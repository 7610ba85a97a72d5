"""Background programs: found again, ended, and never mistaken for another process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mtbuild.errors import CommandError
from mtbuild.prove.service import Service, boot_id

if TYPE_CHECKING:
    from collections.abc import Iterator

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(120)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    "print('up', flush=True); time.sleep(120)",
]
# Its first thread ends, another one lives on: a zombie to the kernel, though all its files are still open.
HEADLESS = [
    sys.executable,
    "-c",
    "import ctypes, os, sys, threading, time\n"
    "def wait():\n"
    "    for _ in range(6000):\n"
    "        if os.path.exists(sys.argv[1]): break\n"
    "        time.sleep(0.02)\n"
    "threading.Thread(target=wait).start(); print('up', flush=True)\n"
    "ctypes.CDLL(None).pthread_exit(None)",
]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    one = Service(name="sleeper", folder=tmp_path / "service")
    yield one
    one.stop(patience_s=0.1)


def wait_for_log(service: Service) -> None:
    end = time.monotonic() + 20
    while "up" not in service.tail():
        assert time.monotonic() < end, "the program did not start"
        time.sleep(0.02)


def test_it_is_found_again_and_ended(service: Service) -> None:
    assert service.pid() is None
    pid = service.start(SLEEP, env={})
    again = Service(name="sleeper", folder=service.folder)
    assert again.pid() == pid
    assert os.getsid(pid) == pid, "Ctrl-C in our terminal would reach it"
    assert again.stop(patience_s=10)
    assert again.pid() is None
    assert not again.record.exists()
    assert not again.stop(patience_s=1), "it ended once already"


def test_one_that_ignores_the_request_is_killed(service: Service) -> None:
    service.start(STUBBORN, env={})
    wait_for_log(service)
    assert service.stop(patience_s=0.3)
    assert service.pid() is None


def test_one_whose_other_threads_still_run_is_not_gone(service: Service) -> None:
    """A killed server keeps its port until its last thread has ended."""
    leave = service.folder / "leave"
    pid = service.start([*HEADLESS, str(leave)], env={})
    wait_for_log(service)
    stat = Path(f"/proc/{pid}/stat")
    end = time.monotonic() + 20
    while stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end, "its first thread never ended"
        time.sleep(0.02)
    assert service.pid() == pid
    leave.touch()
    end = time.monotonic() + 20
    while service.pid() is not None:
        assert time.monotonic() < end, "it never counted as gone"
        time.sleep(0.05)


def test_a_dead_child_of_ours_is_dead(service: Service) -> None:
    os.kill(service.start(SLEEP, env={}), signal.SIGKILL)  # nobody collects it: it stays a zombie
    end = time.monotonic() + 10
    while service.pid() is not None:
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("wrong", ["started", "boot"])
def test_another_process_with_the_same_id_is_not_ours(service: Service, wrong: str) -> None:
    pid = service.start(SLEEP, env={})
    record = json.loads(service.record.read_text())
    service.record.write_text(json.dumps(record | {wrong: "0"}))
    assert service.pid() is None
    assert not service.stop(patience_s=1)
    os.kill(pid, 0)  # it was left alone
    service.record.write_text(json.dumps(record))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', '{"pid": 1}'])
def test_a_broken_record_counts_as_none(service: Service, text: str) -> None:
    service.folder.mkdir(parents=True)
    service.record.write_text(text)
    assert service.pid() is None


def test_a_missing_program_is_one_clear_error(service: Service) -> None:
    with pytest.raises(CommandError, match="can't run /no/such/program: No such file"):
        service.start(["/no/such/program"], env={})


def test_it_gets_only_the_environment_it_is_given(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_CALLER", "1")
    code = "import os; print(sorted(k for k in os.environ if not k.startswith('LC_')), 'up', flush=True)"
    service.start([sys.executable, "-c", code], env={"ONLY": "this"})
    wait_for_log(service)
    assert "['ONLY'] up" in service.tail()


def test_it_outlives_the_process_that_started_it(service: Service) -> None:
    code = (
        "import sys; from pathlib import Path; from mtbuild.prove.service import Service;"
        f"Service(name='sleeper', folder=Path({str(service.folder)!r})).start({SLEEP!r}, env={{}})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert service.pid() is not None
    assert json.loads(service.record.read_text())["boot"] == boot_id()
