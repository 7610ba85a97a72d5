"""The table of a run: every cell with state, time, size, digest and reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mtbuild.plan.cell import Cell, Finding
    from mtbuild.plan.matrix import Matrix
    from mtbuild.plan.planned import Planned
    from mtbuild.run import Outcome

__all__ = ["findings_text", "human_bytes", "human_seconds", "outcome_table", "plan_table", "show"]

_COLOURS = {
    "published": "green",
    "checked": "green",
    "planned": "cyan",
    "degraded": "yellow",
    "refused": "yellow",
    "excluded": "dim",
    "failed": "red",
    "error": "red",
}


def show(table: Table) -> None:
    """Print on stdout, as wide as the terminal, and wide enough for a log file."""
    console = Console(soft_wrap=False)
    if not console.is_terminal:
        console = Console(width=150, no_color=True, highlight=False)
    console.print(table)


def plan_table(planned: Sequence[Planned], matrix: Matrix) -> Table:
    """Every cell, planned, degraded, refused or excluded, with the reason."""
    table = _table("cell", "torch", "cuda", "xformers", "triton", "python", "state", "reason")
    for item in planned:
        state = item.state if item.state != "refused" or item.cell.expect != "refused" else "refused"
        reason = item.reason or (
            "" if item.cell.expect == "published" else "but matrix.yaml expects a refusal"
        )
        if item.state == "refused" and item.cell.expect == "refused":
            reason = f"as expected: {reason}"
        table.add_row(*_versions(item.cell), _state(state), reason)
    for out in matrix.excluded:
        link = f" ({out.link})" if out.link else ""
        table.add_row(*_versions(out.cell), _state("excluded"), out.reason + link)
    return table


def outcome_table(outcomes: Sequence[Outcome]) -> Table:
    """What became of each cell."""
    table = _table("cell", "id", "state", "time", "size", "digest", "reason")
    for outcome in outcomes:
        reason = outcome.reason
        if outcome.state == "refused" and outcome.as_expected:
            reason = f"as expected: {reason}"
        if not reason and outcome.reused:
            reason = f"unchanged: {', '.join(outcome.reused)}"
        table.add_row(
            outcome.cell.name,
            outcome.cell.id,
            _state(outcome.state),
            human_seconds(outcome.seconds) if outcome.seconds else "",
            human_bytes(outcome.size_bytes) if outcome.size_bytes else "",
            outcome.digest.removeprefix("sha256:")[:12],
            reason,
        )
    return table


def findings_text(cell: Cell, findings: Sequence[Finding]) -> str:
    """All findings of a cell, each with its source and its fix."""
    if not findings:
        return f"{cell.name} ({cell.id}): no rule objects"
    lines = [f"{cell.name} ({cell.id}):"]
    for finding in findings:
        lines.append(f"  {finding.severity}: {finding.message}  [{finding.rule}]")
        lines.append(f"    source: {finding.source}")
        if finding.fix:
            lines.append(f"    fix:    {finding.fix}")
    return "\n".join(lines)


def human_bytes(count: int) -> str:
    """`3.13 GB`: decimal units, three digits."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def human_seconds(seconds: float) -> str:
    """`4.1 s` or `6 min 12 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        wrap = column in ("reason",)
        table.add_column(
            column,
            no_wrap=not wrap,
            overflow="fold",
            justify="right" if column in ("time", "size") else "left",
        )
    return table


def _versions(cell: Cell) -> tuple[str, ...]:
    return (cell.name, cell.torch, cell.cuda, cell.xformers or "-", cell.triton, cell.python)


def _state(state: str) -> Text:
    return Text(state, style=_COLOURS[state])
