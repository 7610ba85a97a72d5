"""The host's checkup: each thing that can be missing is named with its fix."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

from mtbuild import doctor
from mtbuild.doctor import Checkup
from mtbuild.paths import Paths
from mtbuild.prove.engine import Engine, EngineFacts, connect

ROOT = Path(__file__).parents[2]


def mtbuild(*words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from mtbuild.cli import main; main()", "--root", str(ROOT), *words]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env={**os.environ, **(env or {})}
    )


def an_engine(tmp_path: Path, *, runtimes: tuple[str, ...] = ("runc",), version: str = "26.1.5") -> Engine:
    """An engine whose answer is known; nothing here talks to it."""
    engine = Engine(socket="unix:///none", docker=Path("/d"), buildx=("/no/buildx",), origin="running")
    facts = EngineFacts(
        version=version,
        api="1.45",
        driver="overlay2",
        store="graphdriver",
        cgroup="2",
        runtimes=runtimes,
        cdi=(str(tmp_path / "cdi"),),
        data_root=tmp_path,
        cpus=2,
        memory_bytes=1,
        kernel="6",
        system="Debian",
    )
    engine.__dict__["facts"] = facts  # what cached_property would fill
    return engine


@pytest.mark.parametrize(
    ("version", "floor", "older"),
    [
        ("26.1.5+dfsg1", "25", False),
        ("20.10.24+dfsg1", "25", True),
        ("0.13.1+ds1", "0.13", False),
        ("0.9.1", "0.13", True),  # as strings it would be the other way round
        ("dev", "25", False),
        ("570.86.15", "525.60.13", False),
    ],
)
def test_versions_are_compared_as_versions(version: str, floor: str, older: bool) -> None:
    assert doctor._older(version, Version(floor)) is older


def test_an_old_engine_without_buildx_is_named(tmp_path: Path) -> None:
    found = {one.topic: one for one in doctor._engine(an_engine(tmp_path, version="20.10.24+dfsg1"))}
    assert (found["engine"].level, found["engine"].fix) == ("warn", "update Docker to 25 or newer")
    assert found["store"].level == "warn"
    assert "containerd-snapshotter" in found["store"].fix
    assert (found["buildx"].level, found["buildx"].fix) == ("fail", "install docker-buildx")


def test_how_a_container_gets_at_the_gpu(tmp_path: Path) -> None:
    cdi = tmp_path / "cdi"
    nothing = doctor._gpu_access(an_engine(tmp_path))
    assert nothing.level == "warn"
    assert "nvidia-ctk cdi generate" in nothing.fix
    toolkit = doctor._gpu_access(an_engine(tmp_path, runtimes=("nvidia", "runc")))
    assert (toolkit.level, "toolkit" in toolkit.message) == ("ok", True)
    cdi.mkdir()
    (cdi / "other.json").write_text('{"kind": "vendor.com/device"}')
    assert doctor._gpu_access(an_engine(tmp_path)).level == "warn"
    (cdi / "nvidia.yaml").write_text("kind: nvidia.com/gpu\n")
    found = doctor._gpu_access(an_engine(tmp_path))
    assert (found.level, found.message) == ("ok", f"CDI: {cdi}/nvidia.yaml")


@pytest.mark.parametrize(
    ("room", "least", "level"), [(0.0, 0.0, "ok"), (1e9, 0.0, "warn"), (1e9, 1e9, "fail")]
)
def test_a_small_disk_says_how_much_is_free_and_what_can_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: float, least: float, level: str
) -> None:
    monkeypatch.setattr(doctor, "_ROOM_GB", room)
    monkeypatch.setattr(doctor, "_LEAST_GB", least)
    (found,) = doctor._disk(Paths(root=tmp_path, cache=tmp_path / "not/made/yet"), None)
    assert found.level == level
    assert f"GB free at {tmp_path}" in found.message
    assert ("mtbuild engine prune" in found.fix) is (level != "ok")


def test_json_has_a_verdict() -> None:
    good = Checkup(topic="a", level="warn", message="m", fix="f")
    bad = Checkup(topic="b", level="fail", message="m", fix="f")
    assert doctor.to_json((good,))["ok"] is True
    assert doctor.to_json((good, bad)) == {
        "schema": 1,
        "ok": False,
        "findings": [
            {"topic": "a", "level": "warn", "message": "m", "fix": "f"},
            {"topic": "b", "level": "fail", "message": "m", "fix": "f"},
        ],
    }


def test_an_engine_that_does_not_answer_fails_with_its_fix() -> None:
    done = mtbuild("doctor", "--json", env={"DOCKER_HOST": "unix:///no/such.sock"})
    assert done.returncode == 3, done.stderr
    answer = json.loads(done.stdout)
    assert answer["ok"] is False
    (engine,) = [one for one in answer["findings"] if one["topic"] == "engine"]
    assert engine["level"] == "fail"
    assert "does not answer" in engine["message"]
    assert "unset it" in engine["fix"]
    assert {"system", "memory", "disk", "registry", "gpu", "packages", "index"} <= {
        one["topic"] for one in answer["findings"]
    }, "one failure hid the others"
    shown = mtbuild("doctor", env={"DOCKER_HOST": "unix:///no/such.sock"})
    assert shown.returncode == 3
    assert "✗ engine" in shown.stdout
    assert "fix: start it" in shown.stdout


@pytest.mark.engine
def test_a_host_that_is_set_up_passes() -> None:
    connect(Paths.of(ROOT), bootstrap=True)
    done = mtbuild("doctor", "--json")
    assert done.returncode == 0, done.stdout
    found = {one["topic"]: one for one in json.loads(done.stdout)["findings"]}
    assert [one for one in found.values() if one["level"] == "fail"] == []
    assert found["store"]["message"].startswith("containerd image store")
    assert "build cache" in found["disk"]["message"]
    assert "answers in" in found["index"]["message"]


@pytest.mark.gpu
def test_a_gpu_is_named_with_its_driver() -> None:
    found = {one.topic: one for one in doctor._gpu(None)}
    assert found["gpu"].level == "ok"
    assert "sm_" in found["gpu"].message
    assert found["driver"].level == "ok"
