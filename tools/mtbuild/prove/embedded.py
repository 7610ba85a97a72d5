"""The embedded engine (a Docker daemon with BuildKit) and registry (CNCF distribution), on this machine.

The engine belongs to the user (`~/.cache/mtbuild/engine`, shared by all clones), the registry to the project
(`.mtbuild/registry`). Both outlive the command that started them, are found again by the next, and are
started anew if they died. What was learned on the way, and why each setting is as it is:
docs/engine.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import filelock
import httpx
import yaml

from mtbuild.errors import InfrastructureError
from mtbuild.proc import run
from mtbuild.prove import debian
from mtbuild.prove.service import Service, boot_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mtbuild.paths import Paths

__all__ = [
    "Daemon",
    "clean_engine",
    "clean_registry",
    "ensure_engine",
    "ensure_programs",
    "ensure_registry",
    "public_clients",
    "stop_engine",
    "stop_registry",
]

# Bookworm's own Docker has no buildx, so its engine comes from the next release; later releases have theirs.
_ENGINE_SUITE = {"bookworm": "trixie"}
_ENGINE = ("containerd", "docker-buildx", "docker-cli", "docker.io")
# runc of trixie needs a newer C library than bookworm's and fails at the first RUN.
_OWN = ("docker-registry", "runc", "tini")
_CLIENTS = ("cosign", "crane", "oras")
_NEEDED = {"iptables": "iptables", "setpriv": "util-linux", "ip": "iproute2"}

_SOCKET_LIMIT = 100  # bytes; the kernel takes 107, and buildx adds a little
_START_S, _STOP_S = 60.0, 45.0
_CACHE_LIMIT_GB = 20  # BuildKit's cache; the two default cells with everything shared need about 15
_PORTS = range(5100, 5900)  # below the ports that the kernel hands out for outgoing connections


def _silent(_: str) -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Daemon:
    """The files of the embedded engine. `network=False` is for engines beside another one (tests)."""

    folder: Path
    network: bool = True

    @property
    def socket(self) -> Path:
        return self.folder / "docker.sock"

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def exec(self) -> Path:
        return self.folder / "exec"

    @property
    def programs(self) -> Path:
        return self.folder / "programs"

    @property
    def service(self) -> Service:
        return Service(name="dockerd", folder=self.folder)

    @property
    def docker(self) -> Path:
        return self.programs / "usr/bin/docker"

    @property
    def buildx(self) -> Path:
        return self.programs / "usr/libexec/docker/cli-plugins/docker-buildx"

    def alive(self) -> bool:
        """Whether the engine that we started runs and answers."""
        return self.service.pid() is not None and answers(self.socket)


def answers(path: Path) -> bool:
    """Whether an engine answers `GET /_ping` on this socket."""
    try:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), timeout=10) as client:
            return client.get("http://engine/_ping").status_code == 200
    except (httpx.HTTPError, OSError):
        return False


@contextlib.contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    """Only one process starts or stops a thing at a time; the others wait and find it done."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(folder / f"{name}.lock", timeout=900):
            yield
    except filelock.Timeout as error:
        msg = f"another mtbuild has been busy with {folder} for 15 minutes"
        raise InfrastructureError(msg, fix="look for it with `ps`, end it, and try again") from error


def ensure_programs(paths: Paths, *, note: Callable[[str], None] = _silent) -> Path:
    """Engine, buildx and registry programs, unpacked once into the user's cache; returns the folder."""
    daemon = Daemon(folder=paths.engine)
    with _locked(paths.engine, "programs"):
        _programs(daemon, note)
    return daemon.programs


def _programs(daemon: Daemon, note: Callable[[str], None]) -> None:
    if (daemon.programs / "versions.json").exists():
        return
    own = debian.codename()
    fresh = daemon.folder / "programs.new"
    shutil.rmtree(fresh, ignore_errors=True)
    versions = debian.unpack(_ENGINE, suite=_ENGINE_SUITE.get(own, own), into=fresh, note=note)
    versions |= debian.unpack(_OWN, suite=own, into=fresh, note=note)
    for program in ("usr/sbin/dockerd", "usr/bin/containerd", "usr/sbin/runc", "usr/bin/docker"):
        run(
            [fresh / program, "--version"], timeout_s=60
        )  # a missing library shows here, not in the first build
    (fresh / "versions.json").write_text(json.dumps(versions, indent=1), encoding="utf-8")
    shutil.rmtree(daemon.programs, ignore_errors=True)
    fresh.replace(daemon.programs)


