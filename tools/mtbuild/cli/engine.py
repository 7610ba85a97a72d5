"""`mtbuild engine`: the embedded engine and registry."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mtbuild.cli import App
    from mtbuild.prove.engine import Engine


@click.group(name="engine")
def command() -> None:
    """Start, stop or remove the embedded engine and registry.

    The engine (Docker with BuildKit) is used where neither DOCKER_HOST nor a running engine is found. It
    lives in the user's cache folder and is shared by all clones; the registry belongs to the project.

    \b
    Examples:
      mtbuild engine start            set up what is missing, start both, say what is used
      mtbuild engine status --json
      mtbuild engine stop
      mtbuild engine prune            remove unused images and build cache
      mtbuild engine clean --yes      remove the engine with its images and build cache
    """


@command.command()
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_obj
def start(app: App, as_json: bool) -> None:
    """Start engine and registry; set up what is missing.

    \b
    Example:
      mtbuild engine start
    """
    from mtbuild.prove import embedded
    from mtbuild.prove.engine import connect

    engine = connect(app.paths, bootstrap=True, note=app.note)
    registry = embedded.ensure_registry(app.paths, note=app.note)
    _show(_described(engine, registry), as_json=as_json)


@command.command()
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_obj
def status(app: App, as_json: bool) -> None:
    """Say which engine would be used, and whether it answers (exit code 3 if none does).

    \b
    Example:
      mtbuild engine status --json
    """
    from mtbuild.prove import embedded
    from mtbuild.prove.engine import connect

    engine = connect(app.paths)
    _show(_described(engine, embedded.registry_address(app.paths)), as_json=as_json)


@command.command()
@click.pass_obj
def stop(app: App) -> None:
    """Stop the embedded engine (with its containers) and the registry. What they hold stays.

    \b
    Example:
      mtbuild engine stop
    """
    from mtbuild.prove import embedded

    ran = embedded.stop_engine(app.paths)
    served = embedded.stop_registry(app.paths)
    click.echo("engine: " + ("stopped" if ran else "was not running"))
    click.echo("registry: " + ("stopped" if served else "was not running"))


@command.command()
@click.option("--registry", is_flag=True, help="Also remove every image in the project's registry.")
@click.option("--yes", is_flag=True, help="Don't ask.")
@click.pass_obj
def clean(app: App, registry: bool, yes: bool) -> None:
    """Stop the embedded engine and remove it with all its images, build cache and programs.

    The registry with what was published stays, unless `--registry` is given.

    \b
    Example:
      mtbuild engine clean --yes
    """
    from mtbuild.prove import embedded

    if not yes:
        click.confirm(f"Remove {app.paths.engine} with all images and build cache?", abort=True)
    freed = embedded.clean_engine(app.paths)
    embedded.stop_registry(app.paths)
    if registry:
        freed += embedded.clean_registry(app.paths)
    click.echo(f"removed; {freed / 1e9:.1f} GB freed")


@command.command()
@click.pass_obj
def prune(app: App) -> None:
    """Remove the engine's unused images and build cache. What was pushed stays in its registry.

    \b
    Example:
      mtbuild engine prune
    """
    from mtbuild.prove import engine as engines

    freed = engines.prune(engines.connect(app.paths))
    click.echo(f"{freed / 1e9:.1f} GB freed")


@command.command()
@click.pass_obj
def tools(app: App) -> None:
    """Fetch the public clients cosign, crane and oras, and print the folder they are in.

    mtbuild itself does not use them: they are for a second opinion on what it signed and published.

    \b
    Example:
      PATH="$(mtbuild engine tools):$PATH" cosign verify-attestation --help
    """
    from mtbuild.prove import embedded

    click.echo(embedded.public_clients(app.paths, note=app.note))


def _described(engine: Engine, registry: str | None) -> dict[str, Any]:
    facts = engine.facts
    return {
        "schema": 1,
        "engine": engine.socket,
        "origin": engine.origin,
        "version": facts.version,
        "store": facts.store,
        "driver": facts.driver,
        "data_root": str(facts.data_root),
        "docker": str(engine.docker),
        "buildx": engine.buildx[-1],
        "registry": registry,
    }


def _show(described: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(described, indent=2))
        return
    for key, value in described.items():
        if key != "schema":
            click.echo(f"{key:10} {value if value is not None else 'not running'}")
