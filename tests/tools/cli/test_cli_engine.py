"""`mtbuild engine`: what it prints, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mtbuild.paths import Paths
from mtbuild.prove.engine import connect

ROOT = Path(__file__).parents[3]


def mtbuild(*words: str, root: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-c",
        "from mtbuild.cli import main; main()",
        "--root",
        str(root),
        "engine",
        *words,
    ]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, env={**os.environ, **env}, input=""
    )


@pytest.mark.parametrize("name", ["start", "status", "stop", "prune", "clean", "tools"])
def test_every_command_has_help_with_an_example(name: str) -> None:
    done = mtbuild(name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"mtbuild engine {name}" in done.stdout


def test_no_engine_is_infrastructure() -> None:
    done = mtbuild("status", DOCKER_HOST="unix:///no/such.sock")
    assert done.returncode == 3
    assert done.stderr.startswith("error: the engine that DOCKER_HOST names")
    assert "Traceback" not in done.stderr


def test_stopping_what_does_not_run_is_no_error(tmp_path: Path) -> None:
    done = mtbuild("stop", root=tmp_path, MTBUILD_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0
    assert done.stdout == "engine: was not running\nregistry: was not running\n"


def test_removing_asks_first(tmp_path: Path) -> None:
    kept = tmp_path / "cache/engine/kept"
    kept.parent.mkdir(parents=True)
    kept.touch()
    done = mtbuild("clean", root=tmp_path, MTBUILD_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 130
    assert kept.exists()
    done = mtbuild("clean", "--yes", root=tmp_path, MTBUILD_CACHE=str(tmp_path / "cache"))
    assert (done.returncode, done.stdout) == (0, "removed; 0.0 GB freed\n")
    assert not kept.exists()


@pytest.mark.engine
def test_status_says_what_is_used() -> None:
    engine = connect(Paths.of(ROOT), bootstrap=True)
    done = mtbuild("status", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["schema"] == 1
    assert (said["engine"], said["docker"]) == (engine.socket, str(engine.docker))
    assert f"engine     {engine.socket}\n" in mtbuild("status").stdout
