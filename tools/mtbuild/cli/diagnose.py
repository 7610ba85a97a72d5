"""`mtbuild diagnose`: name the known failure in a build or run log, its cause and its fix."""

from __future__ import annotations

import json
from typing import IO

import click

_LIMIT = 64 * 2**20  # characters from the end of a log; failures stand there


@click.command("diagnose")
@click.argument("log", type=click.File("r", encoding="utf-8", errors="replace"), metavar="FILE|-")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(log: IO[str], as_json: bool) -> None:
    """Name the known failure in a build or run log, its cause and its fix.

    Reads a file, or standard input for `-`. Several failures are told in the order in which they first
    show: the first is usually the cause of the others.

    Exit code 0 if at least one known failure is in it, 1 if none is, 2 if there is no such file.

    \b
    Examples:
      mtbuild diagnose build.log
      docker logs worker 2>&1 | mtbuild diagnose -
      mtbuild diagnose run.log --json
    """
    from mtbuild.diagnose import diagnose, signatures

    text = log.read()
    found = diagnose(text[-_LIMIT:])
    if as_json:
        click.echo(json.dumps({"schema": 1, "diagnoses": [one.to_json() for one in found]}, indent=2))
    elif not found:
        click.echo(
            f"nothing known in it ({len(text.splitlines())} lines, {len(signatures())} known failures)"
        )
        click.echo(
            "  fix: smoke the image (`mtbuild smoke`), whose checks say what works; then add a row to "
            "mtbuild/data/diagnose.yaml"
        )
    for number, one in enumerate(() if as_json else found, start=1):
        times = f" ({one.count} times)" if one.count > 1 else ""
        click.echo(f"{number}. {one.signature}, line {one.line}{times}")
        for line in one.quote.splitlines():
            click.echo(f"     | {line}")
        click.echo(f"   cause:  {one.cause}")
        click.echo(f"   fix:    {one.fix}")
        click.echo(f"   source: {one.source}")
    click.get_current_context().exit(0 if found else 1)
