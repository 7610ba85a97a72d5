"""`mtbuild suggest`, against the real index (a few megabytes) and what it says to bad input."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import yaml
from click.testing import CliRunner, Result

from mtbuild.cli import cli
from mtbuild.plan.compat import judge, state_of
from mtbuild.plan.facts import gather
from mtbuild.plan.index import Index
from mtbuild.plan.wheels import Wheels

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(cache: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.setenv("MTBUILD_CACHE", str(cache))

    def suggest(*words: str) -> Result:
        return CliRunner().invoke(cli, ["suggest", *words])

    return suggest


def test_newest_pair_of_one_torch(run) -> None:  # type: ignore[no-untyped-def]
    done = run("--torch", "2.9.1", "--json", "--bytes")
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    values = {value["name"]: value for value in data["values"]}
    assert (data["schema"], data["torch"], data["best"]) == (1, "2.9.1", "0.0.33.post2")
    assert {
        name: values[name]["value"] for name in ("python", "cuda", "triton", "numpy", "glibc", "driver")
    } == {
        "python": "3.12",
        "cuda": "12.8",
        "triton": "3.5.1",
        "numpy": "<2",
        "glibc": ">=2.28",
        "driver": ">=525",
    }
    assert values["targets"]["value"].split() == ["7.0", "7.5", "8.0", "8.6", "9.0", "10.0", "12.0"]
    assert values["triton"]["source"].startswith("Requires-Dist: triton==3.5.1")
    assert all(value["reason"] and value["source"] for value in data["values"])
    assert "bytes from" in done.stderr


def test_refused_and_degraded_candidates_say_why(run) -> None:  # type: ignore[no-untyped-def]
    done = run("--torch", "2.9.0", "--json")
    assert done.exit_code == 0, done.output
    mistaken = {x["version"]: x for x in json.loads(done.stdout)["xformers"]}
    assert mistaken["0.0.33.post1"]["verdict"] == "fits"
    assert mistaken["0.0.33"]["verdict"] == "refused"
    assert "NEEDED libcudart.so.13" in mistaken["0.0.33"]["source"]
    done = run("--torch", "2.13.0", "--json")
    assert done.exit_code == 0, done.output
    newest = json.loads(done.stdout)
    assert newest["best"] is not None
    assert {x["version"]: x["verdict"] for x in newest["xformers"]}["0.0.35"] == "degraded"


def test_the_cell_it_prints_is_one_that_the_rules_pass(run, cache: Path) -> None:  # type: ignore[no-untyped-def]
    """What is suggested must be what `matrix` plans: the printed YAML goes through the rules."""
    import recorded

    done = run("--torch", "2.7.1", "--python", "3.11")
    assert done.exit_code == 0, done.output
    (suggested,) = yaml.safe_load(done.stdout.partition("as a cell of matrix.yaml:")[2])
    assert suggested["xformers"].startswith("0.0.31")
    words = [suggested[key] for key in ("name", "torch", "cuda", "triton", "xformers")]
    cell = recorded.cell(*words, python=suggested["python"])
    findings = judge(cell, gather(cell, Wheels(Index.from_environment(cache=cache), cache)))
    assert (state_of(cell, findings), findings) == ("planned", ())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--torch", "2.7.9"], "the index has no torch 2.7.9. Did you mean '2.7"),
        (["--torch", "2.9.1", "--python", "3.8"], "torch 2.9.1 has no wheel for cp38"),
        (["--torch", "newest"], "'newest' is neither a version nor a version range"),
    ],
)
def test_bad_input(run, words: list[str], message: str) -> None:  # type: ignore[no-untyped-def]
    done = run(*words)
    assert done.exit_code == 2
    assert message in done.stderr
    assert "fix:" in done.stderr


def test_help_shows_an_example() -> None:
    done = CliRunner().invoke(cli, ["suggest", "--help"])
    assert "mtbuild suggest --torch 2.9.1" in done.output
