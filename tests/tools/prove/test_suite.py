"""The suite itself: its frame, and its checks run by this Python as they run in an image."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from suite_runner import CELL, Suite

from mtbuild.prove.report import CPU_CHECKS, GPU_CHECKS, WEIGHTS_CHECKS
from mtbuild.prove.smoke import SUITE


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return Suite(tmp_path)


# --- the frame ------------------------------------------------------------------------------------------


def test_host_and_suite_agree_on_what_there_is() -> None:
    listed = json.loads(
        subprocess.run([sys.executable, SUITE, "--list"], capture_output=True, text=True, check=True).stdout
    )
    both = {check["id"] for check in listed if check["tiers"] == ["cpu", "gpu"]}
    gpu = {check["id"] for check in listed if check["tiers"] == ["gpu"]}
    assert both == {*CPU_CHECKS, *WEIGHTS_CHECKS}
    assert gpu == set(GPU_CHECKS)
    files = {file.stem for file in (SUITE / "checks").glob("*.py")} - {"__init__"}
    assert files == {check["id"].replace(".", "_") for check in listed}
    limits = {check["id"]: check["limit_s"] for check in listed}
    assert 0 < limits.pop("generate.weights") <= 3600  # reads 90 GB
    assert all(0 < limit <= 600 for limit in limits.values())


def test_progress_is_live_and_the_report_answers_the_request(suite: Suite) -> None:
    report = suite.run("ldconfig", "disk")
    assert [line["event"] for line in suite.lines] == ["start", "check", "result", "check", "result", "end"]
    assert report["nonce"] == "0123456789abcdef"
    assert [result["check"] for result in report["results"]] == ["ldconfig", "disk"]
    assert report["facts"]["disk.cache_free"] > 0
    assert suite.exit_status == 0


def test_a_hung_check_is_killed_with_all_that_it_started(suite: Suite, tmp_path: Path) -> None:
    suite.add(
        "hangs",
        f"""
        import subprocess, time
        ID, TIERS, LIMIT_S = "hangs", ("cpu",), 5
        def run(ctx):
            child = subprocess.Popen(["sleep", "600"])
            open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
            time.sleep(600)
        """,
    )
    started = time.monotonic()
    report = suite.run("hangs", "ldconfig")
    assert time.monotonic() - started < 30
    assert report["results"][0]["status"] == "timeout"
    assert "within 5 s" in report["results"][0]["message"]
    assert report["results"][1]["status"] == "passed", "the next check still runs"
    assert suite.exit_status == 1
    state = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "signal 11"),
        ("import os; os._exit(7)", "status 7"),
        ("raise ValueError('odd')", "ValueError: odd"),
    ],
)
def test_a_crash_costs_one_result(suite: Suite, body: str, message: str) -> None:
    suite.add("breaks", f"ID, TIERS, LIMIT_S = 'breaks', ('cpu',), 20\ndef run(ctx):\n    {body}\n")
    result = suite.one("breaks")
    assert result["status"] == "error"
    assert message in result["message"]
    assert result["diagnosis"]
    assert result["fix"]


def test_a_check_of_another_tier_or_none_is_an_error(suite: Suite) -> None:
    report = suite.run("triton.jit", "no.such")
    assert {result["status"] for result in report["results"]} == {"error"}


def test_a_request_that_it_cant_read_is_status_2(suite: Suite, tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text('{"schema": 9}')
    done = subprocess.run(
        [sys.executable, suite.suite, "--request", tmp_path / "odd.json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "schema 9" in done.stderr


# --- compiler, headers, ldconfig, caches, disk, users: for real -----------------------------------------


def test_this_machines_compiler_and_headers_work(suite: Suite) -> None:
    report = suite.run("compiler", "headers", "ldconfig")
    assert [result["status"] for result in report["results"]] == ["passed"] * 3


def test_no_compiler(suite: Suite, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    env = {"PATH": str(tmp_path / "empty"), "CC": "", "CXX": ""}
    for check in ("compiler", "headers"):
        result = suite.one(check, env)
        assert result["status"] == "failed"
        assert "gcc" in result["fix"]
    assert suite.one("compiler", {"CC": "nope-cc"})["message"].startswith("no C compiler")


def test_a_compiler_that_is_only_a_name(suite: Suite, tmp_path: Path) -> None:
    fake = tmp_path / "gcc"
    fake.write_text("#!/bin/sh\necho \"gcc: fatal error: cannot execute 'cc1'\" >&2\nexit 1\n")
    fake.chmod(0o755)
    result = suite.one("compiler", {"CC": str(fake)})
    assert result["status"] == "failed"
    assert "compiles nothing" in result["message"]
    assert "cc1" in result["detail"]


def test_a_cache_that_cant_be_written(suite: Suite) -> None:
    result = suite.one("caches", {"TRITON_CACHE_DIR": "/proc/nope"})
    assert result["status"] == "failed"
    assert result["message"].startswith("TRITON_CACHE_DIR: /proc/nope can't be written")
    assert "1777" in result["fix"]


def test_users_tells_who_ran_and_that_the_root_is_open(suite: Suite) -> None:
    assert "was started as 7:8" in suite.one("users", user="7:8")["message"]
    result = suite.one("users")  # this machine is no hardened container
    assert result["status"] == "failed"
    assert result["message"].startswith(("has rights", "could write"))


# --- wan: what an image may hold, by modules in their place ---------------------------------------------


def test_wan_with_a_name_that_is_not_there(suite: Suite) -> None:
    """V71.1: cannot import name 'configs'."""
    folder = suite.folder / "site/wan"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("__all__ = ['configs']\n")
    (folder / "multitalk.py").write_text("from wan import configs\n")
    result = suite.one("imports.wan", runtime=True)
    assert result["status"] == "failed"
    assert "2 of 2 modules" in result["message"]
    assert "cannot import name 'configs'" in result["detail"]


# --- Triton, for real, with what this environment has ---------------------------------------------------


@pytest.mark.slow
def test_triton_compiles_interprets_and_builds_a_launcher(suite: Suite) -> None:
    report = suite.run("triton.aot", "triton.interpret", "triton.stub", cell=CELL)
    assert {result["check"]: result["status"] for result in report["results"]} == {
        "triton.aot": "passed",
        "triton.interpret": "passed",
        "triton.stub": "passed",
    }, report["results"]
    facts = report["facts"]
    assert facts["triton_aot.cache_was_empty"] is True
    assert facts["triton_aot.cubin_bytes"]["suite.matmul@9.0"] > 1000
    assert {"suite.add", "suite.matmul", "layer_norm"} <= set(facts["triton_aot.kernels"])


@pytest.mark.slow
def test_triton_says_v72s_words_without_a_compiler(suite: Suite, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = suite.one("triton.stub", {"PATH": str(tmp_path / "empty")}, cell=CELL)
    assert result["status"] == "failed"
    assert result["message"].startswith("Failed to find C compiler. Please specify via CC")
    assert "V72" in result["diagnosis"]


def test_a_capability_that_triton_does_not_know(suite: Suite) -> None:
    result = suite.one("triton.aot", cell={**CELL, "targets": ["99.9"]})
    assert result["status"] == "failed"
    assert "for 99.9" in result["message"]
