"""Rules over facts: what is wrong with a cell, why, and the fix. Pure: no I/O.

Metadata is necessary, not sufficient: rules 3 to 9 look at what no resolver looks at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mtbuild.plan import rules_host, rules_metadata, rules_native

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mtbuild.plan.cell import Cell, Finding, State
    from mtbuild.plan.facts import CellFacts

__all__ = ["RULES", "is_buildable", "judge", "state_of"]

# In the order of the checks: cheap and decisive ones first.
RULES: tuple[Callable[[Cell, CellFacts], Iterator[Finding]], ...] = (
    rules_metadata.files,
    rules_metadata.requires_python,
    rules_metadata.requires_dist,
    rules_metadata.markers,
    rules_metadata.cuda_named,
    rules_metadata.numpy,
    rules_native.native_code,
    rules_native.architectures,
    rules_host.drivers,
    rules_host.flash_window,
    rules_host.placeholders,
    rules_host.compiler,
)


def judge(cell: Cell, facts: CellFacts) -> tuple[Finding, ...]:
    """All findings, in the order of the checks. Every rule runs: one reason must not hide another."""
    return tuple(dict.fromkeys(finding for rule in RULES for finding in rule(cell, facts)))


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
