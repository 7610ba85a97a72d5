"""The `mtbuild` command. One command a file; a command's module is imported only when it is used."""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from mtbuild.errors import InfrastructureError, InputError, MtbuildError, did_you_mean

if TYPE_CHECKING:
    from mtbuild.paths import Paths

__all__ = ["App", "cli", "main"]

# name → (module under mtbuild.cli, help in one line), so that `mtbuild --help` imports none of them.
_COMMANDS = {
    "matrix": "Plan, build, prove and publish every cell; refuse what can't work, with the reason.",
    "suggest": "Suggest the versions that fit one you have.",
    "lock": "Freeze a cell's wheels with their hashes.",
    "render": "Write the Dockerfiles under images/, or check that they are up to date.",
    "build": "Build one cell and push it to staging.",
    "smoke": "Run the suite in an unmodified container of an image, by digest.",
    "publish": "Let a proven digest out under its release tags.",
    "verify": "Check a published image's evidence, step by step.",
    "pick": "Choose the verified image for a GPU and driver, with reasons.",
    "catalog": "Show or rebuild the signed catalog that `pick` reads.",
    "diagnose": "Name the known failure in a build or run log, its cause and its fix.",
    "doctor": "Check this host: engine, buildx, disk, GPU, driver, container toolkit.",
    "engine": "Start, stop or remove the embedded engine and registry.",
}


@dataclass(kw_only=True)
class App:
    """What every command gets: where the project is, and how to speak."""

    root: Path
    verbose: bool = False

    @property
    def paths(self) -> Paths:
        from mtbuild.paths import Paths

        return Paths.of(self.root)

    def note(self, text: str) -> None:
        """Progress for people, on stderr; stdout is for results."""
        click.echo(text, err=True)


class _Lazy(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = import_module(f"mtbuild.cli.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in _COMMANDS:
            msg = f"there is no command {args[0]!r}.{did_you_mean(args[0], _COMMANDS)}"
            raise InputError(msg, fix="see `mtbuild --help`")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MtbuildError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)
        except OSError as error:  # a full disk or a missing right, wherever it was met
            failure = InfrastructureError(f"{error.filename or ''}: {error.strerror or error}".lstrip(": "))
            click.echo(f"error: {failure}", err=True)
            ctx.exit(failure.exit_code)


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path(),
    show_default="here",
    help="The folder that holds matrix.yaml.",
)
@click.option("-v", "--verbose", is_flag=True, help="Show the output of the programs that are run.")
@click.version_option(package_name="mtbuild")
@click.pass_context
def cli(ctx: click.Context, root: Path, verbose: bool) -> None:
    """Turn a torch × xformers × triton × CUDA matrix into container images, and publish only proven ones.

    \b
    Examples:
      mtbuild matrix                      the whole job, on this machine
      mtbuild matrix --plan               what would be done, and why not
      mtbuild pick --gpu "RTX 4090" --driver 570.86

    Exit codes: 0 all as expected, 1 a cell failed or a verdict says no, 2 bad input, 3 infrastructure,
    130 interrupted.
    """
    ctx.obj = App(root=root, verbose=verbose)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point: Ctrl-C ends with 130, an error of ours with its own code."""
    # A CI runner ends a job with SIGTERM: then, too, nothing that was started may run on.
    # SIGINT explicitly: what a shell starts in the background inherits "ignore".
    for sign in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sign, _interrupt)
    try:
        status = cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("interrupted; run the same command again to go on", err=True)
        sys.exit(130)
    except KeyboardInterrupt:
        click.echo("interrupted; run the same command again to go on", err=True)
        sys.exit(130)
    except MtbuildError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    sys.exit(status if isinstance(status, int) else 0)
