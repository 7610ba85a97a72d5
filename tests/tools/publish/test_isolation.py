"""A run in a container that was not shut in proves nothing; what failed in it failed all the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from publish_samples import NOW, SHUT_IN, USERS, V73, SampleBuild, policy_of, report_of, statement_of

from mtbuild.digest import Digest, Reference
from mtbuild.prove.report import Fact, SmokeReport
from mtbuild.publish.isolation import open_doors
from mtbuild.publish.policy import judge

if TYPE_CHECKING:
    from mtbuild.publish.policy import Verdict

DIGEST = Digest.of(b"the image")
REF = Reference(host="127.0.0.1:5000", path="staging", digest=DIGEST)
BUILD = SampleBuild(cell_id=V73.id, cell_name="v73", build_id="ef" * 32, ref=REF)
CHECKED = policy_of(BUILD, None)
EVIDENCE = Path(__file__).parents[3] / "docs" / "evidence"


def settled(report: SmokeReport, value: Any, *, observed_by: str = "host") -> SmokeReport:
    """The report with other settings of its containers; None: without that fact."""
    facts = [fact for fact in report.facts if fact.name != "container.settings"]
    if value is not None:
        facts.append(Fact(name="container.settings", value=value, observed_by=observed_by))  # type: ignore[arg-type]
    return replace(report, facts=tuple(facts))


def verdict_of(report: SmokeReport, **policy: Any) -> Verdict:
    return judge(DIGEST, [statement_of(report, BUILD)], replace(CHECKED, **policy), now=NOW)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"network": "bridge"}, "network 'bridge', not 'none'"),
        ({"read_only": False}, "a writable root"),
        ({"privileged": True}, "privileged"),
        ({"cap_drop": None}, "capabilities not dropped"),
        ({"cap_add": ["SYS_ADMIN"]}, "capabilities added: ['SYS_ADMIN']"),
        ({"security_opt": None}, "new privileges allowed"),
        ({"security_opt": ["no-new-privileges:false"]}, "new privileges allowed"),
        ({"security_opt": ["no-new-privileges", "seccomp=unconfined"]}, "security option seccomp=unconfined"),
        ({"memory_bytes": 0}, "no limit of memory"),
        ({"pids": None}, "no limit of processes"),
        ({"pids": -1}, "no limit of processes"),
        ({"namespaces": {"Pid": "host", "Ipc": "private", "UTS": "", "Userns": ""}}, "Pid namespace of host"),
        ({"namespaces": {"Ipc": "container:abc"}}, "Ipc namespace of container:abc"),
        ({"binds": {"/mtbuild/out": "rw", "/mtbuild/suite": "rw"}}, "/mtbuild/suite writable from outside"),
    ],
)
def test_one_open_door_is_enough(change: dict[str, Any], word: str) -> None:
    report = report_of(REF)
    opened = settled(report, {USERS[0]: dict(SHUT_IN), USERS[1]: {**SHUT_IN, **change}})
    assert open_doors(opened) == (f"{word} (as {USERS[1]})",)
    verdict = verdict_of(opened)
    assert [finding.rule for finding in verdict.findings] == ["not-isolated"]
    assert word in verdict.findings[0].message


@pytest.mark.parametrize("key", sorted(SHUT_IN))
def test_a_setting_that_is_not_told_is_open(key: str) -> None:
    told = {name: value for name, value in SHUT_IN.items() if name != key}
    assert len(open_doors(settled(report_of(REF), dict.fromkeys(USERS, told)))) == 2


def test_what_the_suite_itself_needs_is_no_open_door() -> None:
    told = {
        **SHUT_IN,
        "namespaces": {"Pid": "", "Ipc": "private", "UTS": "", "Userns": ""},
        "binds": {"/mtbuild/out": "rw", "/mtbuild/suite": "ro", "/mtbuild/request.json": "ro"},
    }
    assert open_doors(settled(report_of(REF), dict.fromkeys(USERS, told))) == ()


def test_what_the_host_did_not_state_is_not_proven() -> None:
    report = report_of(REF)
    assert open_doors(report) == ()
    for bare in (
        settled(report, None),
        settled(report, {user: dict(SHUT_IN) for user in USERS}, observed_by="image"),
        settled(report, {USERS[0]: dict(SHUT_IN)}),
        settled(report, "yes"),
    ):
        verdict = verdict_of(bare)
        assert not verdict.passed
        assert "not stated by the host" in verdict.findings[0].message
        assert verdict.findings[0].fix


def test_a_policy_of_before_does_not_ask_for_it() -> None:
    """What was let out by policy v1 goes on verifying by the policy that its verdict names."""
    assert verdict_of(settled(report_of(REF), None), uri="tag:mtbuild,2026:policy/v1").passed


def test_a_failure_counts_wherever_it_was_seen() -> None:
    opened = settled(report_of(REF, bad={"compiler": "failed"}, finished=NOW), None)
    runs = [statement_of(report_of(REF), BUILD), statement_of(opened, BUILD)]
    verdict = judge(DIGEST, runs, CHECKED, now=NOW)
    assert not verdict.passed
    assert {finding.rule for finding in verdict.findings} == {"failed"}


def test_the_kept_run_of_a_gpu_host_was_shut_in() -> None:
    assert open_doors(SmokeReport.load(EVIDENCE / "t211" / "report.json")) == ()
