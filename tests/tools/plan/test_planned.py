"""The plan's JSON, GitHub's job matrices, and the table."""

from __future__ import annotations

from pathlib import Path

from mtbuild.plan.cell import Finding
from mtbuild.plan.matrix import load
from mtbuild.plan.planned import Planned, github_json, plan_json
from mtbuild.table import findings_text, human_bytes, human_seconds

MATRIX = load(Path(__file__).parents[3] / "matrix.yaml")


def found(severity: str, message: str = "m") -> Finding:
    return Finding(rule="r", severity=severity, message=message, source="s", fix="f")  # type: ignore[arg-type]


def item(name: str, *findings: Finding) -> Planned:
    return Planned(cell=MATRIX.cell(name), findings=findings)


def test_the_worst_finding_is_the_state_and_only_its_kind_is_the_reason() -> None:
    planned = item(
        "v73", found("note", "n"), found("degraded", "d"), found("refused", "r1"), found("refused", "r2")
    )
    assert (planned.state, planned.reason, planned.buildable) == ("refused", "r1; r2", False)
    assert not planned.as_expected


def test_degraded_is_built_only_where_the_cell_allows_it() -> None:
    assert item("t213", found("degraded")).buildable
    assert not item("v73", found("degraded")).buildable


def test_an_expected_refusal_is_as_expected_and_may_also_come_later_from_the_suite() -> None:
    assert item("v72", found("refused")).as_expected
    assert item("v72").as_expected
    assert not item("v73", found("refused")).as_expected


def test_the_json_has_the_form_of_the_contract() -> None:
    document = plan_json([item("v72", found("refused", "why"))], MATRIX)
    assert document["schema"] == 1
    (cell,) = document["cells"]
    assert cell["id"] == "torch2.7.1-cu126-xf0.0.23.post1-py311"
    assert cell["versions"]["xformers"] == "0.0.23.post1"
    assert cell["state"] == "refused"
    assert cell["findings"] == [
        {"rule": "r", "severity": "refused", "message": "why", "source": "s", "fix": "f"}
    ]


def test_github_gets_what_can_be_built_and_a_smoke_job_for_each_gpu() -> None:
    jobs = github_json([item("v72", found("refused")), item("v73"), item("t280")])
    assert [job["cell"] for job in jobs["cells"]["include"]] == ["v73", "t280"]
    (smoke,) = jobs["smoke"]["include"]
    assert (smoke["cell"], smoke["sm"], smoke["runner"]) == ("v73", "9.0", "linux-amd64-gpu-h200-580-1")


def test_findings_are_told_with_source_and_fix() -> None:
    text = findings_text(MATRIX.cell("v72"), [found("refused", "no C compiler")])
    assert text.splitlines() == [
        "v72 (torch2.7.1-cu126-xf0.0.23.post1-py311):",
        "  refused: no C compiler  [r]",
        "    source: s",
        "    fix:    f",
    ]


def test_sizes_and_times_for_people() -> None:
    assert (human_bytes(999), human_bytes(2_703_281_396), human_bytes(5 * 10**12)) == (
        "999 B",
        "2.7 GB",
        "5 TB",
    )
    assert (human_seconds(4.06), human_seconds(372)) == ("4.1 s", "6 min 12 s")
