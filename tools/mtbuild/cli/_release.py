"""What the commands about released images share: which repository, and whose keys are believed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mtbuild.cli import App
    from mtbuild.publish.keys import PublicKey
    from mtbuild.publish.registry import Repository

release_option = click.option(
    "--release",
    "release_name",
    metavar="HOST/REPOSITORY",
    help="Where images are released.  [default: registry.release of matrix.yaml, else the embedded registry]",
)
key_option = click.option(
    "--key",
    "key_files",
    multiple=True,
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The publisher's public key (PEM); may be repeated.  [default: every .mtbuild/keys/*.pub]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def release_of(app: App, name: str | None) -> str:
    """The release repository's name; the embedded registry is started where it is the one."""
    from mtbuild.errors import InputError
    from mtbuild.plan.matrix import RegistrySettings, load
    from mtbuild.prove.registries import registries
    from mtbuild.publish.registry import repository_name

    if name is not None:
        try:
            repository_name(name)
        except InputError as error:
            raise InputError(error.message, where="--release", fix=error.fix) from error
        return name
    settings = load(app.paths.matrix).registry if app.paths.matrix.exists() else RegistrySettings()
    return registries(settings, app.paths, note=app.note).release


def open_release(app: App, name: str | None) -> Repository:
    from mtbuild.publish.registry import Repository

    return Repository.open(release_of(app, name))


def believed(app: App, files: tuple[Path, ...]) -> tuple[PublicKey, ...]:
    from mtbuild.publish.keys import trusted_keys

    return trusted_keys(app.paths.keys, files)
