"""Facts recorded from the real index, and the cells they belong to.

`pytest tests/tools/plan/test_negative_rows.py --update` reads them anew from the configured index.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtbuild.plan.cell import Base, Cell, Gpu
from mtbuild.plan.facts import CellFacts
from mtbuild.plan.select import Missing
from mtbuild.plan.wheels import facts_from_json

if TYPE_CHECKING:
    from collections.abc import Mapping

FILE = Path(__file__).with_name("data") / "facts.json"
BASE = Base(name="bookworm", kind="bootstrap", glibc="2.36", python=("3.11",), suite="bookworm")
MODERN = ("8.0", "8.6", "8.9", "9.0")


def cell(name: str, torch: str, cuda: str, triton: str, xformers: str | None, **changes: Any) -> Cell:
    """A cell that is fine but for what a test changes."""
    plain = Cell(
        name=name,
        flavour="runtime-deps",
        base=BASE,
        python="3.11",
        torch=torch,
        cuda=cuda,
        triton=triton,
        xformers=xformers,
        compiler=True,
        targets=MODERN,
    )
    return replace(plain, **changes)


V73 = cell("v73", "2.7.1", "12.6", "3.3.1", "0.0.31")

# Every row of the reject list, with what the row needs set. N2 is V73 without a compiler.
NEGATIVE = {
    "N1": cell("N1", "2.7.1", "12.6", "3.3.1", "0.0.23.post1"),
    "N2": replace(V73, name="N2", compiler=False),
    "N3": cell("N3", "2.13.0", "13.0", "3.7.1", "0.0.34"),
    "N4": cell("N4", "2.7.1", "12.6", "3.3.1", "0.0.35"),
    "N5": cell("N5", "2.7.1", "12.6", "3.4.0", "0.0.31"),
    "N6": cell("N6", "2.1.2", "12.1", "2.1.0", "0.0.23.post1", python="3.12"),
    "N7": cell("N7", "2.15.0", "13.2", "3.9.0", "0.0.35", python="3.10"),
    "N8": cell("N8", "2.7.1", "12.6", "3.3.1", "0.0.31", python="3.14"),
    "N9": cell("N9", "2.7.0", "12.6", "3.3.0", "0.0.30", python="3.13"),
    "N10": cell("N10", "2.7.1", "12.6", "3.3.1", "0.0.31", python="3.13"),
    "N11": cell("N11", "2.7.1", "12.6", "3.3.1", "0.0.31", base=replace(BASE, name="centos7", glibc="2.17")),
    "N12": cell("N12", "2.9.1", "12.8", "3.5.1", None, packages=(("flash-attn", "2.8.3.post2"),)),
    "N13": cell("N13", "2.9.0", "12.8", "3.5.0", "0.0.33"),
    "N14-2.11": cell("N14-2.11", "2.11.0", "13.0", "3.6.0", "0.0.35"),
    "N14-2.12": cell("N14-2.12", "2.12.1", "13.0", "3.7.1", "0.0.35"),
    "N14-2.13": cell("N14-2.13", "2.13.0", "13.0", "3.7.1", "0.0.35"),
    "N14-2.14": cell("N14-2.14", "2.14.1", "13.0", "3.8.0", "0.0.35"),
    "N14-2.15": cell("N14-2.15", "2.15.0", "13.2", "3.9.0", "0.0.35"),
    "N15": cell("N15", "2.15.0", "13.2", "3.9.0", "0.0.35.dev1147", python="3.12"),
    "N15-pinned": cell("N15-pinned", "2.7.1", "12.6", "3.3.1", None, packages=(("flash-attn-3", "0.0.0"),)),
    "N16-B200": cell("N16-B200", "2.7.1", "12.6", "3.3.1", "0.0.31", targets=("9.0", "10.0")),
    "N16-5090": cell(
        "N16-5090",
        "2.7.1",
        "12.6",
        "3.3.1",
        "0.0.31",
        smoke_on=(Gpu(name="RTX 5090", sm="12.0", driver="575.51"),),
    ),
    "N17": cell("N17", "2.7.1", "12.6", "3.3.1", "0.0.31", packages=(("flash-attn", "2.8.3"),)),
    "N18": cell("N18", "2.11.0", "13.0", "3.6.0", None, targets=("7.0", "8.0")),
    "N19": cell(
        "N19", "2.13.0", "13.0", "3.7.1", None, smoke_on=(Gpu(name="NVIDIA A100", sm="8.0", driver="570.86"),)
    ),
    "N20-first": cell("N20-first", "2.7.1", "12.6", "3.3.1", "0.0.27.post2", no_deps=("xformers",)),
    "N20-last": cell("N20-last", "2.8.0", "12.8", "3.4.0", "0.0.29.post3", no_deps=("xformers",)),
    "N21": cell("N21", "2.1.2", "12.1", "2.1.0", "0.0.23.post1", packages=(("numpy", "2.2.6"),)),
    "N22-2.2.2": cell("N22-2.2.2", "2.2.2", "12.1", "2.2.0", None, python="3.12"),
    "N22-2.3.1": cell("N22-2.3.1", "2.3.1", "12.1", "2.3.1", None, python="3.12"),
}

# What must come through: the default matrix but V72, and what V72's xFormers was for.
POSITIVE = {
    "v73": V73,
    "t241": cell("t241", "2.4.1", "12.1", "3.0.0", "0.0.28.post1"),
    "t260": cell("t260", "2.6.0", "12.4", "3.2.0", "0.0.29.post3"),
    "t280": cell("t280", "2.8.0", "12.8", "3.4.0", "0.0.32.post2"),
    "t291": cell("t291", "2.9.1", "12.8", "3.5.1", "0.0.33.post2", targets=(*MODERN, "10.0", "12.0")),
    "t210": cell(
        "t210",
        "2.10.0",
        "12.8",
        "3.6.0",
        "0.0.35",
        targets=(*MODERN, "10.0", "12.0"),
        packages=(("fa3-fwd", "0.0.2"),),
        no_deps=("fa3-fwd",),
    ),
    "fa3-cuda13": cell("fa3-cuda13", "2.11.0", "13.0", "3.6.0", None, packages=(("fa3-fwd", "0.0.3"),)),
    "v72-hist": cell("v72-hist", "2.1.2", "12.1", "2.1.0", "0.0.23.post1"),
    "numpy1": cell("numpy1", "2.1.2", "12.1", "2.1.0", "0.0.23.post1", packages=(("numpy", "<2"),)),
}
# flash-attn 3's forward as a package of its own, where it does not load.
FLASH3 = {
    "fa3-for-13-on-12": cell(
        "fa3-for-13-on-12", "2.10.0", "12.8", "3.6.0", None, packages=(("fa3-fwd", "0.0.3"),)
    ),
    "fa3-for-12-on-13": cell(
        "fa3-for-12-on-13", "2.11.0", "13.0", "3.6.0", None, packages=(("fa3-fwd", "0.0.2"),)
    ),
    "fa3-too-new": cell("fa3-too-new", "2.9.1", "12.8", "3.5.1", None, packages=(("fa3-fwd", "0.0.2"),)),
    "fa3-none-fits": cell("fa3-none-fits", "2.8.0", "12.8", "3.4.0", None, packages=(("fa3-fwd", "0.0.2"),)),
}
V72 = replace(NEGATIVE["N1"], name="v72", compiler=False, no_deps=("xformers",), expect="refused")
CELLS = {**NEGATIVE, **POSITIVE, **FLASH3, "v72": V72}


def load() -> dict[str, CellFacts]:
    """Recorded facts by cell name."""
    data = json.loads(FILE.read_text(encoding="utf-8"))
    wheels = {name: facts_from_json({**facts, "filename": name}) for name, facts in data["wheels"].items()}

    def of(names: list[str]) -> tuple[Any, ...]:
        return tuple(wheels[name] for name in names)

    return {
        name: CellFacts(
            wheels=of(row["wheels"]),
            missing=tuple(_missing(gone) for gone in row["missing"]),
            dependencies=of(row["dependencies"]),
            alternatives=of(row["alternatives"]),
        )
        for name, row in data["cells"].items()
    }


def save(facts: Mapping[str, CellFacts]) -> None:
    """Writes the file anew, each wheel once."""
    wheels = {
        w.filename: w for one in facts.values() for w in (*one.wheels, *one.dependencies, *one.alternatives)
    }
    rows = {
        name: {
            "wheels": [wheel.filename for wheel in one.wheels],
            "missing": [asdict(gone) for gone in one.missing],
            "dependencies": [wheel.filename for wheel in one.dependencies],
            "alternatives": [wheel.filename for wheel in one.alternatives],
        }
        for name, one in facts.items()
    }
    bare = {
        name: {k: v for k, v in asdict(w).items() if k != "filename"} for name, w in sorted(wheels.items())
    }
    about = "recorded from a real index by: pytest tests/tools/plan/test_negative_rows.py --update"
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(
        json.dumps({"about": about, "cells": rows, "wheels": bare}, indent=1) + "\n", encoding="utf-8"
    )


def _missing(data: dict[str, Any]) -> Missing:
    return Missing(**{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})
