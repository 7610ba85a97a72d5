"""What this host can do, and what stands in the way: one finding a line, each with its fix.

Every finding is `ok`, `warn` (works, but something is worse than it could be) or `fail` (the main job can't
run). Nothing is changed and nothing is started.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from packaging.version import InvalidVersion, Version

from mtbuild.errors import InfrastructureError, MtbuildError
from mtbuild.proc import run
from mtbuild.prove import debian, embedded
from mtbuild.prove.engine import Engine, connect

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mtbuild.paths import Paths

__all__ = ["Checkup", "examine", "to_json"]

Level = Literal["ok", "warn", "fail"]

_GB = 1e9
_ROOM_GB, _LEAST_GB = 25.0, 8.0  # two CUDA images (engine.md, measured); one image with its build
_MEMORY_GB = 8.0
_BUILDX = Version("0.13")  # older ones don't write the digest with the docker driver
_ENGINE = Version("25")  # the containerd image store and CDI
_DRIVER_FLOOR = Version("525.60.13")  # CUDA 12's minor-version compatibility: the oldest that any cell takes


@dataclass(frozen=True, kw_only=True)
class Checkup:
    """One finding about the host."""

    topic: str
    level: Level
    message: str
    fix: str = ""


def examine(paths: Paths) -> tuple[Checkup, ...]:
    """All findings, in the order in which they should be fixed. Never raises for what it finds."""
    found = [*_system()]
    engine: Engine | None = None
    try:
        engine = connect(paths)
        found += [*_engine(engine)]
    except MtbuildError as error:
        found.append(Checkup(topic="engine", level="fail", message=error.message, fix=error.fix))
    found += [*_disk(paths, engine), *_registry(paths), *_gpu(engine), *_mirrors(), *_index()]
    return tuple(found)


def to_json(found: tuple[Checkup, ...]) -> dict[str, Any]:
    """For `--json`: `{"schema": 1, "ok": bool, "findings": […]}`."""
    return {
        "schema": 1,
        "ok": all(one.level != "fail" for one in found),
        "findings": [asdict(one) for one in found],
    }


def _system() -> Iterator[Checkup]:
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        name = platform.system()
    libc, version = platform.libc_ver()
    machine = platform.machine()
    text = f"{name}, kernel {platform.release()}, {libc} {version}, {machine}"
    if machine != "x86_64":
        yield Checkup(
            topic="system",
            level="fail",
            message=f"{text}: the cells are linux/amd64",
            fix="run it on an x86_64 machine",
        )
    else:
        yield Checkup(topic="system", level="ok", message=text)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / _GB
    text = f"{memory:.0f} GB, {os.cpu_count()} cores"
    if memory < _MEMORY_GB:
        fix = f"use a machine with at least {_MEMORY_GB:.0f} GB: compressing layers and the suite need it"
        yield Checkup(topic="memory", level="warn", message=text, fix=fix)
    else:
        yield Checkup(topic="memory", level="ok", message=text)


def _engine(engine: Engine) -> Iterator[Checkup]:
    facts = engine.facts
    text = f"{facts.version} ({engine.origin}) at {engine.socket}"
    if _older(facts.version, _ENGINE):
        yield Checkup(
            topic="engine",
            level="warn",
            message=f"{text} is older than {_ENGINE}",
            fix=f"update Docker to {_ENGINE} or newer",
        )
    else:
        yield Checkup(topic="engine", level="ok", message=text)
    if engine.origin == "embedded" and not Path("/sys/class/net/docker0").exists():
        yield Checkup(
            topic="network",
            level="fail",
            message="the engine's bridge docker0 is gone (another engine or `ip link` removed it)",
            fix="make engine-down; make engine",
        )
    first = shutil.which("docker")
    other = f"; {first} comes first on PATH and is not used" if first and Path(first) != engine.docker else ""
    yield Checkup(topic="client", level="ok", message=f"{engine.docker}{other}")
    if facts.store == "containerd":
        yield Checkup(topic="store", level="ok", message=f"containerd image store on {facts.driver}")
    else:
        yield Checkup(
            topic="store",
            level="warn",
            message=f"{facts.driver} without the containerd image store: zstd layers are not possible",
            fix='add "features": {"containerd-snapshotter": true} to /etc/docker/daemon.json, restart Docker',
        )
    try:
        answer = run([*engine.buildx, "version"], timeout_s=30).output.split()
    except MtbuildError as error:
        yield Checkup(topic="buildx", level="fail", message=error.message, fix="install docker-buildx")
        return
    version = answer[1].lstrip("v") if len(answer) > 1 else "?"
    text = f"{version} ({engine.buildx[-1]})"
    old = _older(version, _BUILDX)
    yield Checkup(
        topic="buildx",
        level="fail" if old else "ok",
        message=text + (f" is older than {_BUILDX}" if old else ""),
        fix=f"update buildx to {_BUILDX} or newer" if old else "",
    )


def _older(text: str, floor: Version) -> bool:
    """Debian's versions carry suffixes such as 26.1.5+dfsg1; one that can't be read is not called old."""
    try:
        return Version(text.partition("+")[0].partition("~")[0]) < floor
    except InvalidVersion:
        return False


def _disk(paths: Paths, engine: Engine | None) -> Iterator[Checkup]:
    """Free space where images and build cache lie, and what could be removed there."""
    place = engine.data_root if engine is not None else paths.engine
    while not place.exists():
        place = place.parent  # a remote engine's folder, or one that is not made yet
    free = shutil.disk_usage(place).free / _GB
    parts = _removable(engine) if engine is not None else []
    text = f"{free:.1f} GB free at {place}" + (f"; in the engine: {', '.join(parts)}" if parts else "")
    fix = (
        "`mtbuild engine prune` removes unused images and build cache; or set MTBUILD_CACHE to a larger disk"
    )
    if free < _LEAST_GB:
        yield Checkup(
            topic="disk", level="fail", message=f"{text}; an image needs {_LEAST_GB:.0f} GB", fix=fix
        )
    elif free < _ROOM_GB:
        text = f"{text}; the default cells together want {_ROOM_GB:.0f} GB"
        yield Checkup(topic="disk", level="warn", message=text, fix=fix)
    else:
        yield Checkup(topic="disk", level="ok", message=text)


def _removable(engine: Engine) -> list[str]:
    used = engine.client.df()
    images = used.get("LayersSize") or 0
    cache = sum(one["Size"] for one in used.get("BuildCache") or [] if not one["Shared"])
    return [f"{images / _GB:.1f} GB of images", f"{cache / _GB:.1f} GB of build cache"]


def _registry(paths: Paths) -> Iterator[Checkup]:
    address = embedded.registry_address(paths)
    text = (
        f"embedded, on {address}" if address else "the embedded one is not running; it is started when needed"
    )
    yield Checkup(topic="registry", level="ok", message=text)


def _gpu(engine: Engine | None) -> Iterator[Checkup]:
    """GPUs by NVML, the driver, and how a container gets at them."""
    import pynvml  # type: ignore[import-untyped]

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        if Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists():
            yield Checkup(
                topic="gpu",
                level="fail",
                message=f"the NVIDIA driver is loaded, but its library does not answer: {error}",
                fix="after a driver update, reboot; else install the driver's user-space libraries",
            )
        else:
            text = "no NVIDIA GPU: images can be proven for the `checked` channel only, not `verified`"
            yield Checkup(topic="gpu", level="ok", message=text)
        return
    try:
        driver = str(pynvml.nvmlSystemGetDriverVersion())
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            yield Checkup(
                topic="gpu",
                level="ok",
                message=f"{pynvml.nvmlDeviceGetName(handle)}, sm_{major}{minor}, "
                f"{int(memory.free) / _GB:.0f} of {int(memory.total) / _GB:.0f} GB free",
            )
    except pynvml.NVMLError as error:
        yield Checkup(topic="gpu", level="fail", message=f"NVML: {error}", fix="see `nvidia-smi`")
        return
    finally:
        pynvml.nvmlShutdown()
    old = _older(driver, _DRIVER_FLOOR)
    yield Checkup(
        topic="driver",
        level="warn" if old else "ok",
        message=driver + (f" is older than {_DRIVER_FLOOR}, which CUDA 12 needs" if old else ""),
        fix="update the NVIDIA driver; `mtbuild pick --driver` shows what each image needs" if old else "",
    )
    yield _gpu_access(engine)


def _gpu_access(engine: Engine | None) -> Checkup:
    folders = engine.facts.cdi if engine is not None else ("/etc/cdi", "/var/run/cdi")
    specs = sorted(
        str(file)
        for folder in folders
        if Path(folder).is_dir()
        for file in Path(folder).iterdir()
        if file.suffix in (".json", ".yaml", ".yml")
        and "nvidia.com/gpu" in file.read_text("utf-8", "replace")
    )
    if specs:
        return Checkup(topic="gpu access", level="ok", message=f"CDI: {', '.join(specs)}")
    if engine is not None and "nvidia" in engine.facts.runtimes:
        return Checkup(topic="gpu access", level="ok", message="NVIDIA container toolkit (runtime `nvidia`)")
    return Checkup(
        topic="gpu access",
        level="warn",
        message="neither a CDI spec nor the NVIDIA container toolkit: containers get the devices one by one",
        fix="install nvidia-container-toolkit, then `nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml`",
    )


def _mirrors() -> Iterator[Checkup]:
    """Whether the base image (and an engine) can be made from this machine's package mirrors."""
    try:
        own = debian.codename()
        count = len([mirror for mirror in debian.mirrors() if mirror.release.startswith(own)])
    except InfrastructureError as error:
        text = f"{error.message}: base images and an engine can't be made here"
        fix = "use a base of kind `image`, or name a .sources file of a Debian mirror in MTBUILD_APT_SOURCES"
        yield Checkup(topic="packages", level="warn", message=text, fix=fix)
        return
    if not count:
        fix = "configure Debian's package mirror in /etc/apt"
        yield Checkup(topic="packages", level="fail", message=f"apt has no source for {own}", fix=fix)
        return
    text = f"apt has {count} sources for {own}"
    if os.geteuid() != 0:
        fix = "run as root where an engine or a base image has to be made"
        yield Checkup(topic="packages", level="warn", message=f"{text}, but this is not root", fix=fix)
    else:
        yield Checkup(topic="packages", level="ok", message=text)


def _index() -> Iterator[Checkup]:
    """Whether the configured Python index answers, asked for the files of one small project."""
    from mtbuild.plan.index import Index

    fix = "set UV_DEFAULT_INDEX or pip's index-url (and SSL_CERT_FILE for a company's CA)"
    started = time.monotonic()
    try:
        count = len(Index.from_environment().links("packaging"))
    except MtbuildError as error:
        yield Checkup(topic="index", level="fail", message=error.message, fix=error.fix or fix)
        return
    took = time.monotonic() - started
    if count == 0:
        text = "the Python index has no file of the project `packaging`"
        yield Checkup(topic="index", level="fail", message=text, fix=fix)
    else:
        yield Checkup(topic="index", level="ok", message=f"answers in {took * 1000:.0f} ms")
