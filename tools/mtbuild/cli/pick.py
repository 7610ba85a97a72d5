"""`mtbuild pick`: choose the released image for a GPU and driver, with reasons."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from mtbuild.cli._release import believed, json_option, key_option, open_release, release_option

if TYPE_CHECKING:
    from pathlib import Path

    from mtbuild.cli import App
    from mtbuild.publish.pick import Choice
    from mtbuild.publish.policy import Channel


@click.command("pick")
@click.option("--gpu", metavar="NAME", help='The GPU\'s name, with or without its vendor: "RTX 4090".')
@click.option("--sm", metavar="X.Y", help="Its compute capability instead: 8.9.")
@click.option("--driver", metavar="VERSION", help="The host's NVIDIA driver: 570.86.")
@click.option(
    "--vram", "vram_gib", type=float, metavar="GIB", help="The GPU's memory, to compare with what ran."
)
@click.option(
    "--channel",
    type=click.Choice(["verified", "checked"]),
    default="verified",
    show_default=True,
    help="checked: also images that no GPU vouches for.",
)
@click.option(
    "--expected", is_flag=True, help="Admit images that have code for this GPU but never ran on it."
)
@release_option
@key_option
@json_option
@click.pass_obj
def command(
    app: App,
    gpu: str | None,
    sm: str | None,
    driver: str | None,
    vram_gib: float | None,
    channel: Channel,
    expected: bool,
    release_name: str | None,
    key_files: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Choose the released image for a GPU and driver, with reasons.

    Reads the signed catalog and nothing else. Best first: images that passed on this very model, then on
    its compute capability, then (with --expected, or in channel checked) those that have code for it.

    Exit code 0 with a pick, 1 if nothing fits (each image says why), 2 for bad input.

    \b
    Examples:
      mtbuild pick --gpu "RTX 4090" --driver 570.86
      mtbuild pick --sm 9.0 --release ghcr.io/acme/multitalk --key publisher.pub --json
      mtbuild pick --channel checked
    """
    from mtbuild.errors import MtbuildError
    from mtbuild.publish import catalog
    from mtbuild.publish.pick import Wish, pick

    wish = Wish.of(gpu=gpu, sm=sm, driver=driver, vram_gib=vram_gib, channel=channel, expected=expected)
    keys = believed(app, key_files)
    with open_release(app, release_name) as repository:
        listed = catalog.read(repository, keys)
        if listed is None:
            msg = f"{repository.name} has no catalog: nothing was ever released there"
            raise MtbuildError(msg, fix="publish a cell first (`mtbuild matrix`), or name another --release")
    choice = pick(listed, wish)
    if as_json:
        click.echo(json.dumps(choice.to_json(), indent=2, ensure_ascii=False))
    else:
        _show(choice)


def _show(choice: Choice) -> None:
    from mtbuild.publish.gpus import highest

    winner = choice.winner
    image = winner.entry.image
    floor = highest(image.floors, choice.wish.sm)
    click.echo(choice.name)
    click.echo(f"  match     {winner.match}: {_why(choice)}")
    for note in winner.notes:
        click.echo(f"  note      {note}")
    versions = [f"torch {image.torch}", f"CUDA {image.cuda}", f"triton {image.triton}"]
    versions += [f"xformers {image.xformers}"] if image.xformers else []
    click.echo(f"  versions  {' · '.join([*versions, f'Python {image.python}'])}")
    click.echo(f"  driver    {floor.driver} or newer, for {floor.component}")
    click.echo(f"  size      {image.size_bytes / 1e9:.2f} GB to pull")
    for run in winner.entry.runs:
        on = f"{run.device.name}, driver {run.device.driver}" if run.device else "CPU"
        click.echo(
            f"  evidence  {run.evidence}  {'passed' if run.passed else 'FAILED'} on {on}, {run.finished}"
        )
    click.echo(f"  verdict   {winner.entry.verdict}  {winner.entry.channel} on {winner.entry.verified_at}")
    click.echo(f"  expires   {winner.entry.expires or 'not told by this catalog'}")
    click.echo(f"  run       {choice.docker_run}")
    click.echo(f"  verify    mtbuild verify {choice.name}")
    if choice.others:
        click.echo("others:")
        for other in choice.others:
            click.echo(f"  {other.entry.image.tag}: {other.lost}")


def _why(choice: Choice) -> str:
    run = choice.winner.run
    if run is not None and run.device is not None:
        if choice.winner.match == "expected":
            return f"its run on {run.device.name} is too old ({run.finished})"
        return f"passed on {run.device.name} with driver {run.device.driver} ({run.finished})"
    if choice.wish.sm is None:
        return "no GPU was named, and none vouches for it"
    return f"has code for sm_{choice.wish.sm.replace('.', '')}, never ran there"
