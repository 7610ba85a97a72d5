"""The embedded registry: on loopback only, at a port that stays, without root's rights."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from mtbuild.errors import InfrastructureError
from mtbuild.paths import Paths
from mtbuild.prove import embedded, local_registry
from mtbuild.prove.service import Service

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[3]
CAP_DAC_OVERRIDE = 1 << 1


def test_a_taken_port_is_passed_over() -> None:
    first = local_registry._free_port("some clone")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first))
        taken.listen()
        second = local_registry._free_port("some clone")
    assert second != first
    assert local_registry._free_port("some clone") == first


def test_nothing_runs_in_a_fresh_project(tmp_path: Path) -> None:
    paths = Paths(root=tmp_path, cache=tmp_path / "cache")
    assert local_registry.registry_address(paths) is None
    assert not local_registry.stop_registry(paths)
    assert not paths.registry.exists(), "looking must not leave anything"


# --- for real ---------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Paths]:
    paths = Paths(root=tmp_path, cache=Paths.of(ROOT).cache)
    yield paths
    embedded.stop_registry(paths)


def service(paths: Paths) -> Service:
    return Service(name="registry", folder=paths.registry)


@pytest.mark.engine
def test_port_and_content_stay(own: Paths) -> None:
    address = embedded.ensure_registry(own)
    with httpx.Client(base_url=f"http://{address}", trust_env=False, timeout=30) as client:
        upload = client.post("/v2/some/thing/blobs/uploads/").raise_for_status().headers["location"]
        digest = "sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
        client.put(
            upload, params={**httpx.URL(upload).params, "digest": digest}, content=b"hello"
        ).raise_for_status()
        assert embedded.ensure_registry(own) == address
        assert embedded.stop_registry(own)
        assert embedded.registry_address(own) is None
        assert embedded.ensure_registry(own) == address
        assert client.get(f"/v2/some/thing/blobs/{digest}").raise_for_status().content == b"hello"
        client.delete(f"/v2/some/thing/blobs/{digest}").raise_for_status()  # deletion is enabled
        embedded.clean_registry(own)
        assert embedded.ensure_registry(own) == address
        assert client.get(f"/v2/some/thing/blobs/{digest}").status_code == 404


@pytest.mark.engine
def test_a_killed_one_comes_back_at_the_same_port(own: Paths) -> None:
    address = embedded.ensure_registry(own)
    for _ in range(4):  # at once: the port is free only when its last thread has ended
        pid = service(own).pid()
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert embedded.ensure_registry(own) == address
        assert service(own).pid() != pid


@pytest.mark.engine
def test_it_listens_on_loopback_without_rights(own: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGISTRY_HTTP_ADDR", "0.0.0.0:5999")  # its own variable must not override ours
    address = embedded.ensure_registry(own)
    port = int(address.rpartition(":")[2])
    listening = [
        line.split()[1]
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for line in Path(table).read_text().splitlines()[1:]
        if line.split()[3] == "0A" and int(line.split()[1].rpartition(":")[2], 16) in (port, 5999)
    ]
    assert listening == [f"0100007F:{port:04X}"]
    facts = Path(f"/proc/{service(own).pid()}/status").read_text()
    lines = dict(line.split(":\t", 1) for line in facts.splitlines() if ":\t" in line)
    assert int(lines["CapEff"], 16) & ~CAP_DAC_OVERRIDE == 0
    assert lines["NoNewPrivs"] == "1"
    for private in ("config.yml", "secret"):
        assert (own.registry / private).stat().st_mode & 0o077 == 0, private


@pytest.mark.engine
def test_a_port_that_someone_took_is_one_clear_error(own: Paths) -> None:
    address = embedded.ensure_registry(own)
    embedded.stop_registry(own)
    port = int(address.rpartition(":")[2])
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(
            InfrastructureError, match=f"port {port} of the embedded registry is taken"
        ) as raised:
            embedded.ensure_registry(own)
    assert "delete" in raised.value.fix
    assert embedded.ensure_registry(own) == address
