"""`mtbuild catalog`: show or rebuild the signed catalog that `pick` reads."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from mtbuild.cli._release import believed, json_option, key_option, open_release, release_option

if TYPE_CHECKING:
    from pathlib import Path

    from mtbuild.cli import App
    from mtbuild.publish.catalog import Catalog


@click.group("catalog")
def command() -> None:
    """Show or rebuild the signed catalog that `pick` reads.

    \b
    Examples:
      mtbuild catalog show
      mtbuild catalog show --release ghcr.io/acme/multitalk --key publisher.pub --json
      mtbuild catalog rebuild
    """


@command.command("show")
@release_option
@key_option
@json_option
@click.pass_obj
def show(app: App, release_name: str | None, key_files: tuple[Path, ...], as_json: bool) -> None:
    """Verify the catalog's signature and show its entries.

    \b
    Example:
      mtbuild catalog show --json
    """
    from mtbuild.errors import MtbuildError
    from mtbuild.publish import catalog

    keys = believed(app, key_files)
    with open_release(app, release_name) as repository:
        listed = catalog.read(repository, keys)
        if listed is None:
            msg = f"{repository.name} has no catalog: nothing was ever released there"
            raise MtbuildError(msg, fix="publish a cell first (`mtbuild matrix`)")
    _print(listed, as_json=as_json)


@command.command("rebuild")
@release_option
@json_option
@click.pass_obj
def rebuild(app: App, release_name: str | None, as_json: bool) -> None:
    """Make the catalog anew from the repository's tags and the evidence attached to them, and sign it.

    \b
    Example:
      mtbuild catalog rebuild
    """
    from mtbuild.publish import catalog
    from mtbuild.publish.keys import Keys
    from mtbuild.publish.promote import release_lock

    with open_release(app, release_name) as repository, release_lock(app.paths, repository.name):
        made = catalog.rebuild(
            repository, Keys.ensure(app.paths.keys), note=lambda text: app.note(f"  {text}")
        )
    _print(made, as_json=as_json)


def _print(listed: Catalog, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(json.loads(listed.to_bytes()), indent=2, ensure_ascii=False))
        return
    click.echo(
        f"{listed.repository}:catalog, {len(listed.entries)} entries, updated {listed.updated or 'never'}"
    )
    for entry in listed.entries:
        on = [
            f"{run.device.name if run.device else 'CPU'} {'✓' if run.passed else '✗'}" for run in entry.runs
        ]
        until = "REFUSED since" if entry.objections else f"until {entry.expires or '?'}"
        click.echo(f"  {entry.channel:<8}  {entry.image.tag}  {entry.digest.short}  {until}  {', '.join(on)}")
