"""What a check returns, and what it is given."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class CheckResult:
    """Outcome of one check. `facts` are measurements by dotted name; the rest is text for people."""

    status: str  # passed | failed | degraded | skipped  (the runner adds error and timeout)
    message: str
    detail: str = ""
    diagnosis: str = ""
    fix: str = ""
    facts: dict = field(default_factory=dict)


def passed(message: str, *, detail: str = "", **facts: object) -> CheckResult:
    """It works. Keyword names use `__` for the dot of a fact's name."""
    return CheckResult("passed", message, detail=detail, facts=_named(facts))


def skipped(message: str) -> CheckResult:
    """It does not apply here; where it is required, that is no pass."""
    return CheckResult("skipped", message)


def failed(
    message: str, *, diagnosis: str, fix: str, detail: str = "", status: str = "failed", **facts: object
) -> CheckResult:
    """It does not work: what, why, and what to do."""
    return CheckResult(status, message, detail=detail, diagnosis=diagnosis, fix=fix, facts=_named(facts))


def unsaid(message: str, log: str) -> str:
    """`message` with the exception that `log` has, where a reply only says "internal"."""
    found = re.search(r"^[\w.]+: .+", log, re.MULTILINE) if "internal: " in message else None
    return f"{message}: {found[0]}" if found else message


def _named(facts: dict) -> dict:
    return {name.replace("__", "."): value for name, value in facts.items()}


@dataclass(frozen=True)
class Context:
    """The request, as checks read it."""

    request: dict

    @property
    def cell(self) -> dict | None:
        """The cell that the image should be; None for a foreign image."""
        return self.request["cell"]

    @property
    def tier(self) -> str:
        return self.request["tier"]

    @property
    def cache(self) -> Path:
        return Path(self.request["cache"])

    @property
    def out(self) -> Path:
        return Path(self.request["out"])

    @property
    def targets(self) -> list[str]:
        """Compute capabilities to compile for: the cell's, else the two that most images serve."""
        return (self.cell or {}).get("targets") or ["8.0", "9.0"]

    def fresh(self, name: str) -> Path:
        """A new, empty folder for one check, where compile caches go."""
        return Path(tempfile.mkdtemp(prefix=f"mtbuild-{name}-", dir=self.cache))
