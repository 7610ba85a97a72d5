"""What the sections of docs/performance.md share: a run's rows, ratios of two of them, people's notes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from predictions import REFERENCE, TWINS

Sheet = dict[str, Any]
Found = dict[str, Sheet | None]
OPEN = "not measured yet"
PLAIN = "plain, flash"
TUNED = "tuned, cuDNN"
NEAR = 0.07  # of the reference's own figure; a plain row further off is no base for a ratio
ACROSS = "across two runs"
ONE_PROCESS = "one process, `candidates.json`"


def read_notes(folder: Path) -> dict[str, str]:
    """What people have to say of a part, by its name. A note holds of the very file whose hash it names."""
    path = folder / "notes.json"
    notes = json.loads(path.read_text()) if path.exists() else {}
    for name, note in notes.items():
        if hashlib.sha256((folder / f"{name}.json").read_bytes()).hexdigest() != note["sha256"]:
            msg = f"{path.name} speaks of another {name}.json: say what holds of this one, or drop the note"
            raise SystemExit(msg)
    return {name: note["text"] for name, note in notes.items()}


def row_of(m: Sheet | None, name: str) -> Sheet | None:
    return next((row for row in (m or {}).get("variants", []) if row["variant"] == name), None)


def median(m: Sheet | None, name: str) -> float | None:
    row = row_of(m, name)
    return None if row is None else float(row["median_ms"])


def refused(m: Sheet | None, name: str) -> bool:
    return any(r["variant"] == name and not r.get("ok", True) for r in (m or {}).get("correctness", []))


def ratio(m: Sheet | None, name: str, to: str) -> float | None:
    """Of two medians; None where one is missing or was refused."""
    a, b = (None if refused(m, n) else median(m, n) for n in (name, to))
    return None if a is None or b is None else a / b


def plain_off(m: Sheet | None) -> float | None:
    """By how much a run's plain row differs from the reference's own figure, as a share of it."""
    ms = median(m, PLAIN)
    return None if ms is None else ms / REFERENCE[PLAIN] - 1


def plain_counts(m: Sheet | None) -> bool:
    off = plain_off(m)
    return off is not None and abs(off) <= NEAR


def of_plain(found: Found, name: str) -> tuple[float | None, str]:
    """A variant of the forward's run over "plain, flash", and how it was had where not from that run alone.

    A run whose plain row is off gives no ratio to it. Then the candidates' run does, if it has the same
    variant with the same attention; else the variant's own time is set against that run's plain row.
    """
    m, other = found["forward"], found["candidates"]
    if plain_counts(m):
        return ratio(m, name, PLAIN), ""
    mine, twin = row_of(m, name), row_of(other, TWINS.get(name, name))
    if mine is None or name == PLAIN or refused(m, name) or not plain_counts(other):
        return None, ""
    if twin is not None and _kernel(twin) == _kernel(mine) and twin["people"] == mine["people"]:
        return ratio(other, twin["variant"], PLAIN), ONE_PROCESS
    base = median(other, PLAIN)
    return None if base is None else mine["median_ms"] / base, ACROSS


def _kernel(row: Sheet) -> str:
    return str(row["kernel"]).replace("-", "_").replace(" ", "_")


def shown(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"
