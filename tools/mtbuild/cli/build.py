"""`mtbuild build`: one cell, from its committed files to a digest in staging."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mtbuild.cli import App
    from mtbuild.plan.cell import Cell
    from mtbuild.plan.matrix import Matrix


@click.command("build")
@click.argument("cell")
@click.option(
    "--override-compat",
    "override",
    metavar="REASON",
    help="Build a refused cell for study. The build is marked and can never be published.",
)
@click.option("--base", metavar="REF@sha256:…", help="Stand on this image instead of the cell's own base.")
@click.option("--json", "as_json", is_flag=True, help="Print {cell, build_id, ref} as JSON.")
@click.pass_obj
def command(app: App, cell: str, override: str | None, base: str | None, as_json: bool) -> None:
    """Build one cell and push it to staging; print its digest. A cell that the rules refuse is not built.

    The rules are asked before any wheel is downloaded, and the free space before anything is written. What
    was built from the same inputs, and is still in staging, is not built again.

    \b
    Examples:
      mtbuild build v73
      mtbuild build v73 --json | jq -r .ref
      mtbuild build v72 --override-compat "to see the suite refuse it"
    """
    from mtbuild.digest import Reference
    from mtbuild.errors import InputError
    from mtbuild.plan.matrix import load
    from mtbuild.prove.build import build, committed
    from mtbuild.prove.engine import connect
    from mtbuild.prove.registries import registries

    if override is not None and not override.strip():
        msg = "--override-compat needs a reason: it is written into the image"
        raise InputError(msg, fix='say why, e.g. --override-compat "to see the suite refuse it"')
    matrix = load(app.paths.matrix)
    chosen = matrix.cell(cell)
    if override is None:
        _judge(app, matrix, chosen)
    committed(chosen, app.paths)  # an out-of-date lock is said before engine or registry is touched
    engine = connect(app.paths, bootstrap=False, note=app.note)
    done = build(
        chosen,
        paths=app.paths,
        engine=engine,
        staging=registries(matrix.registry, app.paths, note=app.note).staging,
        override=override,
        base=Reference.parse(base) if base else None,
        note=app.note,
    )
    if as_json:
        click.echo(json.dumps({"cell": done.cell_id, "build_id": done.build_id, "ref": str(done.ref)}))
    else:
        click.echo(str(done.ref))


def _judge(app: App, matrix: Matrix, cell: Cell) -> None:
    """Refuse, with every reason and its fix, before anything is downloaded."""
    from mtbuild.errors import MtbuildError
    from mtbuild.plan.index import Index
    from mtbuild.plan.planned import plan
    from mtbuild.plan.wheels import Wheels
    from mtbuild.table import findings_text

    (planned,) = plan([cell], Wheels(Index.from_environment(), app.paths.facts, app.note))
    if not planned.buildable:
        msg = f"{cell.name} is refused\n{findings_text(cell, planned.findings)}"
        raise MtbuildError(
            msg,
            where=cell.where,
            fix='change the cell in matrix.yaml, or build it for study with --override-compat "REASON"',
        )
