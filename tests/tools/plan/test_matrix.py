"""matrix.yaml: what loads, what is selected, and what each kind of bad input gets."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from textwrap import dedent

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtbuild.errors import InputError
from mtbuild.plan.matrix import load

NAMES = ["v72", "v73", "t241", "t260", "t280", "t291", "t210", "t211", "t213", "t215"]
ROOT = Path(__file__).parents[3]
BASE = """\
schema: 1
bases:
  b: {kind: bootstrap, suite: bookworm, glibc: "2.36", python: ["3.11", "3.12"]}
cells:
  - {name: a, base: b, python: "3.11", torch: "2.7.1", cuda: "12.6", triton: "3.3.1", xformers: "0.0.31"}
  - {name: c, base: b, python: "3.12", torch: "2.10.0", cuda: "12.8", triton: "3.6.0", xformers: "0.0.35"}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "matrix.yaml"
    path.write_text(dedent(text))
    return path


def test_the_default_matrix_is_what_the_contracts_say() -> None:
    matrix = load(ROOT / "matrix.yaml")
    assert [cell.name for cell in matrix.cells] == (NAMES)
    assert matrix.cell("v73").id == "torch2.7.1-cu126-xf0.0.31-py311"
    assert matrix.groups["embedded"] == ("v72", "v73")
    v72 = matrix.cell("v72")
    assert (v72.expect, v72.compiler, v72.no_deps) == ("refused", False, ("xformers",))
    assert {cell.name for cell in matrix.cells if "degraded" in cell.allow} == {"t213", "t215"}
    assert matrix.registry.staging is None
    assert matrix.aliases_of(matrix.cell("v73")) == ("latest-cu126",)


def test_a_list_of_versions_is_an_axis_and_exclusions_take_cells_out_with_their_reason(
    tmp_path: Path,
) -> None:
    path = write(
        tmp_path,
        BASE
        + """\
  - {name: "x{torch}-py{python}", base: b, python: ["3.11", "3.12"], torch: ["2.8.0", "2.9.1"], cuda: "12.8",
     triton: "3.4.0", xformers: null}
exclude:
  - match: {torch: "2.9.*", python: "3.12"}
    reason: not asked for
    link: "thread"
    until: 2027-01-31
groups: {eights: ["x2.8*"], both: ["{a,c}"]}
""",
    )
    matrix = load(path, today=date(2026, 11, 22))
    assert [cell.name for cell in matrix.cells] == [
        "a",
        "c",
        "x2.8.0-py3.11",
        "x2.8.0-py3.12",
        "x2.9.1-py3.11",
    ]
    assert [(out.cell.name, out.reason, out.until) for out in matrix.excluded] == [
        ("x2.9.1-py3.12", "not asked for", date(2027, 1, 31))
    ]
    assert matrix.cell("x2.8.0-py3.11").id == "torch2.8.0-cu128-py311"
    assert matrix.groups == {"eights": ("x2.8.0-py3.11", "x2.8.0-py3.12"), "both": ("a", "c")}
    with pytest.raises(InputError, match="excluded: not asked for"):
        matrix.cell("x2.9.1-py3.12")
    later = load(path, today=date(2027, 2, 1))
    assert "x2.9.1-py3.12" in [cell.name for cell in later.cells]
    assert "expired on 2027-01-31" in later.expired[0]


def test_selection_is_by_glob_and_braces_over_names_and_ids() -> None:
    matrix = load(ROOT / "matrix.yaml")
    assert [cell.name for cell in matrix.select(["v{72,73}"])] == ["v72", "v73"]
    assert [cell.name for cell in matrix.select(["torch2.7*"])] == ["v72", "v73"]
    assert [cell.name for cell in matrix.select(["t215", "v73"])] == ["v73", "t215"]
    with pytest.raises(InputError, match=r"'v74' matches no cell\. Did you mean 'v73'"):
        matrix.select(["v73", "v74"])


