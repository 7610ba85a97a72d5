"""`mtbuild smoke`: the suite in an unmodified container of an image, by digest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

if TYPE_CHECKING:
    from mtbuild.cli import App
    from mtbuild.plan.cell import Cell
    from mtbuild.prove.report import SmokeReport


@click.command("smoke")
@click.argument("reference", metavar="REF@sha256:…")
@click.option("--cell", "cell_name", metavar="CELL", help="The cell that the image was built from.")
@click.option(
    "--tier",
    type=click.Choice(["auto", "cpu", "gpu"]),
    default="auto",
    show_default=True,
    help="auto: gpu where this host has one.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the signed evidence here, for `mtbuild publish --evidence`.",
)
@click.option(
    "--report",
    "report_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the report as plain JSON here as well.",
)
@click.option(
    "--runtime/--no-runtime",
    default=None,
    help="Whether the image must hold the wheel multitalk-runtime.  [default: where the cell does]",
)
@click.option(
    "--gpu",
    metavar="INDEX|UUID",
    help="The card to hand over, of several.  [default: the first]",
)
@click.option(
    "--weights",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Real checkpoints: also make a short video at 480p with them, kept with the report.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.pass_obj
def command(
    app: App,
    reference: str,
    cell_name: str | None,
    tier: Literal["auto", "cpu", "gpu"],
    out: Path | None,
    report_file: Path | None,
    runtime: bool | None,
    gpu: str | None,
    weights: Path | None,
    as_json: bool,
) -> None:
    """Run the suite in an unmodified container of an image, by digest.

    The container has a read-only root, no network and no rights, and runs as uid 65532 and once more as a
    random uid with gid 0. Any image can be smoked: without --cell its versions are recorded, not compared.
    Videos and contact sheets are kept beside the report. Exit code 0 if every required check passed, else 1.

    \b
    Examples:
      mtbuild smoke 127.0.0.1:5100/staging@sha256:… --cell v73 --out v73.cpu.json
      mtbuild smoke ghcr.io/acme/multitalk@sha256:… --cell v73 --tier gpu --out v73.l4.json
      mtbuild smoke ghcr.io/acme/multitalk@sha256:… --cell v73 --gpu 1 --weights /models
      mtbuild smoke registry.example.org/someone/comfyui@sha256:… --json
    """
    from mtbuild.digest import Reference
    from mtbuild.prove.engine import connect
    from mtbuild.prove.smoke import smoke, tier_here

    ref = Reference.parse(reference)
    cell = _cell(app, cell_name) if cell_name else None
    level = tier_here(tier)
    engine = connect(app.paths, note=app.note)
    folder = app.paths.state / "smoke" / f"{ref.digest.short}-{level}"
    app.note(f"smoking {ref.repository}@{ref.digest.short}… on tier {level}")
    report = smoke(
        ref,
        cell=cell,
        engine=engine,
        out=folder,
        tier=level,
        note=lambda text: app.note(f"  {text}"),
        runtime=runtime,
        gpu=gpu,
        weights=weights,
    )
    if report_file is not None:
        report.write(report_file)
    if out is not None:
        _sign(app, report, cell, out)
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2, ensure_ascii=False))
    else:
        _show(report, folder / "report.json")
    click.get_current_context().exit(0 if report.passed() else 1)


def _cell(app: App, name: str) -> Cell:
    from mtbuild.plan.matrix import load

    return load(app.paths.matrix).cell(name)


def _sign(app: App, report: SmokeReport, cell: Cell | None, out: Path) -> None:
    from mtbuild.prove.build import builds_of
    from mtbuild.publish import evidence
    from mtbuild.publish.keys import Keys

    keys = Keys.ensure(app.paths.keys)
    known = builds_of(app.paths, cell.id) if cell is not None else ()
    build = next((one for one in known if one.ref.digest == report.digest), None)
    evidence.sign(evidence.statement(report, cell, build=build), keys.own).write(out)
    app.note(f"evidence: {out}")


def _show(report: SmokeReport, file: Path) -> None:
    verdict = f"passed ({len(report.required)} required checks)" if report.passed() else "not passed"
    click.echo(f"{report.ref} ({report.cell_name or 'no cell'}), tier {report.tier}: {verdict}")
    seen: dict[tuple[str, str, str], list[str]] = {}
    for result in report.results:
        seen.setdefault((result.check, result.status, result.message), []).append(result.user)
    for (check, status, message), users in seen.items():
        if status in ("passed", "skipped"):
            continue
        result = next(r for r in report.results if (r.check, r.status, r.message) == (check, status, message))
        click.echo(f"\n{check} (as {', '.join(users)}): {status}: {message}")
        if result.diagnosis:
            click.echo(f"  why: {result.diagnosis}")
        if result.fix:
            click.echo(f"  fix: {result.fix}")
    for line in report.problems:
        if line.split(" ")[0] not in {check for check, _, _ in seen}:  # of the run, not of a check
            click.echo(f"\n{line}")
    known = [f"{phase.replace('_', ' ')} {s:.1f} s" for phase, s in report.timings.items() if s is not None]
    click.echo(f"\ntimings: {', '.join(known)}")
    click.echo(f"report: {file}")
