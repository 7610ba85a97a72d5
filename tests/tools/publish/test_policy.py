"""The gate fails closed: whatever set of evidence lacks one thing that is required, the answer is no."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from publish_samples import (
    H200,
    NOW,
    RTX4090,
    USERS,
    V73,
    SampleBuild,
    cell_of,
    policy_of,
    report_of,
    statement_of,
)

from mtbuild.digest import Digest, Reference
from mtbuild.prove.report import EVERY_USER, required_checks
from mtbuild.publish.policy import Policy, judge

if TYPE_CHECKING:
    from mtbuild.publish.evidence import Statement

DIGEST = Digest.of(b"the image")
REF = Reference(host="127.0.0.1:5000", path="staging", digest=DIGEST)
BUILD = SampleBuild(cell_id=V73.id, cell_name="v73", build_id="ef" * 32, ref=REF)
CHECKED = policy_of(BUILD, None)
VERIFIED = policy_of(BUILD, None, channel="verified")


def said(**changes: Any) -> Statement:
    return statement_of(report_of(REF, **changes), BUILD)


def rules(policy: Policy, *statements: Statement) -> set[str]:
    verdict = judge(DIGEST, statements, policy, now=NOW)
    assert not verdict.passed
    assert all(finding.message and finding.source and finding.fix for finding in verdict.findings)
    return {finding.rule for finding in verdict.findings}


def test_a_whole_run_is_enough() -> None:
    cpu, gpu = said(), said(gpu=H200)
    assert judge(DIGEST, [cpu], CHECKED, now=NOW).used == (cpu.envelope,)
    assert judge(DIGEST, [gpu], CHECKED, now=NOW).passed
    assert judge(DIGEST, [gpu], VERIFIED, now=NOW).passed
    both = judge(DIGEST, [cpu, gpu], VERIFIED, now=NOW)
    assert set(both.used) == {cpu.envelope, gpu.envelope}


def test_a_cpu_cannot_vouch_for_a_gpu() -> None:
    assert rules(VERIFIED, said()) == {"no-gpu"}
    told = said(gpu=H200)
    facts = tuple(replace(fact, observed_by="image") for fact in told.report.facts)
    image_says = replace(told, report=replace(told.report, facts=facts))
    assert rules(VERIFIED, image_says) == {"not-observed"}


def test_absent_evidence_is_no() -> None:
    assert rules(CHECKED) == {"absent"}


def test_each_kind_of_evidence_that_does_not_count() -> None:
    good = said()
    report = good.report
    assert rules(CHECKED, replace(good, signer="")) == {"unsigned"}
    assert rules(CHECKED, replace(good, signer="a stranger")) == {"unsigned"}
    assert rules(CHECKED, replace(good, envelope=None)) == {"unsigned"}
    assert rules(CHECKED, replace(good, subject=Digest.of(b"other"))) == {"other-digest"}
    other = replace(REF, digest=Digest.of(b"other"))
    assert rules(CHECKED, replace(good, report=replace(report, ref=other))) == {"other-digest"}
    assert rules(CHECKED, replace(good, report=replace(report, cell_id=None))) == {"other-cell"}
    assert rules(CHECKED, replace(good, build_id="00" * 32)) == {"other-build"}
    assert rules(CHECKED, said(suite=Digest.of(b"an easier suite"))) == {"other-suite"}
    assert rules(CHECKED, said(finished=NOW - timedelta(days=91))) == {"expired"}
    assert rules(CHECKED, said(finished=NOW + timedelta(hours=1))) == {"expired"}
    assert rules(CHECKED, replace(good, report=replace(report, finished="yesterday"))) == {"expired"}
    assert judge(DIGEST, [said(finished=NOW - timedelta(days=90))], CHECKED, now=NOW).passed


def test_a_forced_build_is_never_let_out() -> None:
    forced = replace(said(gpu=H200), override="only to look")
    assert rules(CHECKED, forced) == {"override"}
    assert rules(VERIFIED, forced, said(gpu=H200), said()) == {"override"}


def test_degraded_passes_only_where_the_cell_allows_it() -> None:
    bad = {"xformers.extension": "degraded"}
    assert rules(CHECKED, said(bad=bad)) == {"not-passed"}
    t215 = cell_of(allow=("degraded",))
    assert t215.id == V73.id
    policy = policy_of(BUILD, None, cell=t215)
    verdict = judge(DIGEST, [said(cell=t215, bad=bad)], policy, now=NOW)
    assert verdict.passed
    assert verdict.degraded == ("xformers.extension",)


def test_xformers_is_required_only_where_the_cell_has_it() -> None:
    plain = cell_of(xformers=None)
    build = replace(BUILD, cell_id=plain.id)
    statement = statement_of(report_of(REF, cell=plain), build)
    assert judge(DIGEST, [statement], policy_of(build, None, cell=plain), now=NOW).passed


def test_the_newest_run_on_each_gpu_decides() -> None:
    old, new = NOW - timedelta(hours=5), NOW - timedelta(hours=1)
    bad = {"triton.jit": "failed"}
    repaired = judge(
        DIGEST, [said(gpu=H200, finished=old, bad=bad), said(gpu=H200, finished=new)], VERIFIED, now=NOW
    )
    assert repaired.passed
    assert rules(VERIFIED, said(gpu=H200, finished=new, bad=bad), said(gpu=H200, finished=old)) == {
        "not-passed"
    }
    tie = [said(gpu=H200, finished=new, bad=bad), said(gpu=H200, finished=new)]
    assert rules(VERIFIED, *tie) == {"not-passed"}


def test_a_failure_that_a_newer_suite_found_counts_until_a_newer_run_passes() -> None:
    newer = Digest.of(b"a suite that asks more")
    old, new = NOW - timedelta(hours=5), NOW - timedelta(hours=1)
    fine = said(finished=old)
    found = said(finished=new, suite=newer, bad={"generate": "failed"})
    assert rules(CHECKED, fine, found) == {"failed"}
    # ... also in a check that this policy has never heard of
    extra = replace(
        found.report,
        required=(*found.report.required, "new.check"),
        results=tuple(
            replace(result, check="new.check") if result.status == "failed" else replace(result)
            for result in found.report.results
        ),
    )
    unheard = replace(found, report=extra)
    assert "failed" in rules(CHECKED, fine, unheard)
    # ... and where only that GPU model failed, it no longer vouches
    on_gpu = said(gpu=H200, finished=new, suite=newer, bad={"triton.jit": "failed"})
    assert rules(VERIFIED, said(gpu=H200, finished=old), on_gpu) == {"not-passed"}
    assert judge(DIGEST, [said(gpu=RTX4090), on_gpu], VERIFIED, now=NOW).passed
    assert judge(DIGEST, [fine, found, said(finished=NOW)], CHECKED, now=NOW).passed
    # a pass of another suite proves nothing and takes nothing back
    assert "failed" in rules(CHECKED, fine, found, said(finished=NOW, suite=newer))
    assert judge(DIGEST, [fine, said(finished=new, suite=newer)], CHECKED, now=NOW).used == (fine.envelope,)


def test_a_pass_wears_off_and_a_failure_does_not() -> None:
    fine, late = said(gpu=H200, finished=NOW - timedelta(days=30)), NOW + timedelta(days=61)
    verdict = judge(DIGEST, [fine], VERIFIED, now=NOW)
    assert verdict.expires == "2027-01-21T12:00:00Z"
    assert verdict.to_json()["expires"] == verdict.expires
    over = judge(DIGEST, [fine], VERIFIED, now=late)
    assert (over.passed, over.expires, [f.rule for f in over.findings]) == (False, "", ["expired"])
    bad = said(finished=NOW - timedelta(days=200), bad={"compiler": "failed"})
    assert rules(CHECKED, bad, said(gpu=H200)) == {"failed"}
    assert judge(DIGEST, [bad, said(), said(gpu=H200)], CHECKED, now=NOW).passed


def test_one_gpu_may_fail_what_another_proves_but_not_what_needs_no_gpu() -> None:
    fine = said(gpu=H200)
    assert judge(DIGEST, [fine, said(gpu=RTX4090, bad={"triton.jit": "failed"})], VERIFIED, now=NOW).passed
    assert rules(VERIFIED, fine, said(gpu=RTX4090, bad={"imports.wan": "failed"})) == {"failed"}
    assert rules(VERIFIED, fine, said(bad={"compiler": "error"})) == {"failed"}


def test_a_pass_as_one_user_only_is_none() -> None:
    good = said()
    results = tuple(
        replace(r, status="failed") if (r.check, r.user) == ("caches", USERS[1]) else r
        for r in good.report.results
    )
    assert rules(CHECKED, replace(good, report=replace(good.report, results=results))) == {"failed"}
    alone = replace(good.report, runs=good.report.runs[:1])
    assert rules(CHECKED, replace(good, report=alone)) == {"not-passed"}


def test_a_container_that_was_killed_is_no_pass() -> None:
    good = said()
    for end in ({"exit_status": None}, {"oom_killed": True}, {"exit_status": 137}, {"exit_status": 1}):
        runs = (replace(good.report.runs[0], **end), good.report.runs[1])
        assert rules(CHECKED, replace(good, report=replace(good.report, runs=runs))) == {"not-passed"}


def test_a_policy_comes_back_and_has_its_own_digest() -> None:
    assert Policy.from_json(VERIFIED.to_json()) == VERIFIED
    assert VERIFIED.digest != CHECKED.digest
    for change in ({"max_age_days": 91}, {"required": ()}, {"signers": ("x",)}, {"allow_degraded": True}):
        assert replace(CHECKED, **change).digest != CHECKED.digest
    with pytest.raises(ValueError, match="is not"):
        Policy.from_json({**VERIFIED.to_json(), "uri": "tag:someone-else"})


# Properties. `flaw` is one way in which a run can fall short; every set of flawed runs must be refused.

_STATUSES = ("failed", "error", "timeout", "skipped", "degraded", "absent")


@st.composite
def flawed(draw: st.DrawFn, channel: str) -> Statement:
    """A run that does not prove the channel: by a required check, or by not counting at all."""
    gpu = draw(st.sampled_from([None, H200, RTX4090]))
    hours = draw(st.integers(1, 24 * 80))
    finished = NOW - timedelta(hours=hours)
    kind = draw(
        st.sampled_from(["check", "unsigned", "digest", "expired", "suite", "cell", "build", "cpu", "runs"])
    )
    if kind == "cpu" and channel == "verified":
        return said(finished=finished)
    if kind in ("check", "cpu"):
        tier = "gpu" if channel == "verified" else "cpu"
        check = draw(st.sampled_from(required_checks(V73, tier, runtime=True)))  # type: ignore[arg-type]
        status = draw(st.sampled_from(_STATUSES))
        run = said(gpu=gpu, finished=finished, bad={check: status})
        if status != "absent" and draw(st.booleans()):  # only one of the users, if both have to run it
            user = draw(st.sampled_from(USERS if check in EVERY_USER else USERS[:1]))
            results = tuple(
                replace(r, status="passed") if r.check == check and r.user != user else r
                for r in run.report.results
            )
            run = replace(run, report=replace(run.report, results=results))
        return run
    run = said(gpu=gpu, finished=finished)
    if kind == "runs":
        return replace(run, report=replace(run.report, runs=()))
    if kind == "unsigned":
        return replace(run, signer=draw(st.sampled_from(["", "stranger"])))
    if kind == "digest":
        return replace(run, subject=Digest.of(b"other"))
    if kind == "expired":
        return said(gpu=gpu, finished=NOW - timedelta(days=draw(st.integers(91, 4000))))
    if kind == "suite":
        return said(gpu=gpu, finished=finished, suite=Digest.of(b"other"))
    if kind == "cell":
        return replace(run, report=replace(run.report, cell_id="torch2.8.0-cu128-py311"))
    return replace(run, build_id="00" * 32)


@pytest.mark.parametrize("channel", ["checked", "verified"])
def test_no_set_of_flawed_runs_is_ever_a_proof(channel: str) -> None:
    policy = policy_of(BUILD, None, channel=channel)

    @settings(max_examples=150, deadline=None)
    @given(runs=st.lists(flawed(channel), max_size=5))
    def holds(runs: list[Statement]) -> None:
        verdict = judge(DIGEST, runs, policy, now=NOW)
        assert not verdict.passed
        assert verdict.findings
        assert verdict.used == ()

    holds()


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_runs_are_never_added_up(data: st.DataObject) -> None:
    """Two runs that together pass everything, but neither alone, prove nothing."""
    names = required_checks(V73, "gpu", runtime=True)
    first = data.draw(st.sets(st.sampled_from(names), min_size=1, max_size=len(names) - 1))
    second = set(names) - first
    runs = [
        said(gpu=gpu, bad=dict.fromkeys(lacking, "absent"))
        for gpu, lacking in ((H200, first), (RTX4090, second))
    ]
    assert not judge(DIGEST, runs, VERIFIED, now=NOW).passed


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_yes_ends_at_its_expiry_and_never_comes_back(data: st.DataObject) -> None:
    ages = st.integers(0, 24 * 200)
    runs = data.draw(
        st.lists(
            st.builds(
                lambda gpu, hours, bad, suite: said(
                    gpu=gpu, finished=NOW - timedelta(hours=hours), bad=bad, suite=Digest.of(suite)
                ),
                st.sampled_from([None, H200, RTX4090]),
                ages,
                st.sampled_from([{}, {}, {"compiler": "failed"}, {"generate": "skipped"}]),
                st.sampled_from([b"the suite", b"the suite", b"another"]),
            ),
            max_size=5,
        )
    )
    verdict = judge(DIGEST, runs, CHECKED, now=NOW)
    later = NOW + timedelta(hours=data.draw(ages))
    expected = verdict.passed and f"{later:%Y-%m-%dT%H:%M:%SZ}" <= verdict.expires
    assert judge(DIGEST, runs, CHECKED, now=later).passed == expected


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_order_and_repetition_do_not_matter(data: st.DataObject) -> None:
    runs = data.draw(
        st.lists(st.one_of(flawed("checked"), st.just(said()), st.just(said(gpu=H200))), max_size=5)
    )
    shuffled = data.draw(st.permutations(runs + runs[:2]))
    assert judge(DIGEST, runs, CHECKED, now=NOW) == judge(DIGEST, shuffled, CHECKED, now=NOW)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_stricter_policy_never_says_yes_where_a_laxer_one_says_no(data: st.DataObject) -> None:
    runs = data.draw(st.lists(st.one_of(flawed("checked"), st.just(said())), max_size=4))
    more = data.draw(st.sets(st.sampled_from(["generate", "handler.inputs", "triton.jit"])))
    stricter = replace(CHECKED, required=(*CHECKED.required, *sorted(more)), max_age_days=30)
    if judge(DIGEST, runs, stricter, now=NOW).passed:
        assert judge(DIGEST, runs, CHECKED, now=NOW).passed
