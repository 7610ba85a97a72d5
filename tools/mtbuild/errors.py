"""Every failure a user can act on: what happened, why, and what to do about it.

    MtbuildError                exit 1   a cell failed, was refused unexpectedly, or a verdict says no
    ├── InputError              exit 2   something the user wrote is wrong: names file, line, key
    └── InfrastructureError     exit 3   engine, registry, network, disk: nothing was changed
        └── CommandError                 a program that mtbuild ran did not succeed

The library raises these; only the CLI turns them into text and an exit code.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["CommandError", "InfrastructureError", "InputError", "MtbuildError", "did_you_mean"]


class MtbuildError(Exception):
    """A failure with its fix. `message` says what and why, `fix` what to do, `exit_code` is the process's."""

    exit_code = 1

    def __init__(self, message: str, *, fix: str = "", where: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix
        self.where = where  # "matrix.yaml:12 cells[3].torch", or empty

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text}\n  fix: {self.fix}" if self.fix else text


class InputError(MtbuildError):
    """Raised for anything the user wrote that can't be used; `where` names file, line and key."""

    exit_code = 2


class InfrastructureError(MtbuildError):
    """Raised when engine, registry, network or disk stop the work; state is as it was before."""

    exit_code = 3


class CommandError(InfrastructureError):
    """Raised when a program ended badly. `returncode` is None if it was not found or ran out of time."""

    def __init__(self, message: str, *, returncode: int | None, output: str = "", fix: str = "") -> None:
        super().__init__(message, fix=fix)
        self.returncode = returncode
        self.output = output


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'v73'?` for a close match, else an empty string."""
    close = get_close_matches(word, sorted(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
