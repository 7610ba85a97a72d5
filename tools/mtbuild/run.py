"""Walk cells through the three acts: plan → build → smoke → publish.

Each step writes one state file under `.mtbuild/cells/<id>/<build12>/` when it is done, and a step whose
file stands and still holds (same build id, same digest, same suite) is not done again. So a run that was
killed goes on where it was, and a run with nothing changed does nothing. One cell's failure stays its own.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

from mtbuild.errors import InfrastructureError, MtbuildError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mtbuild.plan.cell import Cell
    from mtbuild.plan.planned import Planned

__all__ = ["Acts", "Outcome", "OutcomeState", "Progress", "exit_code", "walk"]

OutcomeState = Literal["published", "checked", "refused", "failed", "planned", "error"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a cell. `ref` is the digest as staged or released, `tags` what names it now.

    `as_expected` is False for a failure, an unexpected refusal, and for a cell that passed although it
    was expected to be refused.
    """

    cell: Cell
    state: OutcomeState
    as_expected: bool
    reason: str = ""
    seconds: float = 0.0
    size_bytes: int | None = None
    digest: str = ""
    tags: tuple[str, ...] = ()
    reused: tuple[str, ...] = ()  # the steps that an earlier run had done
    error: MtbuildError | None = None


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One line of what is going on: which cell, which act, what."""

    cell: Cell
    act: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Built:
    """What the walk needs of a finished build."""

    digest: str
    size_bytes: int | None
    reused: bool


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What the walk needs of a finished smoke run; `problems` is empty where the image passed."""

    problems: tuple[str, ...]
    reused: bool


@dataclass(frozen=True, kw_only=True)
class Released:
    """What the walk needs of a publication: the channel and the tags it has now."""

    channel: Literal["verified", "checked"]
    tags: tuple[str, ...]
    reused: bool


class Acts(Protocol):
    """The three acts, in the order in which `walk` calls them; `mtbuild.acts` has those of this machine."""

    def build(self, cell: Cell, note: Callable[[str], None]) -> Built:
        """Build, or find built."""
        ...

    def prove(self, cell: Cell, note: Callable[[str], None]) -> Proof:
        """Smoke the digest that `build` gave."""
        ...

    def attest_failure(self, cell: Cell, note: Callable[[str], None]) -> None:
        """Attach the evidence of a failed smoke run, so that the digest is known as bad."""
        ...

    def publish(self, cell: Cell, note: Callable[[str], None]) -> Released:
        """Judge the evidence and let the digest out."""
        ...


def walk(
    planned: Sequence[Planned],
    chosen: Sequence[Cell],
    acts: Acts,
    *,
    progress: Callable[[Progress], None] = lambda _: None,
) -> tuple[Outcome, ...]:
    """Every planned cell's outcome, in order; only those in `chosen` are built.

    An infrastructure fault ends its cell with state `error` and the walk goes on: the next cell may still
    be possible. Ctrl-C is not caught: what is done stands in its files.
    """
    wanted = {cell.id for cell in chosen}
    return tuple(_one(item, acts, progress, build=item.cell.id in wanted) for item in planned)


def _one(item: Planned, acts: Acts, progress: Callable[[Progress], None], *, build: bool) -> Outcome:
    cell = item.cell
    if not item.buildable:
        return Outcome(cell=cell, state="refused", as_expected=item.as_expected, reason=item.reason)
    if not build:
        return Outcome(cell=cell, state="planned", as_expected=True, reason=item.reason)
    started = time.monotonic()
    outcome = Outcome(cell=cell, state="error", as_expected=False)

    def note(act: str) -> Callable[[str], None]:
        return lambda text: progress(Progress(cell=cell, act=act, text=text))

    try:
        built = acts.build(cell, note("build"))
        outcome = replace(
            outcome, digest=built.digest, size_bytes=built.size_bytes, reused=_if(built.reused, "build")
        )
        proof = acts.prove(cell, note("smoke"))
        outcome = replace(outcome, reused=(*outcome.reused, *_if(proof.reused, "smoke")))
        if proof.problems:
            acts.attest_failure(cell, note("publish"))
            # Refused by the suite: for a cell that expects a refusal that is what should happen.
            outcome = replace(
                outcome,
                state="refused",
                as_expected=cell.expect == "refused",
                reason="; ".join(proof.problems),
            )
        elif cell.expect == "refused":
            reason = "passed although matrix.yaml expects a refusal, so it was not published"
            outcome = replace(outcome, state="failed", reason=reason)
        else:
            released = acts.publish(cell, note("publish"))
            outcome = replace(
                outcome,
                state="published" if released.channel == "verified" else "checked",
                as_expected=True,
                reason=item.reason,  # of a degraded cell: how it is degraded
                tags=released.tags,
                reused=(*outcome.reused, *_if(released.reused, "publish")),
            )
    except InfrastructureError as error:
        outcome = replace(outcome, state="error", reason=error.message, error=error)
    except MtbuildError as error:
        outcome = replace(outcome, state="failed", reason=error.message, error=error)
    return replace(outcome, seconds=time.monotonic() - started)


def _if(reused: bool, step: str) -> tuple[str, ...]:
    return (step,) if reused else ()


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """0 all as expected · 3 an infrastructure fault (nothing can be said of its cell) · else 1."""
    if any(outcome.state == "error" for outcome in outcomes):
        return 3
    return 0 if all(outcome.as_expected for outcome in outcomes) else 1
