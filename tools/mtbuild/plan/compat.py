"""Rules over facts: what is wrong with a cell, why, and the fix. Pure: no I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtbuild.plan.cell import Cell, Finding, State
    from mtbuild.plan.facts import CellFacts

__all__ = ["is_buildable", "judge", "state_of"]


def judge(cell: Cell, facts: CellFacts) -> tuple[Finding, ...]:
    """All findings, in the order of the checks: cheap and decisive ones first."""
    raise NotImplementedError


def state_of(cell: Cell, findings: tuple[Finding, ...]) -> State:
    """The worst of the findings: "refused", "degraded" or "planned"."""
    severities = {finding.severity for finding in findings}
    if "refused" in severities:
        return "refused"
    return "degraded" if "degraded" in severities else "planned"


def is_buildable(cell: Cell, findings: tuple[Finding, ...]) -> bool:
    """Planned cells are; a degraded one only where the cell allows it."""
    state = state_of(cell, findings)
    return state == "planned" or (state == "degraded" and "degraded" in cell.allow)
