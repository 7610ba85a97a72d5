"""`mtbuild publish`: let a proven digest out under its release tags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mtbuild.cli._release import json_option, release_of, release_option

if TYPE_CHECKING:
    from mtbuild.cli import App
    from mtbuild.digest import Reference
    from mtbuild.plan.cell import Cell
    from mtbuild.prove.build import Build
    from mtbuild.publish.dsse import Envelope
    from mtbuild.publish.keys import Keys
    from mtbuild.publish.policy import Channel
    from mtbuild.publish.promote import Promotion

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("publish")
@click.argument("reference", metavar="REF@sha256:…")
@click.option("--cell", "cell_name", required=True, metavar="CELL", help="The cell that it was built from.")
@click.option(
    "--evidence",
    "files",
    multiple=True,
    type=_FILE,
    metavar="FILE",
    help="What `mtbuild smoke --out` wrote; may be repeated. What is attached to the digest counts as well.",
)
@click.option(
    "--build",
    "build_file",
    type=_FILE,
    metavar="FILE",
    help="The build's record.  [default: the one under .mtbuild/cells/ with this digest]",
)
@click.option(
    "--channel",
    type=click.Choice(["auto", "verified", "checked"]),
    default="auto",
    show_default=True,
    help="auto: verified where the evidence given is of a GPU, else checked.",
)
@release_option
@json_option
@click.pass_obj
def command(
    app: App,
    reference: str,
    cell_name: str,
    files: tuple[Path, ...],
    build_file: Path | None,
    channel: str,
    release_name: str | None,
    as_json: bool,
) -> None:
    """Let a proven digest out under its release tags.

    The policy decides from signed evidence for exactly this digest; a refusal says what is missing and what
    to do. Evidence is attached before any tag. Release tags are write-once: the same digest again changes
    nothing, another digest is an error. A build made with --override-compat is never let out.

    Exit code 0 if it is out, 1 if the policy says no, 2 for bad input, 3 where a registry is away.

    \b
    Examples:
      mtbuild publish 127.0.0.1:5100/mt-staging@sha256:… --cell v73 --evidence v73.cpu.json
      mtbuild publish ghcr.io/acme/staging@sha256:… --cell v73 --evidence l4.json --evidence h100.json \\
          --build build.json --channel verified --json
    """
    from mtbuild.digest import Reference
    from mtbuild.errors import MtbuildError
    from mtbuild.plan.matrix import load
    from mtbuild.publish.dsse import Envelope
    from mtbuild.publish.keys import Keys
    from mtbuild.publish.promote import publish

    ref = Reference.parse(reference)
    matrix = load(app.paths.matrix)
    cell = matrix.cell(cell_name)
    build = _build(app, ref, cell, build_file)
    if cell.expect == "refused" and build.override is None:
        msg = f"{cell.name} is a cell that must stay refused"
        raise MtbuildError(msg, where=cell.where, fix="remove `expect: refused` if it may come out now")
    envelopes = [Envelope.load(file) for file in files]
    keys = Keys.ensure(app.paths.keys)
    promotion = publish(
        ref,
        cell=cell,
        build=build,
        envelopes=envelopes,
        release=release_of(app, release_name),
        channel=_channel(channel, envelopes, keys),
        paths=app.paths,
        keys=keys,
        note=lambda text: app.note(f"  {text}"),
        aliases=matrix.aliases_of(cell),
        max_age_days=matrix.policy.max_age_days,
    )
    _show(promotion, as_json=as_json)


def _build(app: App, ref: Reference, cell: Cell, file: Path | None) -> Build:
    from mtbuild.errors import InputError
    from mtbuild.prove.build import Build, builds_of

    if file is not None:
        if not file.is_file():
            msg = "there is no such build record"
            raise InputError(msg, where=f"--build {file}", fix="name the build.json of the build job")
        return Build.load(file)
    for build in builds_of(app.paths, cell.id):
        if build.ref.digest == ref.digest:
            return build
    msg = f"there is no record here of a build of {cell.name} with digest {ref.digest}"
    raise InputError(msg, fix="name it with --build FILE (`.mtbuild/cells/…/build.json` of the build job)")


def _channel(asked: str, envelopes: list[Envelope], keys: Keys) -> Channel:
    from mtbuild.publish import evidence
    from mtbuild.publish.dsse import UnverifiedError

    if asked == "verified":
        return "verified"
    if asked == "checked":
        return "checked"
    for envelope in envelopes:
        try:
            if evidence.verify(envelope, keys.trusted).device is not None:
                return "verified"
        except UnverifiedError:
            continue  # the policy will say so
    return "checked"


def _show(promotion: Promotion, *, as_json: bool) -> None:
    if as_json:
        document = {
            "schema": 1,
            "name": promotion.name,
            "repository": promotion.repository,
            "digest": str(promotion.digest),
            "tags": list(promotion.tags),
            "channel": promotion.channel,
            "changed": promotion.changed,
            "verdict": promotion.verdict.to_json(),
        }
        click.echo(json.dumps(document, indent=2))
        return
    click.echo(promotion.name)
    click.echo(f"  channel  {promotion.channel}, by {len(promotion.verdict.used)} run(s)")
    click.echo(
        f"  tags     {', '.join(promotion.tags)}" + ("" if promotion.changed else "  (nothing to change)")
    )
    click.echo(f"  verify   mtbuild verify {promotion.name}")
