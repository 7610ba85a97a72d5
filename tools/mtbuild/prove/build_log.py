"""BuildKit's plain progress, read: what people want to see of it, and why a build failed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mtbuild.diagnose import diagnose
from mtbuild.errors import CommandError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mtbuild.plan.cell import Cell

__all__ = ["BuildFailed", "Progress", "failure", "step_output"]


class BuildFailed(CommandError):  # noqa: N818 - named for what it says
    """Raised when BuildKit ended badly; `output` is its log, `log` the file that holds all of it."""

    def __init__(self, message: str, *, log: Path, output: str, returncode: int | None, fix: str) -> None:
        super().__init__(message, returncode=returncode, output=output, fix=fix)
        self.log = log


class Progress:
    """From BuildKit's plain progress, what people want to see: which step runs, and how long it took."""

    def __init__(self, name: str, note: Callable[[str], None]) -> None:
        self._name, self._note = name, note
        self._steps: dict[str, str] = {}

    def __call__(self, line: str) -> None:
        number, _, text = line.partition(" ")
        if not number.startswith("#"):
            return
        if text.startswith("[") and "] " in text:
            self._steps[number] = text.partition(" <<")[0].partition("--mount")[0].strip()
        elif text.startswith("exporting to "):
            self._steps[number] = "exporting layers"
        elif text.startswith("DONE ") and float(text[5:].rstrip("s") or 0) >= 1.0:
            self._note(f"{self._name}: {self._steps.get(number, number)[:70]} {text[5:]}")


def failure(error: CommandError, cell: Cell, log: Path) -> BuildFailed:
    """What went wrong, with the end of the log, and the fix where the failure is a known one."""
    output = error.output
    said = step_output(output) or error.message
    message = [f"building {cell.name} failed", *(f"  | {line}" for line in said.splitlines()[-25:])]
    fix = f"see {log}"
    known = diagnose(said) or diagnose(output)
    if known:
        message.append(f"  known failure: {known[0].cause} ({known[0].source})")
        fix = f"{known[0].fix} The whole log: {log}"
    return BuildFailed("\n".join(message), log=log, output=output, returncode=error.returncode, fix=fix)


def step_output(output: str) -> str:
    """What the failed step itself printed: the block that BuildKit puts between two rules."""
    lines = output.splitlines()
    rules = [number for number, line in enumerate(lines) if line == "------"]
    if len(rules) >= 2:
        return "\n".join(line[:300] for line in lines[rules[-2] + 1 : rules[-1]])
    errors = [line[:300] for line in lines if line.startswith("ERROR: ")]
    return errors[-1] if errors else ""
