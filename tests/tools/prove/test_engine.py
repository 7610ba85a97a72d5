"""Which engine is used, and one clear error for each way of having none."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mtbuild.digest import Reference
from mtbuild.errors import InfrastructureError
from mtbuild.paths import Paths
from mtbuild.proc import run
from mtbuild.prove import embedded, engine

ROOT = Path(__file__).parents[3]


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Paths:
    """A machine on which nothing is set up: no engine, no client, no plugin, an empty cache."""
    for name in ("DOCKER_HOST", "DOCKER_CONTEXT", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(engine, "_USUAL", (str(tmp_path / "none.sock"),))
    monkeypatch.setattr(engine, "_PLUGINS", ())
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker-config"))
    monkeypatch.setenv("MTBUILD_CACHE", str(Paths.of(ROOT).cache))  # as it was, whatever HOME is
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    return Paths(root=tmp_path, cache=tmp_path / "cache")


def program(paths: Paths, name: str) -> Path:
    file = paths.root / "bin" / name
    file.write_text("#!/bin/sh\nexit 0\n")
    file.chmod(0o755)
    return file


def failure(paths: Paths) -> InfrastructureError:
    with pytest.raises(InfrastructureError) as raised:
        engine.connect(paths)
    return raised.value


def test_no_engine_at_all(bare: Paths) -> None:
    error = failure(bare)
    assert error.message == "there is no Docker engine on this machine"
    assert "make engine" in error.fix
    assert error.exit_code == 3


def test_only_a_client(bare: Paths) -> None:
    client = program(bare, "docker")
    assert failure(bare).message == f"there is no Docker engine on this machine ({client} is only a client)"


def test_installed_but_stopped(bare: Paths) -> None:
    program(bare, "docker")
    daemon = program(bare, "dockerd")
    error = failure(bare)
    assert error.message == f"Docker is installed ({daemon}) but its engine is not running"
    assert "systemctl start docker" in error.fix


def test_the_embedded_engine_is_stopped(bare: Paths) -> None:
    embedded.Daemon(folder=bare.engine).programs.mkdir(parents=True)
    error = failure(bare)
    assert error.message == "the embedded engine is stopped"
    assert "make engine" in error.fix


@pytest.mark.parametrize("host", ["unix:///no/such/docker.sock", "tcp://127.0.0.1:9"])
def test_a_docker_host_that_does_not_answer(bare: Paths, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setenv("DOCKER_HOST", host)
    error = failure(bare)
    assert error.message.startswith(f"the engine that DOCKER_HOST names ({host}) does not answer")
    assert "unset" in error.fix


def test_without_root_nothing_is_set_up(bare: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(InfrastructureError, match="starting the embedded engine needs root"):
        engine.connect(bare, bootstrap=True)
    assert not bare.engine.exists()


# --- on the real engine -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared() -> engine.Engine:
    return engine.connect(Paths.of(ROOT), bootstrap=True)


@pytest.mark.engine
def test_the_engine_and_its_programs_belong_together(shared: engine.Engine) -> None:
    assert shared.facts.store == "containerd"
    assert shared.client.ping()
    assert shared.data_root.exists()
    seen = run([shared.docker, "version", "--format", "{{.Server.Version}}"], timeout_s=60, env=shared.env)
    assert seen.output.strip() == shared.facts.version
    listed = run([*shared.buildx, "inspect"], timeout_s=60)
    assert "Driver: docker\n" in listed.output.replace("  ", "").replace("Driver:docker", "Driver: docker")


@pytest.mark.engine
def test_what_the_user_selected_elsewhere_does_not_matter(
    shared: engine.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_CONTEXT", "elsewhere")
    monkeypatch.setenv("BUILDX_BUILDER", "elsewhere")
    assert "running" in run([*shared.buildx, "inspect"], timeout_s=60).output
    run([shared.docker, "info"], timeout_s=60, env=shared.env)


@pytest.mark.engine
def test_an_engine_without_buildx(
    shared: engine.Engine, bare: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bare old client first on PATH is no help; buildx is fetched when that is allowed."""
    monkeypatch.setenv("DOCKER_HOST", shared.socket)
    old = program(bare, "docker")
    error = failure(bare)
    assert error.message.endswith(f"but buildx is missing (the docker client on PATH, {old}, has none)")
    assert "docker-buildx" in error.fix
    programs = embedded.ensure_programs(Paths.of(ROOT))
    bare.engine.mkdir(parents=True, exist_ok=True)
    (bare.engine / "programs").symlink_to(programs)
    found = engine.connect(bare, bootstrap=True)
    assert found.origin == "DOCKER_HOST"
    assert found.docker == bare.engine / "programs/usr/bin/docker"
    assert "running" in run([*found.buildx, "inspect"], timeout_s=60).output


