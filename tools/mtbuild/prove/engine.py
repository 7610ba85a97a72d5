"""The engine that everything is built and run with: which one it is, and the programs that belong to it.

Order: DOCKER_HOST if it is set; else a Docker engine that already runs at its usual place; else the
embedded one. An older `docker` client may stand first on PATH (a bare one without engine or buildx is
common on developer machines and CI images): the client is taken only if it has buildx, and `mtbuild doctor`
says which one is used. Every program gets its engine named explicitly, so contexts and builders that a
user selected elsewhere don't lead it astray.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from docker import DockerClient
from docker.errors import APIError, DockerException, NotFound

from mtbuild.errors import CommandError, InfrastructureError
from mtbuild.proc import run
from mtbuild.prove import embedded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mtbuild.digest import Reference
    from mtbuild.paths import Paths

__all__ = ["Engine", "EngineFacts", "connect", "find_client", "prune", "retire"]

Origin = Literal["DOCKER_HOST", "running", "embedded"]

_USUAL = ("/var/run/docker.sock", "/run/docker.sock")
_API_TIMEOUT_S = 300  # a commit or removal of a 10 GB image takes its time
_PLUGINS = (
    "/usr/local/lib/docker/cli-plugins",
    "/usr/local/libexec/docker/cli-plugins",
    "/usr/lib/docker/cli-plugins",
    "/usr/libexec/docker/cli-plugins",
)


@dataclass(frozen=True, kw_only=True)
class EngineFacts:
    """What an engine says of itself. `store` is "containerd" where local digests equal the registry's."""

    version: str
    api: str
    driver: str
    store: Literal["containerd", "graphdriver"]
    cgroup: str
    runtimes: tuple[str, ...]
    cdi: tuple[str, ...]
    data_root: Path
    cpus: int
    memory_bytes: int
    kernel: str
    system: str


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A running engine that answered.

    `docker` is the client program that belongs to it, `buildx` the words that a BuildKit command begins
    with; both name the engine themselves. `env` does the same for any other program that talks to it.
    """

    socket: str
    docker: Path
    buildx: tuple[str, ...]
    origin: Origin

    @property
    def env(self) -> dict[str, str]:
        """Environment that points Docker's programs at this engine, whatever the user selected."""
        return _env(self.socket)

    @cached_property
    def client(self) -> DockerClient:
        """The SDK's client of this engine."""
        return _client(self.socket)

    @cached_property
    def facts(self) -> EngineFacts:
        """Versions, storage, runtimes: one round trip, then kept."""
        return _facts(self.client)

    @property
    def data_root(self) -> Path:
        """Where images and build cache lie: the disk that fills up (on the engine's host)."""
        return self.facts.data_root


def connect(paths: Paths, *, bootstrap: bool = False, note: Callable[[str], None] = lambda _: None) -> Engine:
    """The engine to use, checked by a round trip.

    With `bootstrap`, sets up what is missing: buildx for an engine that runs without it, or the embedded
    engine where none runs. Raises InfrastructureError, each with its fix: DOCKER_HOST does not answer, no
    engine, an installed but stopped engine, no buildx, no root.
    """
    host = os.environ.get("DOCKER_HOST")
    if host:
        return _use(host, "DOCKER_HOST", paths, bootstrap, note)
    # Ours first if it is running: an answer that does not depend on what else was started since.
    daemon = embedded.Daemon(folder=paths.engine)
    if daemon.alive():
        return _embedded(daemon)
    for place in _usual_sockets():
        if place.exists() and embedded.answers(place):
            return _use(f"unix://{place}", "running", paths, bootstrap, note)
    if bootstrap:
        return _embedded(embedded.ensure_engine(paths, note=note))
    raise _no_engine(daemon)


def _usual_sockets() -> tuple[Path, ...]:
    rootless = os.environ.get("XDG_RUNTIME_DIR")
    return tuple(Path(p) for p in (*_USUAL, *([f"{rootless}/docker.sock"] if rootless else [])))


def _env(host: str) -> dict[str, str]:
    return {"DOCKER_HOST": host, "DOCKER_CONTEXT": "default", "BUILDX_BUILDER": "default"}


def _client(host: str) -> DockerClient:
    # A proxy of the environment must not stand between us and the engine; credentials still come from
    # the user's configuration.
    return DockerClient(base_url=host, timeout=_API_TIMEOUT_S, use_ssh_client=host.startswith("ssh:"))


def _words(host: str, buildx: Path) -> tuple[str, ...]:
    """buildx as a program of its own, with its engine named: `env` makes the words complete by themselves."""
    return ("/usr/bin/env", *(f"{key}={value}" for key, value in _env(host).items()), str(buildx))


def _embedded(daemon: embedded.Daemon) -> Engine:
    return Engine(
        socket=daemon.url,
        docker=daemon.docker,
        buildx=_words(daemon.url, daemon.buildx),
        origin="embedded",
    )


