"""The Makefile and its scripts: what a user sees before mtbuild itself can run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "tools/bootstrap"


def sh(*words: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, words)], capture_output=True, text=True, check=False, timeout=60, env={**os.environ, **env}
    )


def test_help_lists_every_target_and_is_the_default() -> None:
    done = sh("make", "-s", "-C", ROOT)
    assert done.returncode == 0, done.stderr
    listed = set(re.findall(r"^  make (\S+) ", done.stdout, re.MULTILINE))
    assert listed == {
        "help", "matrix", "test", "lint", "unit", "test-wan", "e2e", "gpu", "doctor",
        "engine", "engine-down", "clean-engine", "setup",
    }  # fmt: skip


def test_every_stage_runs_and_one_bad_one_fails_the_whole(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text("one:\n\t@echo did one\ntwo:\n\t@false\nthree:\n\t@echo did three\n")
    command = f"cd {tmp_path} && {SCRIPTS}/stages.sh"
    done = sh("sh", "-c", f"{command} one two three")
    assert done.returncode == 1
    assert "did three" in done.stdout, "a failure hid the stages after it"
    assert re.search(r"^one +\d+ s  ok$", done.stdout, re.MULTILINE)
    assert re.search(r"^two +\d+ s  FAILED$", done.stdout, re.MULTILINE)
    assert "failed: two" in done.stderr
    assert sh("sh", "-c", f"{command} one three").returncode == 0


def test_nothing_is_installed_where_nothing_is_missing() -> None:
    done = sh(SCRIPTS / "packages.sh", "sh=dash", "env=coreutils")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("root", [True, False])
def test_what_cant_be_installed_is_named_with_its_fix(tmp_path: Path, root: bool) -> None:
    """On a system without apt, and without root's rights."""
    for name in ("sh", "printf"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    if not root:
        for name, text in (("apt-get", "exit 99"), ("id", "echo 1000")):
            (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
            (tmp_path / name).chmod(0o755)
    shell = shutil.which("sh") or "/bin/sh"
    done = sh(shell, SCRIPTS / "packages.sh", "no-such-program=some-package", PATH=str(tmp_path))
    assert done.returncode == 3
    assert "some-package" in done.stderr
    assert ("sudo apt-get install some-package" in done.stderr) is not root
    assert "fix:" in done.stderr
