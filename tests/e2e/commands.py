"""`mtbuild` as a user runs it. A module of its own: `conftest` is the name of several modules here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "Done", "mtbuild"]

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
