"""What the tests of `wan` share: the `measured` recorder and its table."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
TABLE = HERE / "README.md"
STORE = HERE / "measured.json"
_seen: dict[str, dict[str, object]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    with contextlib.suppress(ValueError):  # the switch is shared: whoever is loaded first defines it
        parser.addoption(
            "--update", action="store_true", help="rewrite stored results (tables, golden files)"
        )


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    # Most tensors here are tiny, and threads that wait for each other on a busy machine cost far more
    # than they give.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


class Measured:
    """Compares, remembers `fixture → error → gate` for the table, and fails above the gate."""

    def __call__(self, fixture: str, what: str, value: float, gate: float, *, metric: str = "of max") -> None:
        _seen[f"{fixture} · {what}"] = {
            "fixture": fixture,
            "what": what,
            "error": float(value),
            "gate": gate,
            "metric": metric,
        }
        assert value <= gate, f"{fixture} {what}: {value:.3e} ({metric}) is above the gate {gate:.0e}"


@pytest.fixture(scope="session")
def measured() -> Measured:
    return Measured()


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


HEAD = """# What `tests/wan` measures

The model against the reference outputs in `tests/golden` (what each fixture holds: `tests/golden/README.md`).
Written by `pytest tests/wan --update`; do not edit. "of max": largest difference divided by the largest
reference value; "abs": largest difference; "rel L2": ‖difference‖ / ‖reference‖;
"count": elements that differ.

"""


def _table(rows: list[dict[str, object]]) -> str:
    lines = [HEAD + "| fixture | what | error | gate | metric |", "|---|---|---:|---:|---|"]
    for row in rows:
        lines.append(
            f"| {row['fixture']} | {row['what']} | {row['error']:.1e} | {row['gate']:.0e} | {row['metric']} |"
        )
    return "\n".join(lines) + "\n"


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if not session.config.getoption("--update", default=False) or not _seen:
        return
    known = json.loads(STORE.read_text()) if STORE.exists() else {}
    known.update(_seen)
    known = dict(sorted(known.items()))
    STORE.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n")
    TABLE.write_text(_table(list(known.values())))
