"""Smoke on a real engine: the container's hardening, whose word counts, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mtbuild.digest import Digest, Reference
from mtbuild.errors import InfrastructureError, InputError, MtbuildError
from mtbuild.paths import Paths
from mtbuild.plan.cell import Base
from mtbuild.proc import run
from mtbuild.prove import base, embedded, host_facts
from mtbuild.prove import container as containers
from mtbuild.prove import smoke as smoking
from mtbuild.prove.engine import Engine, connect, retire
from mtbuild.prove.report import SmokeReport
from mtbuild.prove.suite_files import suite_files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[3]
BOOKWORM = Base(name="bookworm", kind="bootstrap", glibc="2.36", python=("3.11",), suite="bookworm")

REQUEST = {
    "schema": 1,
    "nonce": "0123456789abcdef",
    "tier": "cpu",
    "user": "65532:65532",
    "checks": ["compiler", "disk"],
}


def end(**changes: Any) -> containers.Finished:
    values: dict[str, Any] = {
        "exit_status": 0,
        "oom_killed": False,
        "seconds": 1.0,
        "settings": {},
        "log": "…",
    }
    return containers.Finished(**{**values, **changes})


def said(folder: Path, **changes: Any) -> None:
    result = {"status": "passed", "seconds": 1.0, "message": "", "detail": "", "diagnosis": "", "fix": ""}
    document = {
        "schema": 1,
        "nonce": REQUEST["nonce"],
        "tier": "cpu",
        "results": [{"check": check, **result} for check in REQUEST["checks"]],
        "facts": {"gpu.name": "NVIDIA H200"},
        **changes,
    }
    (folder / "report.json").write_text(json.dumps(document))


# --- what an image may say ----------------------------------------------------------------------------------


def test_what_an_image_says_never_takes_the_place_of_a_hosts_fact(tmp_path: Path) -> None:
    said(tmp_path)
    results, facts = smoking._read(tmp_path, REQUEST, end())
    assert [(one.check, one.status, one.user) for one in results] == [
        ("compiler", "passed", "65532:65532"),
        ("disk", "passed", "65532:65532"),
    ]
    assert [(fact.name, fact.observed_by) for fact in facts] == [("suite.gpu.name", "image")]


def link_to_a_file_of_the_host(folder: Path) -> None:
    (folder / "report.json").symlink_to("/etc/hostname")


def too_long(folder: Path) -> None:
    with (folder / "report.json").open("wb") as file:
        file.truncate(9 << 20)


@pytest.mark.parametrize(
    ("leave", "why"),
    [
        (lambda folder: None, "No such file"),
        (lambda folder: said(folder, nonce="fedcba9876543210"), "answers another request"),
        (lambda folder: said(folder, tier="gpu"), "answers another request"),
        (lambda folder: said(folder, results=[]), "instead of compiler, disk"),
        (lambda folder: said(folder, mood="fine"), "'mood' was unexpected"),
        (lambda folder: (folder / "report.json").write_text("{"), "Expecting"),
        (lambda folder: os.mkfifo(folder / "report.json"), "no plain file"),
        (link_to_a_file_of_the_host, "symbolic link"),
        (too_long, "at most 8 MiB"),
    ],
)
def test_a_report_that_cant_be_used_is_an_error_of_every_check(
    tmp_path: Path, leave: Callable[[Path], object], why: str
) -> None:
    leave(tmp_path)
    results, facts = smoking._read(tmp_path, REQUEST, end())
    assert [(one.check, one.status) for one in results] == [("compiler", "error"), ("disk", "error")]
    assert why in results[0].message
    assert facts == []


def test_why_there_is_no_report_is_said(tmp_path: Path) -> None:
    assert "memory" in smoking._read(tmp_path, REQUEST, end(oom_killed=True))[0][0].message
    assert "limits" in smoking._read(tmp_path, REQUEST, end(exit_status=None))[0][0].message


def test_a_gpu_tier_needs_a_gpu_that_the_host_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_facts, "gpus", lambda: ())
    assert smoking.tier_here("auto") == "cpu"
    assert smoking.tier_here("cpu") == "cpu"
    with pytest.raises(InputError, match="NVML sees no GPU"):
        smoking.tier_here("gpu")


def session(tmp_path: Path, card: host_facts.HostGpu) -> smoking._Session:
    return smoking._Session(
        ref=Reference.parse(f"127.0.0.1:9/smoke@{Digest('0' * 64)}"),
        cell=None,
        engine=None,  # type: ignore[arg-type]
        out=tmp_path,
        tier="gpu",
        note=lambda _: None,
        limits=containers.Limits(),
        required=(),
        runtime=False,
        card=card,
        cards=2,
        attachment=None,
        weights=None,
    )


def test_only_the_memory_on_the_card_that_was_handed_over_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: dict[str, int] = {}
    monkeypatch.setattr(host_facts, "held_by", lambda container: dict(held))
    run_ = session(tmp_path, gpu(1))
    run_.watch("c", "65532:65532", tmp_path)
    assert not run_.used_its_card
    assert not (tmp_path / "gpu-seen").exists()
    held["GPU-1"] = 5
    run_.watch("c", "65532:65532", tmp_path)
    held["GPU-1"] = 3
    run_.watch("c", "65532:65532", tmp_path)
    assert run_.held == {"65532:65532": 5}
    assert run_.used_its_card
    assert (tmp_path / "gpu-seen").exists()
    held["GPU-0"] = 7  # a container that reaches a second card was not shut in as it should be
    run_.watch("c", "65532:65532", tmp_path)
    assert run_.held_elsewhere == {"GPU-0": 7}
    assert not run_.used_its_card


def gpu(index: int) -> host_facts.HostGpu:
    values = {"name": "NVIDIA L4", "sm": "8.9", "driver": "580.65", "cuda": "13.0", "memory_bytes": 1 << 34}
    return host_facts.HostGpu(index=index, uuid=f"GPU-{index}", minor=index, **values)  # type: ignore[arg-type]


def test_what_can_not_be_asked_for_is_said_before_anything_starts(tmp_path: Path) -> None:
    ref = Reference.parse(f"127.0.0.1:9/smoke@{Digest('0' * 64)}")
    asked: dict[str, Any] = {"cell": None, "engine": None, "out": tmp_path, "tier": "cpu"}
    with pytest.raises(InputError, match="the tier is cpu"):
        smoking.smoke(ref, gpu="0", **asked)
    with pytest.raises(InputError, match="no folder") as raised:
        smoking.smoke(ref, weights=tmp_path / "none", **asked)
    assert "mtmodels verify" in (raised.value.fix or "")


def test_the_suites_digest_is_that_of_its_files() -> None:
    assert smoking.suite_digest() == smoking.suite_digest()
    names = {str(file.relative_to(smoking.SUITE)) for file in suite_files()}
    assert {"__main__.py", "runner.py", "checks/compiler.py", "report.schema.json"} <= names
    assert not [name for name in names if "__pycache__" in name]


# --- on the engine ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Paths]:
    """A project of its own with its registry; engine and base tar come from the user's cache."""
    project = Paths(root=tmp_path_factory.mktemp("project"), cache=Paths.of(ROOT).cache)
    yield project
    embedded.stop_registry(project)


