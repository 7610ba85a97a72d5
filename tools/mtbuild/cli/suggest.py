"""`mtbuild suggest`: the versions that fit one torch, with the words they rest on."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from mtbuild.cli import App

if TYPE_CHECKING:
    from mtbuild.plan.suggest import Suggestion

__all__ = ["command"]


@click.command(
    name="suggest",
    epilog="\b\nExamples:\n"
    "  mtbuild suggest --torch 2.9.1\n"
    "  mtbuild suggest --torch 2.7.1 --python 3.11 --json",
)
@click.option("--torch", "torch", required=True, metavar="VERSION", help="The torch release to start from.")
@click.option("--python", "python", metavar="X.Y", help="A Python; else the newest that MultiTalk runs on.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON (schema 1) to stdout.")
@click.option("--bytes", "show_bytes", is_flag=True, help="Say how much was fetched from the index.")
@click.pass_obj
def command(app: App, torch: str, python: str | None, as_json: bool, show_bytes: bool) -> None:
    """Suggest the versions that fit one torch: Python, CUDA, triton, xformers, GPUs and driver.

    Reads what the configured index's wheels say, a few kilobytes each, and quotes it. Ends with exit code 1
    where no xformers fits.
    """
    from mtbuild.errors import InputError
    from mtbuild.plan.index import Index
    from mtbuild.plan.suggest import suggest
    from mtbuild.plan.wheels import Wheels

    note = app.note if app.verbose else None
    index = Index.from_environment(cache=app.paths.facts, note=note)
    wheels = Wheels(index, app.paths.facts, app.note)
    try:
        suggestion = suggest(torch, wheels, python=python)
    except InputError as error:
        raise InputError(error.message, where=error.where or "--torch", fix=error.fix) from error
    if show_bytes:
        app.note(f"{wheels.bytes:,} bytes from {index.described}; {wheels.read} wheels read, the others kept")
    if as_json:
        best = suggestion.best
        text = {"schema": 1, **asdict(suggestion), "best": best.version if best else None}
        click.echo(json.dumps(text, indent=2))
    else:
        click.echo(_text(suggestion))
    if suggestion.best is None:
        raise click.exceptions.Exit(1)


def _text(suggestion: Suggestion) -> str:
    best = suggestion.best
    lines = [f"torch {suggestion.torch}"]
    for value in suggestion.values:
        lines += [
            f"  {value.name:<9} {value.value}",
            f"            {value.reason}",
            f"            | {value.source}",
        ]
    lines.append(f"  xformers  {best.version if best else 'none'}{_degraded(best)}")
    for candidate in suggestion.xformers:
        mark = {"fits": "✓", "degraded": "~", "refused": "✗"}[candidate.verdict]
        lines += [
            f"            {mark} {candidate.version}: {candidate.reason}",
            f"              | {candidate.source}",
        ]
    if not suggestion.xformers:
        lines.append("            no released xformers asks for this torch and has a wheel for this Python")
    values = {value.name: value.value for value in suggestion.values}
    cell = {
        "python": suggestion.python,
        "torch": suggestion.torch,
        "cuda": values["cuda"],
        "triton": values["triton"],
    }
    if best is not None:
        cell["xformers"] = best.version
    lines += ["", "as a cell of matrix.yaml:", f"  - name: t{suggestion.torch.replace('.', '')}"]
    lines += [f'    {key}: "{value}"' for key, value in cell.items()]
    if best is not None and best.verdict == "degraded":
        lines.append("    allow: [degraded]")
    return "\n".join(lines)


def _degraded(best: object) -> str:
    return "  (degraded)" if getattr(best, "verdict", "") == "degraded" else ""
