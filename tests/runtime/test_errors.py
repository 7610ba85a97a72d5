"""The published table of codes, and what a fault tells and does not tell."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from multitalk_runtime import errors

ROOT = Path(__file__).parents[2]
SOURCES = [path for path in (ROOT / "multitalk_runtime").rglob("*.py") if path.name != "errors.py"]


def test_the_published_table_is_up_to_date() -> None:
    kept = (ROOT / "docs/runtime-errors.md").read_text()
    assert kept == errors.table(), "run: python -m multitalk_runtime.errors > docs/runtime-errors.md"


def test_codes_are_unique_named_alike_and_say_what_to_do() -> None:
    all_codes = [entry.code for fault in errors.FAULTS for entry in fault.codes]
    assert len(all_codes) == len(set(all_codes)) == len(errors.CODES)
    for entry in errors.CODES.values():
        assert re.fullmatch(r"[a-z_0-9]+(\.[a-z_0-9]+)?", entry.code)
        assert entry.meaning
        assert entry.hint
        assert 400 <= entry.status < 600


def test_every_code_in_the_table_is_used_somewhere_and_every_used_one_is_in_it() -> None:
    text = "\n".join(path.read_text() for path in SOURCES)
    unused = [code for code in errors.CODES if f'"{code}"' not in text]
    assert not unused
    used = set(re.findall(r'Fault\(\s*"([a-z_0-9.]+)"', text))
    assert used <= set(errors.CODES)
    assert len(used) > 30


def test_a_fault_is_four_fields_and_knows_only_its_own_codes() -> None:
    fault = errors.ImageFault("image.broken", "the PNG can't be decoded", field="image")
    assert fault.to_json() == {
        "code": "image.broken",
        "field": "image",
        "message": "the PNG can't be decoded",
        "hint": "send an intact file",
    }
    assert fault.status == 422
    assert str(fault) == "image: the PNG can't be decoded (image.broken)"
    with pytest.raises(ValueError, match="no code"):
        errors.ImageFault("audio.broken", "")
