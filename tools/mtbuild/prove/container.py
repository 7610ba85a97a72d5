"""One hardened container of an image under test: started unmodified, watched, and always removed.

CONTRACTS "The suite": read-only root, no network, no capabilities, no new privileges, an init as PID 1, /tmp
and an executable /cache as tmpfs, memory and process limits. What the container then really had is read back
from the engine, never assumed.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import docker
import requests
from docker.errors import APIError, DockerException, ImageNotFound, NotFound

from mtbuild.errors import InfrastructureError, MtbuildError
from mtbuild.prove.service import boot_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mtbuild.digest import Reference
    from mtbuild.prove.attach import Attachment
    from mtbuild.prove.engine import Engine

__all__ = ["Fetched", "Finished", "Limits", "fetch", "run_in_container", "sweep"]

_LABEL = "mtbuild.smoke"
_POLL_S = 0.2
_SILENCE_S = 1800  # a log may say nothing for as long as a check runs
_GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a container may use. Both tmpfs count towards its memory."""

    memory_bytes: int = 12 * _GIB
    pids: int = 1024
    tmp_bytes: int = _GIB
    cache_bytes: int = 2 * _GIB


@dataclass(frozen=True, kw_only=True)
class Finished:
    """How a container ended, by the engine's word; `exit_status` None: it was ended at its time limit."""

    exit_status: int | None
    oom_killed: bool
    seconds: float
    settings: dict[str, Any]
    log: str


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """An image in the engine: its inspection, whether it had to be pulled, and the seconds that took."""

    attributes: dict[str, Any]
    pulled: bool
    seconds: float


@dataclass(kw_only=True)
class _Log:
    lines: list[str] = field(default_factory=list)
    size: int = 0

    def add(self, line: str) -> None:
        if self.size < 4 << 20:  # an image that floods its log is not followed any further
            self.lines.append(line)
            self.size += len(line)


def fetch(ref: Reference, *, engine: Engine, note: Callable[[str], None]) -> Fetched:
    """The image of exactly this digest in the engine, pulled if it is not there."""
    began, pulled = time.monotonic(), False
    try:
        try:
            found = _inspect(engine, ref)
        except ImageNotFound:
            note(f"pulling {ref.repository}@{ref.digest.short}…")
            engine.client.images.pull(str(ref), platform="linux/amd64")
            pulled = True
            found = _inspect(engine, ref)
    except (NotFound, ImageNotFound) as error:
        msg = f"{ref.host} has no image {ref.path}@{ref.digest}"
        raise MtbuildError(msg, fix="build it first, or correct the reference") from error
    except (DockerException, requests.RequestException, OSError) as error:
        msg = f"{ref} can't be pulled: {error}"
        raise InfrastructureError(msg, fix="check that the registry runs (`mtbuild doctor`)") from error
    if str(ref) not in found.get("RepoDigests", []) and found["Id"] != str(ref.digest):
        msg = f"asked for {ref}, the engine gave {found['Id']} ({found.get('RepoDigests')})"
        raise InfrastructureError(msg, fix="remove the image from the engine and try again")
    return Fetched(attributes=found, pulled=pulled, seconds=round(time.monotonic() - began, 3))


def _inspect(engine: Engine, ref: Reference) -> dict[str, Any]:
    answer: dict[str, Any] = engine.client.images.get(str(ref)).attrs
    return answer


def run_in_container(
    ref: Reference,
    command: Sequence[str],
    *,
    engine: Engine,
    user: str,
    nonce: str,
    mounts: dict[Path, tuple[str, str]],
    limits: Limits,
    limit_s: float,
    attachment: Attachment | None = None,
    on_line: Callable[[str], None] = lambda _: None,
    watch: Callable[[str], None] = lambda _: None,
) -> Finished:
    """Run `command` to its end or its limit; `watch` gets the container's id every moment while it runs.

    `mounts`: host path → (path inside, "ro" or "rw"). The container is gone when this returns or raises,
    Ctrl-C included.
    """
    name = f"mtbuild-smoke-{nonce}"
    client = docker.DockerClient(base_url=engine.socket, timeout=int(limit_s) + 120)
    log = _Log()
    try:
        container = _create(client, ref, command, name, user, mounts, limits, attachment)
        started = time.monotonic()
        try:
            container.start()
        except APIError as error:
            raise _no_start(error, ref, command) from error
        status = _follow(engine, container, started + limit_s, log, on_line, watch)
        seconds = time.monotonic() - started
        if status in (126, 127) and f"exec {command[0]} failed" in "".join(log.lines[:5]):  # the init says so
            raise _no_program(ref, command[0])
        container.reload()
        state, settings = container.attrs["State"], _settings(container.attrs)
        return Finished(
            exit_status=status,
            oom_killed=bool(state.get("OOMKilled")),
            seconds=round(seconds, 3),
            settings=settings,
            log="".join(log.lines),
        )
    except (DockerException, requests.RequestException) as error:
        msg = f"the engine failed while {ref.digest.short} was smoked: {error}"
        raise InfrastructureError(
            msg, fix="run the same command again; `mtbuild doctor` tells more"
        ) from error
    finally:
        # by name: a container whose creation was interrupted has no object here
        with contextlib.suppress(NotFound):
            client.api.remove_container(name, force=True, v=True)
        client.close()


