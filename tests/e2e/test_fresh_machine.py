"""A fresh Debian 12 machine, root, package mirrors and a Python index: nothing else, and `make engine` works.

The machine is a privileged container of our own base image, so it has neither Python nor a compiler, git,
an engine or a company CA. It gets what its owner would have configured: apt sources and pip settings.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mtbuild.paths import Paths
from mtbuild.plan.cell import Base
from mtbuild.proc import run
from mtbuild.prove import base, embedded
from mtbuild.prove.engine import connect

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
BOOKWORM = Base(name="bookworm", kind="bootstrap", glibc="2.36", python=("3.11",), suite="bookworm")
SCRIPT = """
set -eu
export DEBIAN_FRONTEND=noninteractive
cp /owner/apt.sources /etc/apt/sources.list.d/debian.sources
grep -v -e Dir:: -e CaInfo /owner/apt.conf > /etc/apt/apt.conf.d/90owner
apt-get update -qq
apt-get install -qq -y --no-install-recommends make >/dev/null 2>&1
cp -r /project /root/project
cd /root/project
! command -v python3 && ! command -v gcc && ! command -v git && ! command -v docker
echo "--- first"
make engine
echo "--- second"
make engine
echo "--- a build"
printf 'FROM scratch\\nCOPY Makefile /\\n' > Dockerfile.try
.venv/bin/python - <<'PY'
from pathlib import Path
from mtbuild.paths import Paths
from mtbuild.proc import run
from mtbuild.prove import embedded
from mtbuild.prove.engine import connect
paths = Paths.of(Path())
engine = connect(paths)
name = embedded.ensure_registry(paths) + "/try:1"
run([*engine.buildx, "build", "-f", "Dockerfile.try", "--provenance=false",
     f"--output=type=image,name={name},push=true", "."], timeout_s=300)
print("pushed", name)
PY
echo "--- down"
make engine-down
make clean-engine
test ! -e /root/.cache/mtbuild/engine
echo "--- done"
"""


@pytest.fixture
def disk() -> Iterator[Path]:
    """A folder of the host for the machine's cache: overlayfs can't lie on a container's own overlayfs."""
    with tempfile.TemporaryDirectory(prefix="mtb-fresh-") as folder:
        yield Path(folder)


@pytest.mark.engine
@pytest.mark.timeout(1800)
def test_make_sets_up_everything_on_a_bare_machine(tmp_path: Path, disk: Path) -> None:
    paths = Paths.of(ROOT)
    engine = connect(paths, bootstrap=True)
    image = base.ensure_base(BOOKWORM, engine=engine, registry=embedded.ensure_registry(paths), paths=paths)
    project = tmp_path / "project"
    subprocess.run(["git", "clone", "-q", ROOT, project], check=True, timeout=120)
    owner = base.apt_secret(Paths(root=tmp_path, cache=paths.cache))
    words: list[str | Path] = [engine.docker, "run", "--rm", "-i", "--privileged", "--pids-limit=-1"]
    for source, target in ((project, "/project"), (owner, "/owner")):
        words += ["-v", f"{source}:{target}:ro"]
    words += ["-v", f"{disk}:/root/.cache", "-e", f"PIP_CERT={'/owner/ca.pem'}"]
    for key, value in os.environ.items():
        if key.startswith(("PIP_", "UV_")) and key != "PIP_CERT":
            words += ["-e", f"{key}={value}"]
            # A wheelhouse of this machine (find-links) is a folder: show it to the other one as well.
            words += [w for part in value.split() if part.startswith("/") and Path(part).is_dir()
                      for w in ("-v", f"{part}:{part}:ro")]  # fmt: skip
    done = run([*words, str(image), "bash", "-c", SCRIPT], timeout_s=1700, env=engine.env, check=False)
    seen = f"{done.output}\n--- stderr\n{done.errors}"
    assert done.returncode == 0, seen
    _, first, second, built, down = (part.strip() for part in done.output.split("--- ")[:5])
    assert "origin     embedded" in first, seen
    assert "store      containerd" in first, seen
    assert "origin     embedded" in second, seen
    assert done.errors.count("starting the engine") == 1, "the second call did not find it running"
    assert done.errors.count("setup: making") == 1, "the second call set everything up again"
    assert "pushed 127.0.0.1:" in built, seen
    assert "engine: stopped" in down, seen
    assert done.output.rstrip().endswith("--- done"), seen