def _use(host: str, origin: Origin, paths: Paths, bootstrap: bool, note: Callable[[str], None]) -> Engine:
    """An engine that someone else runs, with a client that fits."""
    try:
        client = _client(host)
        client.ping()
        client.close()
    except (DockerException, OSError) as error:
        if origin == "DOCKER_HOST":
            msg = f"the engine that DOCKER_HOST names ({host}) does not answer: {error}"
            fix = "start it, correct DOCKER_HOST, or unset it to use the embedded engine"
        else:
            msg = f"the engine at {host} does not answer: {error}"
            fix = "start it (`systemctl start docker`)"
        raise InfrastructureError(msg, fix=fix) from error
    found = find_client()
    if found is None and bootstrap:
        note("this engine's machine has no buildx: fetching it …")
        embedded.ensure_programs(paths, note=note)
    own = embedded.Daemon(folder=paths.engine)
    if found is None and own.buildx.exists():
        found = own.docker, own.buildx
    if found is None:
        old = shutil.which("docker")
        msg = f"an engine runs at {host}, but buildx is missing" + (
            f" (the docker client on PATH, {old}, has none)" if old else ""
        )
        raise InfrastructureError(
            msg, fix="install buildx (package docker-buildx or docker-buildx-plugin), or run `make engine`"
        )
    program, buildx = found
    return Engine(socket=host, docker=program, buildx=_words(host, buildx), origin=origin)


def find_client() -> tuple[Path, Path] | None:
    """The first docker client on PATH and the buildx program beside it, or None if either is missing.

    buildx is looked for where Docker's clients look (the user's plugin folder, then the system's), and is
    run once to see that it works. A DOCKER_CONFIG of a job's own, for its login, hides no plugin of a user.
    """
    program = shutil.which("docker")
    if program is None:
        return None
    home = Path.home() / ".docker"
    user = Path(os.environ.get("DOCKER_CONFIG") or home)
    for folder in dict.fromkeys((str(user / "cli-plugins"), str(home / "cli-plugins"), *_PLUGINS)):
        plugin = Path(folder) / "docker-buildx"
        if not os.access(plugin, os.X_OK):
            continue
        try:
            run([plugin, "version"], timeout_s=30)
        except CommandError:
            continue
        return Path(program), plugin
    return None


def _no_engine(daemon: embedded.Daemon) -> InfrastructureError:
    """Why there is none: stopped, installed but not running, or never installed."""
    if daemon.programs.exists():
        msg = "the embedded engine is stopped"
        return InfrastructureError(msg, fix="run `make engine` (or `mtbuild engine start`)")
    installed = shutil.which("dockerd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if installed:
        msg = f"Docker is installed ({installed}) but its engine is not running"
        return InfrastructureError(
            msg, fix="start it (`systemctl start docker`), or run `make engine` for one of mtbuild's own"
        )
    client = shutil.which("docker")
    msg = "there is no Docker engine on this machine" + (f" ({client} is only a client)" if client else "")
    return InfrastructureError(msg, fix="run `make engine` (as root), or set DOCKER_HOST to a running engine")


def _facts(client: DockerClient) -> EngineFacts:
    try:
        info = client.info()
        version = client.version()
    except (DockerException, OSError) as error:
        msg = f"the engine stopped answering: {error}"
        raise InfrastructureError(
            msg, fix="run the same command again; `mtbuild doctor` tells more"
        ) from error
    status = dict(pair for pair in info.get("DriverStatus") or [] if len(pair) == 2)
    containerd = str(status.get("driver-type", "")).startswith("io.containerd.snapshotter")
    return EngineFacts(
        version=str(info.get("ServerVersion", "")),
        api=str(version.get("ApiVersion", "")),
        driver=str(info.get("Driver", "")),
        store="containerd" if containerd else "graphdriver",
        cgroup=str(info.get("CgroupVersion", "")),
        runtimes=tuple(sorted(info.get("Runtimes") or {})),
        cdi=tuple(info.get("CDISpecDirs") or ()),
        data_root=Path(str(info.get("DockerRootDir", "/"))),
        cpus=int(info.get("NCPU", 0)),
        memory_bytes=int(info.get("MemTotal", 0)),
        kernel=str(info.get("KernelVersion", "")),
        system=str(info.get("OperatingSystem", "")),
    )


def retire(engine: Engine, references: Iterable[Reference]) -> int:
    """Drop images that a newer build replaced from the engine, so that it does not fill up; returns how many.

    Their registry keeps them: whoever asks for one again pulls it. One that a container uses stays.
    """
    dropped = 0
    for reference in references:
        try:
            names = engine.client.images.get(str(reference)).attrs["RepoTags"] or [str(reference)]
            for name in names:
                if name.rpartition(":")[0] in (reference.repository, f"{reference.repository}@sha256"):
                    engine.client.images.remove(name)
            dropped += 1
        except NotFound:
            continue
        except APIError as error:
            if error.status_code != 409:  # in use
                msg = f"the engine could not drop {reference}: {error}"
                raise InfrastructureError(msg, fix="run the same command again") from error
    return dropped


def prune(engine: Engine) -> int:
    """Remove the engine's unused images and build cache; returns the freed bytes.

    Nothing is lost: what was pushed is in its registry, the rest is made again when it is needed.
    """
    before = shutil.disk_usage(engine.data_root).free if engine.data_root.exists() else 0
    try:
        engine.client.images.prune(filters={"dangling": False})
    except (DockerException, OSError) as error:
        msg = f"the engine could not remove images: {error}"
        raise InfrastructureError(
            msg, fix="end what still runs in it, then run the same command again"
        ) from error
    run([*engine.buildx, "prune", "--all", "--force"], timeout_s=1800)
    return max(0, shutil.disk_usage(engine.data_root).free - before) if before else 0
