"""The suite run by this Python as it runs in an image, and what one run of it said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from mtbuild.prove.report import validate
from mtbuild.prove.smoke import SUITE

__all__ = ["CELL", "TORCH", "USER", "Suite", "distribution", "installed"]

USER = f"{os.getuid()}:{os.getgid()}"
CELL = {
    "id": "torch2.7.1-cu126-xf0.0.31-py311",
    "name": "v73",
    "python": f"{sys.version_info.major}.{sys.version_info.minor}",
    "torch": "2.7.1",
    "cuda": "12.6",
    "triton": "3.3.1",
    "xformers": "0.0.31",
    "targets": ["9.0"],
}


class Suite:
    """A copy of the suite, to which a test may add checks, and what one run of it said."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.suite = folder / "suite"
        shutil.copytree(SUITE, self.suite, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("cache", "out"):
            (folder / name).mkdir()
        self.exit_status: int | None = None
        self.lines: list[dict[str, Any]] = []

    def add(self, name: str, code: str) -> None:
        (self.suite / "checks" / f"{name}.py").write_text(textwrap.dedent(code))

    def module(self, name: str, code: str) -> None:
        """A package that the checks find, in place of one that an image would have."""
        file = self.folder / "site" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(code))

    def run(
        self, *checks: str, env: dict[str, str] | None = None, timeout_s: float = 240, **changes: Any
    ) -> dict[str, Any]:
        request = {
            "schema": 1,
            "nonce": "0123456789abcdef",
            "tier": "cpu",
            "user": USER,
            "checks": list(checks),
            "required": list(checks),
            "allow_degraded": False,
            "runtime": False,
            "cell": None,
            "cache": str(self.folder / "cache"),
            "out": str(self.folder / "out"),
            "hold_s": 0,
            **changes,
        }
        validate(request, "request", where="request")
        (self.folder / "request.json").write_text(json.dumps(request))
        path = {"PYTHONPATH": str(self.folder / "site"), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            [sys.executable, self.suite, "--request", self.folder / "request.json"],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env={**os.environ, **path, **(env or {})},
        )
        self.exit_status = done.returncode
        self.lines = [json.loads(line) for line in done.stdout.splitlines()]
        report: dict[str, Any] = json.loads((self.folder / "out/report.json").read_text())
        validate(report, "report", where="report")
        return report

    def one(self, check: str, env: dict[str, str] | None = None, **changes: Any) -> dict[str, Any]:
        result: dict[str, Any] = self.run(check, env=env, **changes)["results"][0]
        return result


TORCH = "__version__ = '2.7.1+cu126'\nclass version:\n    cuda = '12.6'\n"


def distribution(suite: Suite, name: str, version: str, requires: str = "") -> None:
    folder = suite.folder / "site" / f"{name}-{version}.dist-info"
    folder.mkdir(parents=True)
    need = f"Requires-Dist: {requires}\n" if requires else ""
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{need}")


def installed(suite: Suite, torch: str = "2.7.1", module: str = TORCH) -> None:
    distribution(suite, "torch", torch)
    suite.module("torch", module)
    distribution(suite, "triton", "3.3.1")
    suite.module("triton", "__version__ = '3.3.1'\n")
