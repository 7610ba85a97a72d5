"""The real thing: the project's own engine, registry and images, each CUDA image built at most once a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def __str__(self) -> str:
        return f"exit {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


def mtbuild(
    *words: str | Path,
    root: Path = ROOT,
    env: dict[str, str] | None = None,
    timeout_s: float = 3000,
    stdin: str | None = None,
) -> Done:
    """Run `mtbuild --root ROOT WORDS…` as a user would."""
    command = [str(Path(sys.executable).with_name("mtbuild")), "--root", str(root), *map(str, words)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
        env={**os.environ, **(env or {})},
        input=stdin,
    )
    return Done(code=done.returncode, out=done.stdout, err=done.stderr)


@pytest.fixture(scope="session")
def main_job() -> Done:
    """`mtbuild matrix`, the whole of it, once for all tests that look at what it made."""
    return mtbuild("matrix", "--json")


@pytest.fixture(scope="session")
def outcomes(main_job: Done) -> dict[str, dict[str, Any]]:
    """What became of each cell, by name."""
    assert main_job.code == 0, str(main_job)
    return {cell["name"]: cell for cell in main_job.json["cells"]}


@pytest.fixture(scope="session")
def registry_host(main_job: Done) -> str:
    """HOST:PORT of the embedded registry."""
    from mtbuild.paths import Paths
    from mtbuild.prove.local_registry import registry_address

    assert main_job.code in (0, 1), str(main_job)
    host = registry_address(Paths.of(ROOT))
    assert host is not None
    return host
