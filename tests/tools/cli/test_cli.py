"""The command group: cheap to start, helpful, and with exit codes that mean something."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from mtbuild.cli import _COMMANDS

if TYPE_CHECKING:
    from pathlib import Path


def mtbuild(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from mtbuild.cli import main; main()", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, timeout=60)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['mtbuild', '--help']\n"
        "from mtbuild.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'wan', 'docker', 'httpx', 'yaml', 'jinja2', 'jsonschema', 'cryptography'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "HEAVY []"


@pytest.mark.parametrize("name", sorted(_COMMANDS))
def test_every_command_has_help_with_an_example(name: str) -> None:
    done = mtbuild(name, "--help")
    assert done.returncode == 0, done.stderr
    assert "mtbuild " + name in done.stdout, "the help shows no example"


def test_an_unknown_command_or_option_is_bad_input() -> None:
    done = mtbuild("matrx")
    assert done.returncode == 2
    assert "Did you mean 'matrix'?" in done.stderr
    assert mtbuild("matrix", "--no-such-option").returncode == 2


def test_a_folder_without_a_matrix_is_bad_input(tmp_path: Path) -> None:
    done = mtbuild("matrix", "--plan", cwd=tmp_path)
    assert done.returncode == 2
    assert "there is no matrix.yaml" in done.stderr
    assert "Traceback" not in done.stderr


def test_sigterm_is_an_interruption() -> None:
    """As Ctrl-C: what was started ends, the exit code is 130."""
    code = (
        "import os, signal, sys, types, click\n"
        "from mtbuild import cli\n"
        "stop = click.Command('doctor', callback=lambda: os.kill(os.getpid(), signal.SIGTERM))\n"
        "sys.modules['mtbuild.cli.doctor'] = types.SimpleNamespace(command=stop)\n"
        "sys.argv = ['mtbuild', 'doctor']\n"
        "cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 130, done.stderr
    assert "run the same command again to go on" in done.stderr
