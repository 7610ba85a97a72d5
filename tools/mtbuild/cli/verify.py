"""`mtbuild verify`: check a published image's evidence, step by step."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from mtbuild.cli._release import believed, json_option, key_option

if TYPE_CHECKING:
    from pathlib import Path

    from mtbuild.cli import App


@click.command("verify")
@click.argument("name", metavar="REPO[:TAG]@sha256:…")
@key_option
@json_option
@click.pass_obj
def command(app: App, name: str, key_files: tuple[Path, ...], as_json: bool) -> None:
    """Check a published image's evidence, step by step.

    Everything is fetched and judged again: bytes, tag, signatures, the verdict and its policy, the runs
    that it rests on, and whether they still count today. Exit code 0 if every step passed, 1 if not.

    \b
    Examples:
      mtbuild verify ghcr.io/acme/multitalk:torch2.7.1-cu126-xf0.0.31-py311-0123456789ab@sha256:…
      mtbuild verify ghcr.io/acme/multitalk@sha256:… --key publisher.pub --json
    """
    from mtbuild.publish.registry import Repository
    from mtbuild.publish.verify import parse_name, verify

    parsed = parse_name(name)
    keys = believed(app, key_files)
    with Repository.open(parsed.reference.repository) as repository:
        steps = verify(repository, parsed, keys)
    passed = all(step.passed for step in steps)
    if as_json:
        document = {"schema": 1, "name": name, "verified": passed, "steps": [s.to_json() for s in steps]}
        click.echo(json.dumps(document, indent=2))
    else:
        for number, step in enumerate(steps, start=1):
            click.echo(f"{number}. {'✓' if step.passed else '✗'} {step.name}: {step.seen}")
            if step.fix:
                click.echo(f"     fix: {step.fix}")
        click.echo("verified" if passed else "NOT verified")
    click.get_current_context().exit(0 if passed else 1)
