"""The embedded registry: CNCF distribution on loopback, its data in the project (`.mtbuild/registry`)."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import time
import zlib
from typing import TYPE_CHECKING

import httpx
import yaml

from mtbuild.errors import InfrastructureError
from mtbuild.prove.programs import ensure_programs
from mtbuild.prove.service import Service, locked, remove

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mtbuild.paths import Paths

__all__ = ["clean_registry", "ensure_registry", "registry_address", "stop_registry"]

_PORTS = range(5100, 5900)  # below the ports that the kernel hands out for outgoing connections
_START_S = 60.0


def ensure_registry(paths: Paths, *, note: Callable[[str], None] = lambda _: None) -> str:
    """The embedded registry, running; returns "127.0.0.1:PORT". The port is chosen once and kept.

    It listens on loopback only and runs without capabilities.
    """
    folder = paths.registry
    service = Service(name="registry", folder=folder)
    running = registry_address(paths)
    if running is not None:
        return running
    programs = ensure_programs(paths, note=note)
    with locked(folder, "registry"):
        running = registry_address(paths)
        if running is not None:  # another process was faster
            return running
        port = _kept_port(folder)
        if port is not None and _up(service, port):  # it was only busy
            return f"127.0.0.1:{port}"
        service.stop(patience_s=10)
        if port is None:
            port = _free_port(str(folder.resolve()))
            (folder / "port").write_text(f"{port}\n", encoding="ascii")
        elif not _is_free(port):
            msg = f"port {port} of the embedded registry is taken by another program"
            raise InfrastructureError(
                msg,
                fix=f"end that program (`ss -ltnp sport = :{port}`), or delete {folder}/port for another one "
                "(references to images that were published here then change)",
            )
        _start_registry(service, programs, port, note)
    return f"127.0.0.1:{port}"


def registry_address(paths: Paths) -> str | None:
    """ "127.0.0.1:PORT" of the project's registry if it runs and answers, else None. Starts nothing."""
    port = _kept_port(paths.registry)
    service = Service(name="registry", folder=paths.registry)
    return f"127.0.0.1:{port}" if port is not None and service.pid() is not None and _serves(port) else None


def _start_registry(service: Service, programs: Path, port: int, note: Callable[[str], None]) -> None:
    folder = service.folder
    config = folder / "config.yml"
    settings = {
        "version": "0.1",
        "log": {"level": "warn", "accesslog": {"disabled": True}},
        "storage": {
            "filesystem": {"rootdirectory": str((folder / "data").resolve())},
            "delete": {"enabled": True},
        },
        # `secret` signs the state of uploads: kept, so that one goes on after a restart.
        "http": {"addr": f"127.0.0.1:{port}", "secret": _secret(folder)},
    }
    config.touch(mode=0o600)
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    note(f"starting the registry on 127.0.0.1:{port} …")
    command: list[str | Path] = [programs / "usr/bin/docker-registry", "serve", config.resolve()]
    setpriv = shutil.which("setpriv")
    if os.geteuid() == 0 and setpriv is not None:
        # Reading and writing the project's folder is all that is left of root's rights.
        caps = "-all,+dac_override"
        command = [setpriv, "--no-new-privs", f"--inh-caps={caps}", f"--bounding-set={caps}", *command]
    # A bare environment: distribution takes settings from REGISTRY_* variables, ours must not be overridden.
    service.start(command, env={"PATH": "/usr/bin:/bin", "HOME": str(folder), "OTEL_TRACES_EXPORTER": "none"})
    if _up(service, port):
        return
    tail = service.tail()
    service.stop(patience_s=5)
    msg = f"the embedded registry did not come up; the end of {service.log}:\n{tail}"
    raise InfrastructureError(msg, fix="read the log above; free some disk space or the port")


def _up(service: Service, port: int) -> bool:
    """Wait until it answers; False if it ended or took too long."""
    end = time.monotonic() + _START_S
    while time.monotonic() < end and service.pid() is not None:
        if _serves(port):
            return True
        time.sleep(0.1)
    return False


def stop_registry(paths: Paths) -> bool:
    """Stop the project's registry; True if it ran. What it holds stays."""
    if not paths.registry.exists():
        return False
    with locked(paths.registry, "registry"):
        return Service(name="registry", folder=paths.registry).stop(patience_s=15)


def clean_registry(paths: Paths) -> int:
    """Stop the registry and remove everything that was ever pushed to it. Its port is kept."""
    stop_registry(paths)
    data = paths.registry / "data"
    if not data.exists():
        return 0
    before = shutil.disk_usage(data).free
    remove(data)
    return max(0, shutil.disk_usage(paths.registry).free - before)


def _kept_port(folder: Path) -> int | None:
    try:
        return int((folder / "port").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _free_port(seed: str) -> int:
    """A free port; clones start at different ones, so that two of them rarely meet."""
    first = zlib.crc32(seed.encode()) % len(_PORTS)
    for step in range(len(_PORTS)):
        port = _PORTS[(first + step) % len(_PORTS)]
        if _is_free(port):
            return port
    msg = f"no free port between {_PORTS.start} and {_PORTS.stop - 1} on 127.0.0.1"
    raise InfrastructureError(msg, fix="end some of the programs that listen there (`ss -ltnp`)")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections in TIME_WAIT don't count
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _serves(port: int) -> bool:
    try:
        with httpx.Client(trust_env=False, timeout=10) as client:  # no proxy on the way to loopback
            return client.get(f"http://127.0.0.1:{port}/v2/").status_code == 200
    except httpx.HTTPError:
        return False


def _secret(folder: Path) -> str:
    file = folder / "secret"
    if not file.exists():
        file.touch(mode=0o600)
        file.write_text(secrets.token_hex(32), encoding="ascii")
    return file.read_text(encoding="ascii")