@pytest.fixture(scope="module")
def engine(paths: Paths) -> Engine:
    return connect(paths, bootstrap=True)


@pytest.fixture(scope="module")
def image(paths: Paths, engine: Engine) -> Iterator[Callable[[str, str], Reference]]:
    """Makes an image from Dockerfile lines on top of the base, pushed, by digest."""
    registry = embedded.ensure_registry(paths)
    start = base.ensure_base(BOOKWORM, engine=engine, registry=registry, paths=paths)
    made = [start]

    def build(name: str, lines: str) -> Reference:
        context = paths.root / name
        context.mkdir()
        (context / "Dockerfile").write_text(f"FROM {start}\n{lines}\n")
        output = f"type=image,name={registry}/smoke:{name},push=true,oci-mediatypes=true"
        words = ["build", "--provenance=false", "--sbom=false", f"--metadata-file={context}/m.json"]
        run(
            [*engine.buildx, *words, f"--output={output}", *base.secret_flags(paths), context],
            timeout_s=600,
        )
        digest = json.loads((context / "m.json").read_text())["containerimage.digest"]
        made.append(Reference.parse(f"{registry}/smoke@{digest}"))
        return made[-1]

    yield build
    retire(engine, made)


def script(text: str) -> str:
    """Dockerfile lines for an image whose python3 is this shell script."""
    file = "/usr/bin/python3"
    return f"RUN <<'EOF'\ncat >{file} <<'SCRIPT'\n#!/bin/sh\n{text}\nSCRIPT\nchmod 755 {file}\nEOF"


