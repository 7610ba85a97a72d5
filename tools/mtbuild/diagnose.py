"""Name the known failures in a build or run log: cause, fix, and where it is known from. Pure, over a table.

The table is data (`data/diagnose.yaml`); a row is added there together with a real log excerpt.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

__all__ = ["Diagnosis", "Signature", "diagnose", "signatures"]

_COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")
_QUOTE = 400  # characters of a line that are quoted


@dataclass(frozen=True, kw_only=True)
class Signature:
    """One known failure of the table."""

    id: str
    pattern: re.Pattern[str]
    cause: str
    fix: str
    source: str
    example: str
    unless: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """A known failure found in a log: the first line that shows it, and how often it is there."""

    signature: str
    line: int
    quote: str
    cause: str
    fix: str
    source: str
    count: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@cache
def signatures() -> tuple[Signature, ...]:
    """The table, in its order."""
    text = files("mtbuild").joinpath("data/diagnose.yaml").read_text(encoding="utf-8")
    return tuple(
        Signature(
            **{
                **row,
                "pattern": re.compile(row["pattern"], re.MULTILINE),
                "unless": tuple(row.get("unless", ())),
            }
        )
        for row in yaml.safe_load(text)
    )


def diagnose(text: str) -> tuple[Diagnosis, ...]:
    """Every known failure in a log, in the order in which they first show; colours and CR are looked past."""
    plain = _COLOURS.sub("", text).replace("\r\n", "\n").replace("\r", "\n")
    starts = [0, *(match.end() for match in re.finditer("\n", plain))]
    found: list[Diagnosis] = []
    for signature in signatures():
        matches = list(signature.pattern.finditer(plain))
        if not matches:
            continue
        # The first that says most: a later, whole message is better than an earlier half of it.
        best = max(
            matches, key=lambda match: (len([v for v in match.groupdict().values() if v]), -match.start())
        )
        line = bisect_right(starts, best.start())
        end = plain.find("\n", best.end())
        quote = plain[starts[line - 1] : end if end >= 0 else len(plain)].strip()
        words = defaultdict(lambda: "another version", {k: v for k, v in best.groupdict().items() if v})
        found.append(
            Diagnosis(
                signature=signature.id,
                line=line,
                quote=quote[:_QUOTE],
                cause=signature.cause.format_map(words),
                fix=signature.fix.format_map(words),
                source=signature.source,
                count=len(matches),
            )
        )
    ids = {diagnosis.signature for diagnosis in found}
    said = {signature.id for signature in signatures() if ids.isdisjoint(signature.unless)}
    order = {signature.id: place for place, signature in enumerate(signatures())}
    kept = [diagnosis for diagnosis in found if diagnosis.signature in said]
    return tuple(sorted(kept, key=lambda diagnosis: (diagnosis.line, order[diagnosis.signature])))
