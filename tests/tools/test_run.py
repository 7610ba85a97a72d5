"""The walk: which acts a cell goes through, and what its outcome and the exit code say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mtbuild.errors import CommandError, MtbuildError
from mtbuild.plan.cell import Finding
from mtbuild.plan.matrix import load
from mtbuild.plan.planned import Planned
from mtbuild.run import Acts, Built, Outcome, Progress, Proof, Released, exit_code, walk

if TYPE_CHECKING:
    from collections.abc import Callable

    from mtbuild.plan.cell import Cell

MATRIX = load(Path(__file__).parents[2] / "matrix.yaml")
V72, V73, T280 = (MATRIX.cell(name) for name in ("v72", "v73", "t280"))
NO_COMPILER = Finding(
    rule="compiler", severity="refused", message="no C compiler", source="the cell", fix="add one"
)


class Recorded:
    """Acts that write down what was asked of them; `faults` says which raises what."""

    def __init__(
        self, *, problems: tuple[str, ...] = (), faults: dict[str, BaseException] | None = None
    ) -> None:
        self.problems = problems
        self.faults = faults or {}
        self.calls: list[str] = []

    def _enter(self, act: str, cell: Cell, note: Callable[[str], None]) -> None:
        self.calls.append(f"{act} {cell.name}")
        note(f"{act}ing")
        if act in self.faults:
            raise self.faults[act]

    def build(self, cell: Cell, note: Callable[[str], None]) -> Built:
        self._enter("build", cell, note)
        return Built(digest="sha256:" + "0" * 64, size_bytes=5, reused=True)

    def prove(self, cell: Cell, note: Callable[[str], None]) -> Proof:
        self._enter("prove", cell, note)
        return Proof(problems=self.problems, reused=False)

    def attest_failure(self, cell: Cell, note: Callable[[str], None]) -> None:
        self._enter("attest_failure", cell, note)

    def publish(self, cell: Cell, note: Callable[[str], None]) -> Released:
        self._enter("publish", cell, note)
        return Released(channel="checked", tags=("t-checked",), reused=False)


def only(planned: Planned, acts: Acts) -> Outcome:
    (outcome,) = walk([planned], [planned.cell], acts)
    return outcome


def test_a_good_cell_goes_through_all_acts_and_says_what_was_reused() -> None:
    acts, seen = Recorded(), list[Progress]()
    (outcome,) = walk([Planned(cell=V73, findings=())], [V73], acts, progress=seen.append)
    assert acts.calls == ["build v73", "prove v73", "publish v73"]
    assert (outcome.state, outcome.as_expected, outcome.tags) == ("checked", True, ("t-checked",))
    assert outcome.reused == ("build",)
    assert [(step.act, step.text) for step in seen] == [
        ("build", "building"),
        ("smoke", "proveing"),
        ("publish", "publishing"),
    ]


def test_a_refused_cell_is_never_built_and_is_as_expected_only_where_the_matrix_says_so() -> None:
    acts = Recorded()
    expected = only(Planned(cell=V72, findings=(NO_COMPILER,)), acts)
    surprise = only(Planned(cell=V73, findings=(NO_COMPILER,)), acts)
    assert acts.calls == []
    assert (expected.state, expected.as_expected, expected.reason) == ("refused", True, "no C compiler")
    assert (surprise.state, surprise.as_expected) == ("refused", False)
    assert exit_code([expected]) == 0
    assert exit_code([expected, surprise]) == 1


def test_a_cell_that_was_not_asked_for_ends_planned() -> None:
    acts = Recorded()
    (outcome,) = walk([Planned(cell=T280, findings=())], [V73], acts)
    assert (acts.calls, outcome.state, outcome.as_expected) == ([], "planned", True)


def test_what_the_suite_refuses_is_not_published() -> None:
    acts = Recorded(problems=("compiler: failed", "versions: failed"))
    outcome = only(Planned(cell=V73, findings=()), acts)
    assert acts.calls == ["build v73", "prove v73", "attest_failure v73"]
    assert (outcome.state, outcome.as_expected) == ("refused", False)
    assert outcome.reason == "compiler: failed; versions: failed"


def test_a_cell_that_passes_although_a_refusal_was_expected_is_not_published_either() -> None:
    acts = Recorded()
    outcome = only(Planned(cell=V72, findings=()), acts)
    assert acts.calls == ["build v72", "prove v72"]
    assert (outcome.state, exit_code([outcome])) == ("failed", 1)


@pytest.mark.parametrize("act", ["build", "prove", "publish"])
def test_one_cells_fault_stays_its_own_and_sets_the_exit_code(act: str) -> None:
    cells = [Planned(cell=V73, findings=()), Planned(cell=T280, findings=())]
    away = Recorded(faults={act: CommandError("the registry is away", returncode=None)})
    outcomes = walk(cells, [V73, T280], away)
    assert [outcome.state for outcome in outcomes] == ["error", "error"]
    assert away.calls[-1] == f"{act} t280"
    assert exit_code(outcomes) == 3
    failed = only(cells[0], Recorded(faults={act: MtbuildError("broken")}))
    assert (failed.state, exit_code([failed])) == ("failed", 1)


def test_ctrl_c_is_not_swallowed() -> None:
    with pytest.raises(KeyboardInterrupt):
        only(Planned(cell=V73, findings=()), Recorded(faults={"prove": KeyboardInterrupt()}))