def _create(
    client: docker.DockerClient,
    ref: Reference,
    command: Sequence[str],
    name: str,
    user: str,
    mounts: dict[Path, tuple[str, str]],
    limits: Limits,
    attachment: Attachment | None,
) -> Any:
    volumes = {str(path): {"bind": inside, "mode": mode} for path, (inside, mode) in mounts.items()}
    extra: dict[str, Any] = {}
    if attachment is not None:
        volumes |= {path: {"bind": inside, "mode": "ro"} for path, inside in attachment.mounts.items()}
        extra = {
            "device_requests": list(attachment.requests),
            "devices": list(attachment.devices),
            "environment": attachment.environment,
        }
    options = "rw,nosuid,nodev,mode=1777"
    return client.containers.create(
        str(ref),
        entrypoint=[command[0]],
        command=list(command[1:]),
        name=name,
        user=user,
        labels={_LABEL: _owner()},
        read_only=True,
        network_mode="none",
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
        init=True,
        tmpfs={
            "/tmp": f"{options},size={limits.tmp_bytes}",  # noqa: S108 - the container's
            "/cache": f"{options},exec,size={limits.cache_bytes}",
        },
        mem_limit=limits.memory_bytes,
        memswap_limit=limits.memory_bytes,
        pids_limit=limits.pids,
        volumes=volumes,
        **extra,
    )


def _follow(
    engine: Engine,
    container: Any,
    deadline: float,
    log: _Log,
    on_line: Callable[[str], None],
    watch: Callable[[str], None],
) -> int | None:
    """Wait for the end while lines come in; None if the deadline came first."""
    answer: list[int] = []

    def wait() -> None:
        with contextlib.suppress(DockerException, requests.RequestException, OSError):
            answer.append(int(container.wait()["StatusCode"]))

    def read() -> None:
        follower = docker.DockerClient(base_url=engine.socket, timeout=_SILENCE_S)
        with contextlib.suppress(DockerException, requests.RequestException, OSError):
            for line in _lines(follower.containers.get(container.id).logs(stream=True, follow=True)):
                log.add(line)
                on_line(line.rstrip("\n"))
        follower.close()

    waiter = threading.Thread(target=wait, daemon=True)
    reader = threading.Thread(target=read, daemon=True)
    waiter.start()
    reader.start()
    while waiter.is_alive():
        if time.monotonic() > deadline:
            container.kill()
            waiter.join(timeout=30)
            return None
        watch(container.id)
        waiter.join(timeout=_POLL_S)
    reader.join(timeout=10)
    if not answer:
        msg = f"the engine lost sight of container {container.name}"
        raise InfrastructureError(msg, fix="run the same command again; `mtbuild doctor` tells more")
    return answer[0]


def _lines(chunks: Iterator[bytes]) -> Iterator[str]:
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (line.decode("utf-8", "replace") + "\n" for line in whole)
    if rest:
        yield rest.decode("utf-8", "replace")


def _settings(attributes: dict[str, Any]) -> dict[str, Any]:
    """What the container really had, as the engine tells: the policy judges it (publish/isolation.py)."""
    host = attributes["HostConfig"]
    return {
        "image": attributes["Image"],
        "user": attributes["Config"]["User"],
        "read_only": host["ReadonlyRootfs"],
        "network": host["NetworkMode"],
        "cap_drop": host["CapDrop"],
        "cap_add": host["CapAdd"] or [],
        "privileged": host["Privileged"],
        "security_opt": host["SecurityOpt"],
        "init": host["Init"],
        "memory_bytes": host["Memory"],
        "memory_swap_bytes": host["MemorySwap"],
        "pids": host["PidsLimit"],
        "tmpfs": host["Tmpfs"],
        "namespaces": {name: host.get(f"{name}Mode", "") for name in ("Pid", "Ipc", "UTS", "Userns")},
        # without the host's paths: they say nothing to whoever reads the evidence
        "binds": {
            mount["Destination"]: "rw" if mount["RW"] else "ro"
            for mount in attributes["Mounts"]
            if mount["Type"] != "tmpfs"
        },
    }


def _no_start(error: APIError, ref: Reference, command: Sequence[str]) -> MtbuildError:
    text = str(error.explanation or error)
    if "executable file not found" in text or "no such file or directory" in text:
        return _no_program(ref, command[0])
    if "nvidia" in text or "CDI" in text or "cdi" in text:
        msg = f"the engine can't give the container a GPU: {text}"
        return InfrastructureError(msg, fix="see `mtbuild doctor` for how this host hands GPUs to containers")
    msg = f"the container of {ref.digest.short} does not start: {text}"
    return InfrastructureError(msg, fix="`mtbuild doctor` checks the engine")


def _no_program(ref: Reference, program: str) -> MtbuildError:
    msg = f"{ref.digest.short} has no {program} on its PATH, so the suite can't run in it"
    return MtbuildError(msg, fix="install Python 3 in the image, as python3 on PATH")


def _owner() -> str:
    """This process, so that a later one knows whether it still runs: pid, its start, the machine's boot."""
    return f"{os.getpid()}:{_start_of(os.getpid())}:{boot_id()}"


def _start_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except OSError:
        return ""


def sweep(engine: Engine) -> int:
    """Remove containers of smoke runs whose mtbuild was killed; returns how many."""
    removed = 0
    try:
        for container in engine.client.containers.list(all=True, filters={"label": _LABEL}):
            pid, start, boot = [*container.labels[_LABEL].split(":"), "", ""][:3]
            # another machine's engine may be shared: only what was started on this one is judged
            if boot == boot_id() and _start_of(int(pid)) != start:
                container.remove(force=True, v=True)
                removed += 1
    except (DockerException, requests.RequestException) as error:
        msg = f"the engine does not answer: {error}"
        raise InfrastructureError(msg, fix="`mtbuild doctor` checks the engine") from error
    return removed