def ensure_engine(paths: Paths, *, network: bool = True, note: Callable[[str], None] = _silent) -> Daemon:
    """The embedded engine, running: found, started anew if it died, or set up from nothing.

    Raises InfrastructureError without root, on a system that is not Debian, on a full disk and when the
    daemon does not come up (with the end of its log).
    """
    daemon = Daemon(folder=paths.engine, network=network)
    if daemon.alive():
        return daemon
    debian.need_root("starting the embedded engine")
    if len(daemon.url) > _SOCKET_LIMIT:
        msg = f"the path of the engine's socket is too long for the kernel: {daemon.socket}"
        raise InfrastructureError(msg, fix="set MTBUILD_CACHE to a folder with a shorter path")
    with _locked(paths.engine, "programs"):
        _programs(daemon, note)
    with _locked(paths.engine, "engine"):
        if daemon.alive():  # another process was faster
            return daemon
        _need_room(daemon.folder)
        debian.install(_NEEDED, note)
        _sweep(daemon)
        note("starting the engine …")
        _start(daemon)
    return daemon


def _need_room(folder: Path, needed: int = 2 << 30) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        msg = f"{folder} has {free / 1e9:.1f} GB free; the engine needs {needed / 1e9:.1f} GB to start at all"
        raise InfrastructureError(
            msg, fix="free some space, run `make clean-engine`, or set MTBUILD_CACHE to a larger disk"
        )


def configuration(daemon: Daemon) -> dict[str, object]:
    """The daemon's configuration file."""
    settings: dict[str, object] = {
        # containerd's store: an image's digest here is its digest in the registry. CDI: GPUs by name.
        "features": {"containerd-snapshotter": True, "cdi": True},
        "data-root": str(daemon.data),
        "exec-root": str(daemon.exec),
        "pidfile": str(daemon.folder / "docker.pid"),
        "hosts": [daemon.url],
        "builder": {"gc": {"enabled": True, "defaultKeepStorage": f"{_CACHE_LIMIT_GB}GB"}},
        "log-driver": "json-file",
        "log-opts": {"max-size": "20m", "max-file": "2"},
        "log-level": "warn",
        "max-concurrent-uploads": 4,
    }
    if not daemon.network:
        settings |= {"bridge": "none", "iptables": False, "ip6tables": False, "ip-forward": False}
    return settings


def _start(daemon: Daemon) -> None:
    for folder in (daemon.data, daemon.exec):
        folder.mkdir(parents=True, exist_ok=True)
    config = daemon.folder / "daemon.json"
    config.write_text(json.dumps(configuration(daemon), indent=1), encoding="utf-8")
    (daemon.folder / "boot").write_text(boot_id(), encoding="ascii")
    programs = daemon.programs
    daemon.service.start(
        [programs / "usr/sbin/dockerd", "--config-file", config],
        env={
            "PATH": f"{programs}/usr/sbin:{programs}/usr/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(Path.home()),
            # The daemon itself pulls and pushes: a company's proxy and CA bundle are for it too.
            **{key: value for key, value in os.environ.items() if _for_network(key)},
        },
    )
    end = time.monotonic() + _START_S
    while time.monotonic() < end:
        if answers(daemon.socket):
            return
        if daemon.service.pid() is None:
            break
        time.sleep(0.2)
    tail = daemon.service.tail()
    daemon.service.stop(patience_s=10)
    msg = f"the engine did not come up; the end of {daemon.service.log}:\n{tail}"
    raise InfrastructureError(msg, fix=_start_fix(tail))


def _start_fix(log: str) -> str:
    """What to do about a daemon that won't start, from the end of its log."""
    text = log.lower()
    if "no space left" in text:
        return "the disk is full: free some space, or set MTBUILD_CACHE to a larger disk"
    if "iptables" in text or "nat" in text.split():
        return (
            "the kernel or container lacks iptables NAT: run on a virtual machine or a privileged container"
        )
    if "permission denied" in text or "operation not permitted" in text:
        return (
            "root here has no right to mount: run on a machine, or in a container started with --privileged"
        )
    return "read the log above; `make clean-engine` starts from nothing"


def _for_network(key: str) -> bool:
    return key.lower() in ("http_proxy", "https_proxy", "no_proxy") or key in (
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
    )