BAD = [
    ("", "is not of type 'object'", "matrix.yaml:1"),
    ("schema: 1\n  bad: [", "broken YAML", "matrix.yaml:2"),
    (BASE + "cells: []\n", "'cells' stands here again", "matrix.yaml:7"),
    (BASE.replace("schema: 1", "schema: 7"), "schema 7 is not one", "matrix.yaml:1 schema"),
    (
        BASE.replace("xformers:", "xformer:", 1),
        "unknown key 'xformer'. Did you mean 'xformers'?",
        "matrix.yaml:5",
    ),
    (BASE.replace('torch: "2.10.0"', "torch: 2.10"), "bare number", "matrix.yaml:6 cells[1].torch"),
    (BASE.replace('"2.7.1"', '"latest"'), "'latest' is not of the form", "matrix.yaml:5 cells[0].torch"),
    (BASE.replace("base: b", "base: bb", 1), "no base 'bb'", "matrix.yaml:5 cells[0].base"),
    (BASE.replace('python: "3.11"', 'python: "3.13"'), "has Python 3.11, 3.12, not 3.13", "cells[0].python"),
    (BASE.replace("name: c", "name: a"), "two cells have the name 'a'", "matrix.yaml:6"),
    (BASE.replace("kind: bootstrap", "kind: boostrap"), "Did you mean 'bootstrap'?", "bases.b.kind"),
    (BASE.replace(", suite: bookworm", ""), "needs a suite", "matrix.yaml:3 bases.b"),
    (BASE.replace("kind: bootstrap", "kind: image, ref: x/y:latest"), "names no digest", "bases.b.ref"),
    (BASE.replace('triton: "3.3.1", ', ""), "'triton' is missing", "matrix.yaml:5 cells[0]"),
    (BASE.replace("name: a", 'name: "a{cude}"'), "placeholder 'cude'", "cells[0].name"),
    (
        BASE + "exclude: [{match: {torch: '2.1.0'}}]\n",
        "an exclusion without a reason",
        "matrix.yaml:7 exclude[0]",
    ),
    (
        BASE + "exclude: [{match: {torch: '2.7.0'}, reason: r}]\n",
        "matches no cell. Did you mean '2.7.1'?",
        ":7",
    ),
    (BASE + "exclude: [{match: {torch: '2.7.1'}, reason: r, until: 2027-02-31}]\n", "not a date", "until"),
    (BASE + "groups: {g: ['z*']}\n", "'z*' matches no cell", "matrix.yaml:7 groups.g"),
    (BASE + "aliases: {latest: aa}\n", "'aa', which is not a cell. Did you mean 'a'?", "aliases.latest"),
    (BASE + "aliases: {c: a}\n", "also a cell's name", "aliases.c"),
    (
        BASE + "smoke_on: [{cells: [q], gpu: H200, sm: '9.0', driver: '580.65'}]\n",
        "'q' matches no cell",
        "smoke_on",
    ),
    (BASE + "registry: {staging: images}\n", "neither `embedded` nor HOST/REPOSITORY", "registry.staging"),
    (
        BASE + "registry: {staging: r.io/a, release: r.io/a}\n",
        "the same repository",
        "matrix.yaml:7 registry",
    ),
    (BASE + "policy: {max_age_days: 0}\n", "less than the minimum", "policy.max_age_days"),
]


@pytest.mark.parametrize(("text", "message", "where"), BAD, ids=[message for _, message, _ in BAD])
def test_bad_input_gets_one_error_that_names_line_and_key(
    tmp_path: Path, text: str, message: str, where: str
) -> None:
    with pytest.raises(InputError) as raised:
        load(write(tmp_path, text))
    assert message in raised.value.message
    assert where in raised.value.where
    assert raised.value.fix
    assert raised.value.exit_code == 2


def test_a_missing_file_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no matrix\.yaml"):
        load(tmp_path / "matrix.yaml")


@given(
    st.sets(
        st.sampled_from(NAMES),
        min_size=1,
    )
)
def test_selecting_names_gives_just_these_in_file_order(names: set[str]) -> None:
    matrix = load(ROOT / "matrix.yaml")
    chosen = [cell.name for cell in matrix.select(sorted(names))]
    assert set(chosen) == names
    assert chosen == [cell.name for cell in matrix.cells if cell.name in names]


def test_a_cell_knows_the_line_and_key_of_each_of_its_versions(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        BASE
        + """\
  - name: "x{torch}"
    base: b
    python: "3.11"
    torch: ["2.8.0",
            "2.9.1"]
    cuda: "12.8"
    triton: "3.4.0"
    packages:
      Flash_Attn: "2.8.3"
""",
    )
    matrix = load(path)
    cell = matrix.cell("x2.9.1")
    assert cell.at("torch") == "matrix.yaml:10 cells[2].torch"
    assert cell.at("triton") == "matrix.yaml:13 cells[2].triton"
    assert cell.at("flash-attn") == "matrix.yaml:15 cells[2].packages.Flash_Attn"
    assert matrix.cell("a").at("torch") == "matrix.yaml:5 cells[0].torch"
    assert cell.at("numpy") == "matrix.yaml:7 cells[2] numpy"
