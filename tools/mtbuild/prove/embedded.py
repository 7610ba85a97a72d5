"""The embedded engine: a Docker daemon with BuildKit on this machine; with the registry, all of one import.

The engine belongs to the user (`~/.cache/mtbuild/engine`, shared by all clones), the registry to the project
(`.mtbuild/registry`). Both outlive the command that started them, are found again by the next, and are
started anew if they died. What was learned on the way, and why each setting is as it is:
docs/engine.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from mtbuild.errors import InfrastructureError
from mtbuild.proc import run
from mtbuild.prove import debian
from mtbuild.prove.local_registry import clean_registry, ensure_registry, registry_address, stop_registry
from mtbuild.prove.programs import ensure_programs, public_clients
from mtbuild.prove.service import Service, boot_id, locked, remove

if TYPE_CHECKING:
    from collections.abc import Callable

    from mtbuild.paths import Paths

__all__ = [
    "Daemon",
    "clean_engine",
    "clean_registry",
    "ensure_engine",
    "ensure_programs",
    "ensure_registry",
    "public_clients",
    "registry_address",
    "stop_engine",
    "stop_registry",
]

_NEEDED = {"iptables": "iptables", "setpriv": "util-linux", "ip": "iproute2"}

_SOCKET_LIMIT = 107  # bytes in a socket's path, unix(7)
_START_S, _STOP_S = 60.0, 45.0
# Not counting what images share with it. One CUDA cell: 3.2 GB of wheels and 5.5 GB of layers; below twice
# that, the wheels of a cell can go between being handed over and being installed.
_CACHE_LIMIT_GB = 24


@dataclass(frozen=True, kw_only=True)
class Daemon:
    """The files of the embedded engine.

    `network=False` puts it into a network namespace of its own, cut off: for an engine beside another one
    (tests). Merely switching its bridge off would not do: it then removes the other engine's docker0.
    """

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
    def config(self) -> Path:
        return self.folder / "daemon.json"

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


def ensure_engine(
    paths: Paths, *, network: bool = True, note: Callable[[str], None] = lambda _: None
) -> Daemon:
    """The embedded engine, running: found, started anew if it died, or set up from nothing.

    Raises InfrastructureError without root, on a system that is not Debian, on a full disk and when the
    daemon does not come up (with the end of its log).
    """
    daemon = Daemon(folder=paths.engine, network=network)
    if daemon.alive():
        return daemon
    debian.need_root("starting the embedded engine")
    longest = daemon.exec / "containerd/containerd.sock.ttrpc"
    if len(os.fsencode(longest)) > _SOCKET_LIMIT:
        msg = f"the path of the engine's sockets is too long for the kernel: {longest}"
        raise InfrastructureError(msg, fix="set MTBUILD_CACHE to a folder with a shorter path")
    ensure_programs(paths, note=note)
    with locked(paths.engine, "engine"):
        if daemon.service.pid() is not None and _up(daemon):  # another process was faster, or it is busy
            return daemon
        if daemon.service.pid() is not None:  # builds may still run in it: not ours to kill unasked
            msg = f"the embedded engine runs but has not answered for {_START_S:g} s"
            raise InfrastructureError(msg, fix="wait for the work in it, or `make engine-down` and try again")
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
        # One bound for all of BuildKit's cache, the oldest goes first. Without a policy of ours, cache mounts
        # (the wheels of a cell) would go after two days.
        "builder": {
            "gc": {"enabled": True, "policy": [{"keepStorage": f"{_CACHE_LIMIT_GB}GB", "all": True}]}
        },
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
    daemon.config.write_text(json.dumps(configuration(daemon), indent=1), encoding="utf-8")
    (daemon.folder / "boot").write_text(boot_id(), encoding="ascii")
    programs = daemon.programs
    alone: list[str | Path] = [] if daemon.network else ["/usr/bin/unshare", "--net"]
    daemon.service.start(
        [*alone, programs / "usr/sbin/dockerd", "--config-file", daemon.config],
        env={
            "PATH": f"{programs}/usr/sbin:{programs}/usr/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(Path.home()),
            # The daemon itself pulls and pushes: a company's proxy and CA bundle are for it too.
            **{key: value for key, value in os.environ.items() if _for_network(key)},
        },
    )
    if _up(daemon):
        return
    tail = daemon.service.tail()
    daemon.service.stop(patience_s=10)
    msg = f"the engine did not come up; the end of {daemon.service.log}:\n{tail}"
    raise InfrastructureError(msg, fix=_start_fix(tail))


def _up(daemon: Daemon) -> bool:
    """Wait until it answers; False if it ended or took too long."""
    end = time.monotonic() + _START_S
    while time.monotonic() < end and daemon.service.pid() is not None:
        if answers(daemon.socket):
            return True
        time.sleep(0.2)
    return False


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
    """Clear what a crash or reboot left: record, pid file, stray processes, run-time state."""
    daemon.service.stop(patience_s=_STOP_S)
    _end_leftovers(daemon)
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
    with locked(paths.engine, "engine"):
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
    remove(paths.engine)
    return max(0, shutil.disk_usage(paths.engine.parent).free - before)


def _end_leftovers(daemon: Daemon) -> None:
    """End what a killed daemon left: an unrecorded daemon, containerd, shims, containers' processes."""
    ours = daemon.programs.resolve()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it ended while we looked
            words = (entry / "cmdline").read_bytes().decode("utf-8", "replace")
            named = str(daemon.exec) in words or str(daemon.config) in words
            if (named and (entry / "exe").readlink().is_relative_to(ours)) or _lives_in(entry, daemon.data):
                os.kill(int(entry.name), signal.SIGKILL)


def _lives_in(process: Path, data: Path) -> bool:
    """Whether a process's root file system is one of this engine's layers: then it is a container's.

    Never where it is our own root: inside a container, that may name a folder of the host's engine that has
    the same path as ours.
    """
    root = _root_mount(process)
    return root is not None and str(data) in root and root != _root_mount(Path("/proc/self"))


def _root_mount(process: Path) -> str | None:
    """The line of mountinfo for "/", from its device on (the ids before it differ between namespaces)."""
    for line in (process / "mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.split()[4] == "/":
            return line.split(maxsplit=2)[2]
    return None


def _unmount(folder: Path) -> None:
    """Detach every mount under a folder, the innermost first."""
    points = [line.split()[1] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    for point in sorted((p for p in points if Path(p).is_relative_to(folder)), key=len, reverse=True):
        run(["umount", "--lazy", point.replace("\\040", " ")], timeout_s=60, check=False)
