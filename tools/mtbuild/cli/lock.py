"""`mtbuild lock`: a cell's versions into exact wheels."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mtbuild.cli import App


@click.command("lock")
@click.argument("cells", nargs=-1, metavar="[CELL]...")
@click.option("--check", "only_check", is_flag=True, help="Write nothing; fail if a lock is out of date.")
@click.option("--json", "as_json", is_flag=True, help="Print what was locked as JSON.")
@click.pass_obj
def command(app: App, cells: tuple[str, ...], only_check: bool, as_json: bool) -> None:
    """Freeze the wheels of cells (names, ids, globs; all that can be locked by default) with their hashes.

    Writes `images/<cell>/requirements.lock` and `cell.json`, then renders the Dockerfile that goes with them.
    Without CELL, --check looks at the locks that are committed.

    \b
    Examples:
      mtbuild lock v73
      mtbuild lock 't2*'
      mtbuild lock --check
    """
    from mtbuild.plan.index import Index
    from mtbuild.plan.lock import Lock, check, make_lock, runtime_requirements
    from mtbuild.plan.matrix import load
    from mtbuild.plan.render import render
    from mtbuild.plan.wheels import Wheels

    matrix = load(app.paths.matrix)
    runtime = runtime_requirements(app.paths.root)
    chosen = matrix.select(cells, where="CELL") if cells else matrix.cells
    if only_check:
        if not cells:
            chosen = tuple(cell for cell in chosen if (app.paths.images / cell.id).is_dir())
        for cell in chosen:
            check(cell, app.paths.images / cell.id, runtime=runtime)
        locks = [Lock.load(app.paths.images / cell.id) for cell in chosen]
        app.note(f"{len(locks)} locks are up to date")
    else:
        if not cells:
            # Files of another host have no index to lock them against.
            chosen = tuple(cell for cell in chosen if cell.base.kind != "import")
        index = Index.from_environment(cache=app.paths.cache, note=app.note)
        wheels = Wheels(index, app.paths.facts, app.note)
        locks = []
        for cell in chosen:
            lock = make_lock(cell, index=index, note=app.note, runtime=runtime, wheels=wheels)
            written = render(cell, lock, templates=app.paths.templates).write(app.paths.images / cell.id)
            app.note(f"{cell.name}: " + (f"wrote {', '.join(written)}" if written else "unchanged"))
            locks.append(lock)
    if as_json:
        rows = [
            {
                "id": lock.cell_id,
                "name": lock.name,
                "wheels": len(lock.wheels),
                "download_bytes": lock.download_bytes,
                "unpacked_bytes": lock.unpacked_bytes,
            }
            for lock in locks
        ]
        click.echo(json.dumps({"schema": 1, "cells": rows}))
    else:
        for lock in locks:
            click.echo(
                f"{lock.name}  {lock.cell_id}: {len(lock.wheels)} wheels, "
                f"{lock.download_bytes / 1e9:.2f} GB, unpacked {lock.unpacked_bytes / 1e9:.2f} GB"
            )
