"""docs/suite.md says what the suite asks."""

from __future__ import annotations

from pathlib import Path

from mtbuild.prove.report import CPU_CHECKS, GPU_CHECKS, WEIGHTS_CHECKS
from mtbuild.prove.suite_page import page

KEPT = Path(__file__).parents[3] / "docs/suite.md"


def test_the_page_is_what_the_checks_say(update: bool) -> None:
    found = page()
    if update:
        KEPT.write_text(found)
    assert KEPT.read_text() == found, "run: python -m mtbuild.prove.suite_page > docs/suite.md"


def test_every_check_says_what_must_be_true() -> None:
    rows = {line.split("`")[1]: line for line in page().splitlines() if line.startswith("| `")}
    assert tuple(rows) == (*CPU_CHECKS, *GPU_CHECKS, *WEIGHTS_CHECKS)
    for name, row in rows.items():
        assert "****" not in row, f"{name} has no docstring"
    assert "*tier gpu, images with the runtime*" in rows["generate.gpu"]
    assert "*any user*" in rows["compiler"]
    assert "tier gpu" not in rows["compiler"] + rows["generate.weights"]
    assert "*cells with xFormers*" in rows["xformers.extension"]
