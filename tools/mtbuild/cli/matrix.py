"""`mtbuild matrix`: the main job."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mtbuild.cli import App
    from mtbuild.plan.cell import Cell
    from mtbuild.plan.matrix import Matrix
    from mtbuild.plan.planned import Planned
    from mtbuild.run import Outcome, Progress


@click.command("matrix")
@click.option("--plan", "only_plan", is_flag=True, help="Say what would be done, and why not; build nothing.")
@click.option("--why", "why", metavar="CELL", help="Everything the rules say of one cell.")
@click.option(
    "--only",
    "selectors",
    multiple=True,
    metavar="GLOB",
    help="Run just these cells: name or id, with globs and braces. May be repeated.",
)
@click.option("--group", metavar="NAME", help="Run the cells of this group.  [default: embedded]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--github", is_flag=True, help="With --plan: job matrices for GitHub Actions, as JSON.")
@click.pass_obj
def command(
    app: App,
    only_plan: bool,
    why: str | None,
    selectors: tuple[str, ...],
    group: str | None,
    as_json: bool,
    github: bool,
) -> None:
    """Plan, build, prove and publish every cell of matrix.yaml; refuse what can't work, with the reason.

    Without --only or --group this runs the group `embedded`; the other cells end `planned`. What an earlier
    run has done and still holds is not done again.

    \b
    Examples:
      mtbuild matrix                       the whole job
      mtbuild matrix --plan                every cell: planned, degraded or refused, and why
      mtbuild matrix --why v72             all findings on one cell, with sources and fixes
      mtbuild matrix --only 't2{80,91}'    two more cells
      mtbuild matrix --plan --github       job matrices for a workflow's fromJSON
    """
    from mtbuild.errors import InputError
    from mtbuild.plan.matrix import load

    if selectors and group:
        msg = "--only and --group exclude each other"
        raise InputError(msg, fix="name the cells with --only, or a group with --group")
    if github and not only_plan:
        msg = "--github prints a plan"
        raise InputError(msg, fix="add --plan")
    matrix = load(app.paths.matrix)
    for line in matrix.expired:
        app.note(f"note: {line}")
    chosen = _chosen(matrix, selectors, group)
    if why is not None:
        _why(app, matrix, why, as_json=as_json)
        return
    # A plan of chosen cells judges just these; a bare plan or run shows every cell.
    planned = _plan(app, chosen if selectors or (only_plan and group) else matrix.cells)
    if only_plan:
        _show_plan(matrix, planned, as_json=as_json, github=github)
        raise click.exceptions.Exit(0 if all(item.as_expected for item in planned) else 1)
    asked = bool(selectors or group)
    raise click.exceptions.Exit(_run(app, matrix, planned, chosen, asked=asked, as_json=as_json))


def _chosen(matrix: Matrix, selectors: tuple[str, ...], group: str | None) -> tuple[Cell, ...]:
    if selectors:
        return matrix.select(selectors)
    if group is None and "embedded" not in matrix.groups:
        return matrix.cells
    return matrix.group(group or "embedded")


def _plan(app: App, cells: Sequence[Cell]) -> tuple[Planned, ...]:
    from mtbuild.plan.index import Index
    from mtbuild.plan.planned import plan
    from mtbuild.plan.wheels import Wheels

    wheels = Wheels(Index.from_environment(), app.paths.facts, app.note)
    return plan(cells, wheels)


def _why(app: App, matrix: Matrix, key: str, *, as_json: bool) -> None:
    from mtbuild.plan.planned import plan_json
    from mtbuild.table import findings_text

    (planned,) = _plan(app, [matrix.cell(key)])
    if as_json:
        click.echo(json.dumps(plan_json([planned], matrix), indent=2, ensure_ascii=False))
    else:
        click.echo(findings_text(planned.cell, planned.findings))


def _show_plan(matrix: Matrix, planned: Sequence[Planned], *, as_json: bool, github: bool) -> None:
    from mtbuild.plan.planned import github_json, plan_json
    from mtbuild.table import findings_text, plan_table, show

    if github:
        click.echo(json.dumps(github_json(planned), separators=(",", ":")))
    elif as_json:
        click.echo(json.dumps(plan_json(planned, matrix), indent=2, ensure_ascii=False))
    else:
        show(plan_table(planned, matrix))
        for item in planned:
            if item.findings:
                click.echo(findings_text(item.cell, item.findings) + "\n")


def _run(
    app: App,
    matrix: Matrix,
    planned: Sequence[Planned],
    chosen: Sequence[Cell],
    *,
    asked: bool,
    as_json: bool,
) -> int:
    from mtbuild.acts import LocalActs, pick_line
    from mtbuild.errors import MtbuildError
    from mtbuild.run import exit_code, walk
    from mtbuild.table import findings_text, outcome_table, show

    for item in planned:
        if not item.buildable:
            app.note(findings_text(item.cell, item.findings))
    acts = LocalActs(paths=app.paths, matrix=matrix, planned=planned, note=app.note)
    ready = [item.cell for item in planned if item.buildable and item.cell in chosen]
    if asked and ready:  # more than the default may be more than the disk holds
        with suppress(MtbuildError):  # an engine that is away is told with each cell
            for line in acts.disk_plan(ready):
                app.note(line)
    outcomes = walk(planned, chosen, acts, progress=_progress(app))
    if as_json:
        click.echo(json.dumps(_outcomes_json(outcomes), indent=2, ensure_ascii=False))
        return exit_code(outcomes)
    show(outcome_table(outcomes))
    for outcome in outcomes:
        if outcome.error is not None:
            click.echo(f"{outcome.cell.name}: {outcome.error}\n", err=True)
        elif not outcome.as_expected:
            click.echo(f"{outcome.cell.name}: not as expected: {outcome.reason}\n", err=True)
    for outcome in outcomes:
        line = pick_line(acts, outcome)
        if line:
            click.echo(line)
    return exit_code(outcomes)


def _progress(app: App) -> Callable[[Progress], None]:
    def tell(step: Progress) -> None:
        app.note(f"{step.cell.name} {step.act}: {step.text}")

    return tell


def _outcomes_json(outcomes: Sequence[Outcome]) -> dict[str, object]:
    return {
        "schema": 1,
        "cells": [
            {
                "id": outcome.cell.id,
                "name": outcome.cell.name,
                "state": outcome.state,
                "as_expected": outcome.as_expected,
                "seconds": round(outcome.seconds, 2),
                "size_bytes": outcome.size_bytes,
                "digest": outcome.digest or None,
                "tags": list(outcome.tags),
                "reused": list(outcome.reused),
                "reason": outcome.reason,
            }
            for outcome in outcomes
        ],
    }