@pytest.mark.engine
def test_a_client_with_its_plugin_is_taken(
    shared: engine.Engine, bare: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = embedded.ensure_programs(Paths.of(ROOT))
    client = bare.root / "bin/docker"
    client.symlink_to(programs / "usr/bin/docker")
    plugin = bare.root / "docker-config/cli-plugins/docker-buildx"
    plugin.parent.mkdir(parents=True)
    plugin.write_text("not a program")
    plugin.chmod(0o755)
    assert engine.find_client() is None, "a plugin that does not run is no plugin"
    plugin.unlink()
    plugin.symlink_to(programs / "usr/libexec/docker/cli-plugins/docker-buildx")
    assert engine.find_client() == (client, plugin)
    home = bare.root / "home/.docker/cli-plugins/docker-buildx"
    home.parent.mkdir(parents=True)
    home.symlink_to(plugin.resolve())
    plugin.unlink()
    assert engine.find_client() == (client, home), "a DOCKER_CONFIG of one's own hides the user's plugin"
    place = shared.socket.removeprefix("unix://")
    monkeypatch.setattr(engine, "_USUAL", (place,))
    found = engine.connect(bare)
    assert (found.origin, found.socket, found.docker) == ("running", f"unix://{place}", client)
    assert os.fspath(home) in found.buildx


@pytest.mark.engine
def test_replaced_images_are_dropped_unless_they_are_used(shared: engine.Engine, tmp_path: Path) -> None:
    paths = Paths(root=tmp_path, cache=Paths.of(ROOT).cache)
    registry = embedded.ensure_registry(paths)
    try:
        refs = [push(shared, f"{registry}/cell", number, tmp_path) for number in ("1", "2", "3")]
        used = shared.client.containers.create(str(refs[1]), command=["/none"])
        try:
            gone = Reference.parse(f"{registry}/cell@sha256:{'0' * 64}")
            assert engine.retire(shared, [refs[0], refs[1], gone]) == 1
            left = {tag for image in shared.client.images.list(f"{registry}/cell") for tag in image.tags}
            assert left == {f"{registry}/cell:2", f"{registry}/cell:3"}
            shared.client.images.pull(str(refs[0]))  # the registry still has it
        finally:
            used.remove(force=True)
            engine.retire(shared, refs)
    finally:
        embedded.stop_registry(paths)


def push(one: engine.Engine, name: str, number: str, folder: Path) -> Reference:
    context = folder / f"context-{number}"
    context.mkdir()
    (context / "Dockerfile").write_text("FROM scratch\nCOPY file /\n")
    (context / "file").write_text(number)
    metadata = folder / f"{number}.json"
    run(
        [
            *one.buildx, "build", "--provenance=false", f"--metadata-file={metadata}",
            f"--output=type=image,name={name}:{number},push=true", context,
        ],
        timeout_s=120,
    )  # fmt: skip
    return Reference.parse(f"{name}@{json.loads(metadata.read_text())['containerimage.digest']}")
