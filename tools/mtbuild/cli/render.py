"""`mtbuild render`: locks and templates into the files that are committed and built."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mtbuild.cli import App


@click.command("render")
@click.argument("cells", nargs=-1, metavar="[CELL]...")
@click.option("--check", "only_check", is_flag=True, help="Write nothing; fail if a file is not as rendered.")
@click.option("--json", "as_json", is_flag=True, help="Print the files as JSON: {cell: [files written]}.")
@click.pass_obj
def command(app: App, cells: tuple[str, ...], only_check: bool, as_json: bool) -> None:
    """Write the Dockerfiles under images/ (names, ids, globs; every locked cell by default), or check them.

    \b
    Examples:
      mtbuild render
      mtbuild render v73
      mtbuild render --check
    """
    from mtbuild.errors import InputError
    from mtbuild.plan.lock import Lock, check, runtime_requirements
    from mtbuild.plan.matrix import load
    from mtbuild.plan.render import render

    matrix = load(app.paths.matrix)
    runtime = runtime_requirements(app.paths.root)
    if cells:
        chosen = matrix.select(cells, where="CELL")
    else:
        chosen = tuple(cell for cell in matrix.cells if (app.paths.images / cell.id).is_dir())
        known = {cell.id for cell in matrix.cells}
        for folder in sorted(app.paths.images.iterdir() if app.paths.images.is_dir() else ()):
            if only_check and folder.is_dir() and folder.name not in known:
                msg = "matrix.yaml has no such cell"
                raise InputError(msg, where=str(folder), fix="remove the folder, or add the cell again")
    result: dict[str, list[str]] = {}
    for cell in chosen:
        folder = app.paths.images / cell.id
        check(cell, folder, runtime=runtime)
        rendered = render(cell, Lock.load(folder), templates=app.paths.templates)
        if only_check:
            rendered.check(folder)
            result[cell.id] = []
        else:
            result[cell.id] = list(rendered.write(folder))
    if as_json:
        click.echo(json.dumps(result))
        return
    for cell_id, written in result.items():
        verdict = "as rendered" if only_check else (f"wrote {', '.join(written)}" if written else "unchanged")
        click.echo(f"images/{cell_id}: {verdict}")