def _sweep(daemon: Daemon) -> None:
    """Clear what a crash or reboot left: the record, the pid file, a stray containerd, run-time state."""
    daemon.service.stop(patience_s=_STOP_S)
    (daemon.folder / "docker.pid").unlink(missing_ok=True)
    daemon.socket.unlink(missing_ok=True)
    boot = daemon.folder / "boot"
    if boot.exists() and boot.read_text(encoding="ascii") != boot_id():
        # Run-time state belongs to processes of the last boot; /run would have been emptied.
        _unmount(daemon.exec)
        shutil.rmtree(daemon.exec, ignore_errors=True)


def stop_engine(paths: Paths) -> bool:
    """Stop the embedded engine with its containers; True if it ran. Images and build cache stay."""
    daemon = Daemon(folder=paths.engine)
    if not daemon.folder.exists():
        return False
    with _locked(paths.engine, "engine"):
        ran = daemon.service.stop(patience_s=_STOP_S)
        _end_leftovers(daemon)
        daemon.socket.unlink(missing_ok=True)
    return ran


def clean_engine(paths: Paths) -> int:
    """Stop the embedded engine and remove all its data and programs; returns the freed bytes."""
    stop_engine(paths)
    if not paths.engine.exists():
        return 0
    before = shutil.disk_usage(paths.engine).free
    _unmount(paths.engine)
    _remove(paths.engine)
    return max(0, shutil.disk_usage(paths.engine.parent).free - before)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        msg = f"can't remove {error.filename or folder}: {error.strerror or error}"
        raise InfrastructureError(
            msg, fix="remove the folder as root; see `mount` for what is still mounted there"
        ) from error


def _end_leftovers(daemon: Daemon) -> None:
    """End programs of ours that a killed daemon left (containerd, shims): known by the file they run."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            program = (entry / "exe").readlink()
            words = (entry / "cmdline").read_bytes().decode("utf-8", "replace")
            if program.is_relative_to(daemon.programs) and str(daemon.exec) in words:
                os.kill(int(entry.name), 9)


def _unmount(folder: Path) -> None:
    """Detach every mount under a folder, the innermost first."""
    points = [line.split()[1] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    for point in sorted((p for p in points if Path(p).is_relative_to(folder)), key=len, reverse=True):
        run(["umount", "--lazy", point.replace("\\040", " ")], timeout_s=60, check=False)


# --- the registry ----------------------------------------------------------------------------------------


def ensure_registry(paths: Paths, *, note: Callable[[str], None] = _silent) -> str:
    """The embedded registry, running; returns "127.0.0.1:PORT". The port is chosen once and kept.

    It listens on loopback only and runs without capabilities.
    """
    folder = paths.registry
    service = Service(name="registry", folder=folder)
    port = _kept_port(folder)
    if port is not None and service.pid() is not None and _serves(port):
        return f"127.0.0.1:{port}"
    programs = ensure_programs(paths, note=note)
    with _locked(folder, "registry"):
        port = _kept_port(folder)
        if port is not None and service.pid() is not None and _serves(port):
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
    end = time.monotonic() + _START_S
    while time.monotonic() < end:
        if _serves(port):
            return
        if service.pid() is None:
            break
        time.sleep(0.1)
    tail = service.tail()
    service.stop(patience_s=5)
    msg = f"the embedded registry did not come up; the end of {service.log}:\n{tail}"
    raise InfrastructureError(msg, fix="read the log above; free some disk space or the port")


def stop_registry(paths: Paths) -> bool:
    """Stop the project's registry; True if it ran. What it holds stays."""
    if not paths.registry.exists():
        return False
    with _locked(paths.registry, "registry"):
        return Service(name="registry", folder=paths.registry).stop(patience_s=15)


def clean_registry(paths: Paths) -> None:
    """Stop the registry and remove everything that was ever pushed to it. Its port is kept."""
    stop_registry(paths)
    if (paths.registry / "data").exists():
        _remove(paths.registry / "data")


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


def public_clients(paths: Paths, *, note: Callable[[str], None] = _silent) -> Path:
    """cosign, crane and oras of Debian's development release; returns the folder of their programs.

    Not used by mtbuild itself: they are second opinions on what our own code signs and publishes.
    """
    folder = paths.engine / "clients"
    with _locked(paths.engine, "clients"):
        if not (folder / "versions.json").exists():
            fresh = paths.engine / "clients.new"
            shutil.rmtree(fresh, ignore_errors=True)
            versions = debian.unpack(_CLIENTS, suite="sid", into=fresh, note=note)
            (fresh / "versions.json").write_text(json.dumps(versions, indent=1), encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            fresh.replace(folder)
    return folder / "usr/bin"
