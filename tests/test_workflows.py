"""The workflows: linted, every action pinned by commit, no permission that isn't asked for."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).parents[1] / ".github" / "workflows"
FILES = sorted(FOLDER.glob("*.yml"))


def test_zizmor_finds_nothing() -> None:
    zizmor = Path(sys.executable).with_name("zizmor")
    command = [zizmor, "--offline", "--no-progress", "--min-severity", "low", FOLDER]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_actions_are_pinned_by_commit_with_the_version_beside_it(path: Path) -> None:
    uses = re.findall(r"uses: *(\S+)(.*)", path.read_text())
    assert uses
    for action, comment in uses:
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action), action
        assert re.fullmatch(r" # v\d+(\.\d+)*", comment), f"{action} says no version"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_permissions_start_from_none_and_every_job_has_a_limit(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {}
    for name, job in workflow["jobs"].items():
        assert "permissions" in job, f"{name} states no permissions"
        assert job["timeout-minutes"] <= 180, f"{name} has no sensible limit"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_step_sees_one_secret_and_a_pipe_hides_no_failure(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    shell = workflow.get("defaults", {}).get("run", {}).get("shell")
    for name, job in workflow["jobs"].items():
        assert "secrets." not in str(job.get("env", {})), f"{name} gives a secret to all its steps"
        for step in job["steps"]:
            assert str(step.get("env", {})).count("secrets.") <= 1, f"{name}: {step.get('name')}"
            if " | " in step.get("run", ""):  # GitHub's own default is `bash -e`, without pipefail
                assert shell == "bash", f"{name}: {step.get('name')}"
