"""The report: what proves a digest, what does not, and whose word a fact is."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtbuild.digest import Digest, Reference
from mtbuild.errors import InputError
from mtbuild.plan.cell import Base, Cell
from mtbuild.prove.report import (
    CPU_CHECKS,
    EVERY_USER,
    GPU_CHECKS,
    RUNTIME_CHECKS,
    CheckResult,
    ContainerRun,
    Fact,
    SmokeReport,
    required_checks,
)

if TYPE_CHECKING:
    from pathlib import Path

FIRST, SECOND = "65532:65532", "1234567890:0"
REF = Reference.parse(f"127.0.0.1:5100/staging@sha256:{'ab' * 32}")
CELL = Cell(
    name="v73",
    flavour="runtime-deps",
    base=Base(name="bookworm", kind="bootstrap", glibc="2.36", python=("3.11",), suite="bookworm"),
    python="3.11",
    torch="2.7.1",
    cuda="12.6",
    triton="3.3.1",
    xformers="0.0.31",
    compiler=True,
    targets=("8.0", "9.0"),
)


def result(check: str, status: str = "passed", user: str = FIRST) -> CheckResult:
    return CheckResult(check=check, status=status, user=user, seconds=1.5, message=f"{check}: {status}")  # type: ignore[arg-type]


def report(**changes: Any) -> SmokeReport:
    """A run of tier cpu in which all went well."""
    whole = SmokeReport(
        ref=REF,
        cell_id=CELL.id,
        cell_name=CELL.name,
        tier="cpu",
        required=required_checks(CELL, "cpu", runtime=True),
        allow_degraded=False,
        results=(
            *(result(check) for check in CPU_CHECKS),
            *(result(check, user=SECOND) for check in CPU_CHECKS if check in EVERY_USER),
        ),
        runs=tuple(
            ContainerRun(user=user, exit_status=0, oom_killed=False, seconds=9.0) for user in (FIRST, SECOND)
        ),
        facts=(
            Fact(name="digest", value=str(REF.digest), observed_by="host"),
            Fact(name="suite.versions.torch", value="2.7.1", observed_by="image"),
        ),
        suite=Digest("cd" * 32),
        started="2026-11-22T18:00:00Z",
        finished="2026-11-22T18:01:00Z",
    )
    return replace(whole, **changes)


def with_status(check: str, status: str, user: str = FIRST) -> tuple[CheckResult, ...]:
    return tuple(
        result(check, status, user) if (one.check, one.user) == (check, user) else one
        for one in report().results
    )


def test_checked_needs_the_first_list_and_verified_both() -> None:
    assert required_checks(CELL, "cpu", runtime=True) == CPU_CHECKS
    assert required_checks(CELL, "gpu", runtime=True) == CPU_CHECKS + GPU_CHECKS


def test_xformers_and_wan_are_required_only_where_they_should_be() -> None:
    without = replace(CELL, xformers=None)
    assert not [name for name in required_checks(without, "gpu", runtime=True) if "xformers" in name]
    assert not set(RUNTIME_CHECKS) & set(required_checks(CELL, "gpu", runtime=False))
    assert set(RUNTIME_CHECKS) <= set(required_checks(CELL, "gpu", runtime=True))
    foreign = required_checks(None, "gpu", runtime=False)
    assert {"compiler", "triton.jit"} <= set(foreign)
    assert not {"xformers.extension", "xformers.attention", *RUNTIME_CHECKS} & set(foreign)


def test_all_passed_is_a_pass() -> None:
    assert report().passed()
    assert report().problems == ()


@pytest.mark.parametrize("status", ["failed", "skipped", "error", "timeout", "degraded"])
def test_anything_but_passed_is_no_pass(status: str) -> None:
    broken = report(results=with_status("compiler", status))
    assert not broken.passed()
    assert broken.problems == (f"compiler (as {FIRST}): {status}: compiler: {status}",)


def test_degraded_passes_only_where_the_cell_allows_it() -> None:
    degraded = report(results=with_status("xformers.extension", "degraded"))
    assert not degraded.passed()
    assert replace(degraded, allow_degraded=True).passed()


def test_absent_is_no_pass() -> None:
    kept = tuple(one for one in report().results if one.check != "triton.aot")
    assert report(results=kept).problems == (f"triton.aot (as {FIRST}): absent",)


def test_what_depends_on_the_user_must_pass_as_both() -> None:
    assert not report(results=with_status("caches", "failed", SECOND)).passed()
    assert not report(results=tuple(one for one in report().results if one.user == FIRST)).passed()
    assert not report(runs=report().runs[:1]).passed()


@pytest.mark.parametrize(
    ("end", "says"),
    [
        ({"exit_status": 1}, "ended with status 1"),  # it says a required check failed; none did
        ({"exit_status": 137}, "ended with status 137"),
        ({"exit_status": None}, "ended by the host at its limit"),
        ({"exit_status": 137, "oom_killed": True}, "ran out of memory"),
    ],
)
def test_how_the_container_ended_counts(end: dict[str, Any], says: str) -> None:
    first, second = report().runs
    problems = report(runs=(replace(first, **end), second)).problems
    assert len(problems) == 1
    assert says in problems[0]


def test_facts_keep_the_word_of_who_saw_them() -> None:
    assert report().host_facts == {"digest": str(REF.digest)}
    assert report().image_facts == {"suite.versions.torch": "2.7.1"}


def test_it_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    report().write(tmp_path / "report.json")
    assert SmokeReport.load(tmp_path / "report.json") == report()
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_an_edited_report_is_refused(tmp_path: Path) -> None:
    document = report(results=with_status("compiler", "failed")).to_json()
    assert document["passed"] is False
    document["passed"] = True
    file = tmp_path / "report.json"
    file.write_text(json.dumps(document))
    with pytest.raises(InputError, match="results say the opposite") as raised:
        SmokeReport.load(file)
    assert raised.value.where == str(file)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda d: d.pop("runs"), "'runs' is a required property"),
        (lambda d: d.update(schema=2), "schema: 1 was expected"),
        (lambda d: d["results"][0].update(status="fine"), r"results\[0\].status: 'fine'"),
        (lambda d: d["facts"]["digest"].update(observed_by="me"), "facts.digest.observed_by"),
        (lambda d: d.update(mood="good"), "'mood' was unexpected"),
    ],
)
def test_what_is_wrong_in_a_report_is_named(change: Any, key: str) -> None:
    document = report().to_json()
    change(document)
    with pytest.raises(InputError, match=key):
        SmokeReport.from_json(document)


def test_a_missing_report_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such report") as raised:
        SmokeReport.load(tmp_path / "none.json")
    assert "mtbuild smoke" in raised.value.fix


STATUS = st.sampled_from(["passed", "failed", "degraded", "skipped", "error", "timeout"])


@given(st.lists(STATUS, min_size=len(report().results), max_size=len(report().results)), st.booleans())
def test_it_passes_only_if_every_required_result_does(statuses: list[str], allowed: bool) -> None:
    results = tuple(
        replace(one, status=status) for one, status in zip(report().results, statuses, strict=True)
    )
    fine = {"passed", "degraded"} if allowed else {"passed"}
    made = report(results=results, allow_degraded=allowed)
    assert made.passed() == all(status in fine for status in statuses)
    assert SmokeReport.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_timings_of_a_cold_start_are_found_and_a_gpus_word_comes_first() -> None:
    said: dict[str, Any] = {
        "image.fetch_s": 12.5,
        "suite.generate.seconds": {"import_s": 9.0, "load_s": 4.0},
        "suite.generate_gpu.seconds": {"import_s": 3.0},
        "suite.triton_aot.first_s": 0.7,
        "suite.generate.first_frame_s": "soon",  # an image may say anything
    }
    facts = tuple(Fact(name=name, value=value, observed_by="image") for name, value in said.items())
    timings = report(facts=facts).timings
    assert timings == {
        "pull": 12.5,
        "import": 3.0,
        "load": 4.0,
        "first_kernel": 0.7,
        "first_frame": None,
    }
