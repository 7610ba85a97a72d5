"""`mtbuild doctor`: check this host."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mtbuild.cli import App

_MARKS = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "fail": ("✗", "red")}


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.pass_obj
def command(app: App, as_json: bool) -> None:
    """Check this host: engine, buildx, disk, GPU, driver, container toolkit or CDI, package sources, index.

    Starts and changes nothing. Exit code 0 if the main job can run here, 3 if something is in its way.

    \b
    Examples:
      mtbuild doctor
      mtbuild doctor --json | jq '.findings[] | select(.level != "ok")'
    """
    from mtbuild.doctor import examine, to_json

    found = examine(app.paths)
    if as_json:
        click.echo(json.dumps(to_json(found), indent=2, ensure_ascii=False))
    else:
        for one in found:
            mark, colour = _MARKS[one.level]
            click.echo(f"{click.style(mark, fg=colour)} {one.topic:10} {one.message}")
            if one.fix:
                click.echo(f"  {'':10} fix: {one.fix}")
    if any(one.level == "fail" for one in found):
        raise click.exceptions.Exit(3)
