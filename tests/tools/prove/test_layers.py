"""What the engine holds in layers, by its own word; nothing is started for a lock that is out of date."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mtbuild.acts import LocalActs
from mtbuild.errors import InputError
from mtbuild.paths import Paths
from mtbuild.plan.lock import Lock
from mtbuild.plan.matrix import load
from mtbuild.prove.disk import needs
from mtbuild.prove.layers import wheels_of

ROOT = Path(__file__).parents[3]
V73 = "torch2.7.1-cu126-xf0.0.31-py311"
TORCH, NUMPY, SCIPY = "a" * 64, "b" * 64, "c" * 64

# As buildx 0.13 prints it, shortened
LISTING = f"""\
ID:		4zmtx
Mutable:	false
Size:		3.1GB
Description:	mount / from exec /bin/sh -c set -eu
cat > /dev/shm/lock <<'LOCK'
torch==2.7.1 --hash=sha256:{TORCH}
numpy==1.26.4 --hash=sha256:{NUMPY}
LOCK
/run/uv pip install --require-hashes -r /dev/shm/lock
Type:		regular

ID:		8yq2c
Description:	cached mount /run/wheels from exec /bin/sh -c echo scipy --hash=sha256:{SCIPY}
Type:		exec.cachemount

ID:		9aaaa
Description:	local source for context
Type:		source.local
Total:		26.54GB
"""


def test_the_wheels_of_steps_that_ran_and_of_nothing_else() -> None:
    assert wheels_of(LISTING) == {TORCH, NUMPY}
    assert wheels_of("") == frozenset()


def test_cached_layers_are_not_asked_room_for_without_any_record_here(tmp_path: Path) -> None:
    """A fresh clone beside an engine that has built v73: its wheels and layers are there."""
    lock = Lock.load(ROOT / "images" / V73)
    steps = "\n".join(line for line in lock.requirements().splitlines() if "--hash" in line)
    cached = wheels_of(f"ID:\t1\nDescription:\tmount / from exec /bin/sh -c set -eu\n{steps}\n")
    assert len(cached) == len(lock.wheels)
    assert sum(need.size for need in needs(lock, tmp_path, built=cached)) == 0
    assert sum(need.size for need in needs(lock, tmp_path, built=())) > 10 * 10**9


def stale(tmp_path: Path) -> Paths:
    """A project whose matrix says another version than its committed lock."""
    text = (ROOT / "matrix.yaml").read_text()
    assert 'triton: "3.3.1"' in text
    (tmp_path / "matrix.yaml").write_text(text.replace('triton: "3.3.1"', 'triton: "3.3.0"'))
    shutil.copytree(ROOT / "images" / V73, tmp_path / "images" / V73)
    shutil.copytree(ROOT / "templates", tmp_path / "templates")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return Paths(root=tmp_path, cache=tmp_path / "cache")


def test_a_lock_that_is_out_of_date_is_said_before_engine_or_registry_is_touched(tmp_path: Path) -> None:
    paths = stale(tmp_path)
    done = subprocess.run(
        [
            sys.executable, "-c", "from mtbuild.cli import main; main()", "--root", paths.root,
            "build", "v73", "--override-compat", "a test of the order", "--json",
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "DOCKER_HOST": f"unix://{tmp_path}/no.sock", "MTBUILD_CACHE": str(paths.cache)},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "the lock is out of date" in done.stderr
    assert "mtbuild lock" in done.stderr
    assert not paths.registry.exists()
    assert not paths.engine.exists()


def test_the_main_job_asks_in_the_same_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")
    paths = stale(tmp_path)
    matrix = load(paths.matrix)
    acts = LocalActs(paths=paths, matrix=matrix, planned=())
    with pytest.raises(InputError, match="the lock is out of date"):
        acts.build(matrix.cell("v73"), lambda _: None)
    assert not paths.registry.exists()