APT = (
    "RUN --mount=type=secret,id=apt.conf --mount=type=secret,id=apt.sources --mount=type=secret,id=apt.auth "
    "--mount=type=secret,id=ca.pem --mount=type=tmpfs,target=/var/lib/apt/lists "
    "export APT_CONFIG=/run/secrets/apt.conf && apt-get update -qq && "
    "apt-get install -y -qq --no-install-recommends python3"
)


def left(engine: Engine) -> list[str]:
    return [one.name for one in engine.client.containers.list(all=True, filters={"label": "mtbuild.smoke"})]


def wait_for(what: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
        time.sleep(0.2)
    pytest.fail(f"nothing came within {seconds} s")


@pytest.mark.engine
def test_a_foreign_image_hardened_as_two_users(
    image: Callable[[str, str], Reference], engine: Engine, tmp_path: Path
) -> None:
    caches = "ENV TRITON_CACHE_DIR=/cache/triton TORCHINDUCTOR_CACHE_DIR=/cache/inductor HOME=/tmp USER=mt"
    ref = image("foreign", f"{APT}\nRUN mkdir -m 1777 /cache\n{caches}")
    notes: list[str] = []
    report = smoking.smoke(ref, cell=None, engine=engine, out=tmp_path, tier="cpu", note=notes.append)
    status = {(one.check, one.user): one.status for one in report.results}
    first, second = (one.user for one in report.runs)
    assert first == "65532:65532"
    assert second.endswith(":0")
    assert int(second.split(":")[0]) >= 1_000_000_000
    for check in ("users", "caches"):  # read-only root, no rights, executable cache: seen from inside
        assert status[check, first] == status[check, second] == "passed", report.problems
    assert status["disk", first] == status["ldconfig", first] == status["versions", first] == "passed"
    assert status["compiler", first] == status["compiler", second] == "failed"
    assert status["xformers.extension", first] == "skipped"
    assert "triton.jit" not in {check for check, _ in status}, "a GPU check is absent here, not skipped"
    assert not report.passed()
    assert [one.exit_status for one in report.runs] == [1, 1]
    facts = report.host_facts
    assert facts["digest"] == str(ref.digest)
    for user in (first, second):
        had = facts["container.settings"][user]  # type: ignore[index,call-overload]
        assert had["read_only"] is True  # type: ignore[index,call-overload]
        assert had["network"] == "none"  # type: ignore[index,call-overload]
        assert had["cap_drop"] == ["ALL"]  # type: ignore[index,call-overload]
        assert had["security_opt"] == ["no-new-privileges"]  # type: ignore[index,call-overload]
        assert had["init"] is True  # type: ignore[index,call-overload]
        assert had["user"] == user  # type: ignore[index,call-overload]
        assert had["memory_bytes"] > 0  # type: ignore[index,call-overload]
        assert had["memory_swap_bytes"] == had["memory_bytes"]  # type: ignore[index,call-overload]
        assert "host" not in had["namespaces"].values()  # type: ignore[index,call-overload]
        assert had["binds"] == {  # type: ignore[index,call-overload]
            "/mtbuild/suite": "ro",
            "/mtbuild/request.json": "ro",
            "/mtbuild/out": "rw",
        }
        assert had["pids"] > 0  # type: ignore[index,call-overload]
        assert "exec" in had["tmpfs"]["/cache"].split(",")  # type: ignore[index,call-overload]
        assert "exec" not in had["tmpfs"]["/tmp"].split(",")  # type: ignore[index,call-overload]
    assert report.image_facts["suite.versions.python"]
    assert any("✗ compiler" in note for note in notes)
    assert SmokeReport.load(tmp_path / "report.json") == report
    assert not list(tmp_path.glob("run-*"))
    assert left(engine) == []


@pytest.mark.engine
def test_a_report_that_lies_in_the_image_proves_nothing(
    image: Callable[[str, str], Reference], engine: Engine, tmp_path: Path
) -> None:
    """An image whose python3 only copies a report made for another run, and ends with 0."""
    said(tmp_path)
    old = (tmp_path / "report.json").read_text()
    ref = image("liar", script(f"cat >/mtbuild/out/report.json <<'JSON'\n{old}\nJSON\nexit 0"))
    report = smoking.smoke(ref, cell=None, engine=engine, out=tmp_path / "out", tier="cpu")
    assert {one.status for one in report.results} == {"error"}
    assert "answers another request" in report.results[0].message
    assert not report.passed()


@pytest.mark.engine
def test_an_image_without_python_is_told_so(
    image: Callable[[str, str], Reference], engine: Engine, tmp_path: Path
) -> None:
    with pytest.raises(MtbuildError, match="has no python3 on its PATH") as raised:
        smoking.smoke(image("bare", "LABEL bare=1"), cell=None, engine=engine, out=tmp_path, tier="cpu")
    assert raised.value.exit_code == 1
    assert left(engine) == []


@pytest.mark.engine
def test_a_digest_or_a_registry_that_is_not_there(paths: Paths, engine: Engine, tmp_path: Path) -> None:
    registry = embedded.ensure_registry(paths)
    nowhere = Reference.parse(f"{registry}/smoke@{Digest('0' * 64)}")
    with pytest.raises(MtbuildError, match="has no image smoke@sha256:000") as raised:
        smoking.smoke(nowhere, cell=None, engine=engine, out=tmp_path, tier="cpu")
    assert raised.value.exit_code == 1
    down = Reference.parse(f"127.0.0.1:9/smoke@{Digest('0' * 64)}")
    with pytest.raises(InfrastructureError, match="can't be pulled"):
        smoking.smoke(down, cell=None, engine=engine, out=tmp_path, tier="cpu")


@pytest.mark.engine
def test_a_container_is_ended_at_its_limit_and_gone(
    image: Callable[[str, str], Reference], engine: Engine
) -> None:
    ref = image("sleeper", script("echo started; trap '' TERM; sleep 600"))
    lines: list[str] = []
    finished = containers.run_in_container(
        ref,
        ["python3"],
        engine=engine,
        user="65532:65532",
        nonce="limit",
        mounts={},
        limits=containers.Limits(),
        limit_s=3,
        on_line=lines.append,
    )
    assert finished.exit_status is None
    assert lines == ["started"]
    assert 3 <= finished.seconds < 30
    assert left(engine) == []


@pytest.mark.engine
def test_a_process_that_takes_too_much_memory_is_seen(
    image: Callable[[str, str], Reference], engine: Engine
) -> None:
    ref = image("glutton", script("x=$(head -c 500000000 /dev/zero | tr '\\0' x); echo ${#x}"))
    finished = containers.run_in_container(
        ref,
        ["python3"],
        engine=engine,
        user="65532:65532",
        nonce="memory",
        mounts={},
        limits=containers.Limits(memory_bytes=64 << 20),
        limit_s=60,
    )
    assert finished.oom_killed
    assert finished.exit_status == 137


@pytest.mark.engine
def test_ctrl_c_leaves_no_container_and_kill_is_cleaned_up_by_the_next(
    image: Callable[[str, str], Reference], engine: Engine, paths: Paths, tmp_path: Path
) -> None:
    ref = image("waits", script("trap '' INT TERM; sleep 600"))
    command = [str(Path(sys.executable).with_name("mtbuild")), "--root", str(paths.root), "smoke", str(ref)]
    env = {**os.environ, "MTBUILD_CACHE": str(paths.cache)}

    def start() -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [*command, "--tier", "cpu"], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for(lambda: left(engine))
        return process

    process = start()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert left(engine) == []
    process = start()
    process.kill()
    process.wait(timeout=10)
    assert len(left(engine)) == 1, "nothing could be done against SIGKILL"
    assert containers.sweep(engine) == 1
    assert left(engine) == []
    assert containers.sweep(engine) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not host_facts.gpus(), reason="no GPU on this host")
def test_the_host_sees_its_gpu() -> None:
    first = host_facts.gpus()[0]
    assert first.memory_bytes > 1 << 30
    assert float(first.sm) >= 3.5
    assert first.driver.count(".") >= 1
