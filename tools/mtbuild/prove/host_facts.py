"""What the host itself sees of its GPUs, by NVML: models, driver, and which processes hold memory on them.

This is the ground that the tier of a smoke report rests on. Nothing here asks the image.
Limits: NVIDIA GPUs of this very host (not of a remote engine's); a process is matched to its container by
the container's id in /proc/PID/cgroup, so mtbuild must share the host's process ids.
"""

from __future__ import annotations

import ctypes
import os
import platform
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pynvml  # type: ignore[import-untyped]

from mtbuild.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["HostGpu", "choose", "gpus", "held_by", "host_memory_bytes", "processor"]

# Where drivers lie that were mounted into a machine instead of installed (cloud GPU hosts)
_MOUNTED = ("/usr/local/nvidia/lib64", "/usr/local/cuda/compat", "/usr/lib/wsl/lib", "/run/opengl-driver/lib")


@dataclass(frozen=True, kw_only=True)
class HostGpu:
    """One GPU by NVML: `sm` is its compute capability ("9.0"), `cuda` the newest CUDA of its driver.

    `index` is NVML's order (the bus's), `minor` the number of its device node /dev/nvidiaN.
    """

    index: int
    name: str
    uuid: str
    sm: str
    memory_bytes: int
    driver: str
    cuda: str
    minor: int = 0


def choose(found: Sequence[HostGpu], wanted: str | None = None) -> HostGpu:
    """The card that `wanted` names by index or UUID (its beginning is enough); the first without a name.

    InputError where no card, or more than one, has that name; `found` must not be empty.
    """
    if wanted is None:
        return found[0]
    if wanted.isdecimal():
        hits = [gpu for gpu in found if gpu.index == int(wanted)]
    else:
        name = wanted.lower().removeprefix("gpu-")
        hits = [gpu for gpu in found if name and gpu.uuid.lower().removeprefix("gpu-").startswith(name)]
    if len(hits) == 1:
        return hits[0]
    here = "; ".join(f"{gpu.index}: {gpu.name} {gpu.uuid}" for gpu in found)
    msg = f"--gpu {wanted} names {'no' if not hits else 'more than one'} GPU of this host"
    raise InputError(msg, fix=f"name one of these by index or UUID: {here}")


def gpus() -> tuple[HostGpu, ...]:
    """Every GPU of this host; empty where there is no driver or no GPU."""
    with _nvml() as ready:
        if not ready:
            return ()
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        newest = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            found.append(
                HostGpu(
                    index=index,
                    name=_text(pynvml.nvmlDeviceGetName(handle)),
                    uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
                    sm=f"{major}.{minor}",
                    memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
                    driver=driver,
                    cuda=f"{newest // 1000}.{newest % 1000 // 10}",
                    minor=_minor(handle, index),
                )
            )
        return tuple(found)


def held_by(container_id: str) -> dict[str, int]:
    """GPU memory in bytes held right now by the processes of this container, by the card's UUID.

    A process whose use the driver does not tell (NVML gives none under some virtual machines) counts as 1.
    """
    held: dict[str, int] = {}
    with _nvml() as ready, suppress(pynvml.NVMLError):  # a GPU that stops answering holds nothing for us
        for index in range(pynvml.nvmlDeviceGetCount() if ready else 0):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            uuid = _text(pynvml.nvmlDeviceGetUUID(handle))
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
                if _belongs(process.pid, container_id):
                    held[uuid] = held.get(uuid, 0) + int(process.usedGpuMemory or 1)
    return held


def host_memory_bytes() -> int:
    """Physical memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def processor() -> str:
    """The processor's model name, or the machine's architecture where it has none."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def _minor(handle: object, index: int) -> int:
    try:
        return int(pynvml.nvmlDeviceGetMinorNumber(handle))
    except pynvml.NVMLError:  # not told under some virtual machines; the numbers then agree
        return index


def _belongs(pid: int, container_id: str) -> bool:
    try:
        return container_id in Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8")
    except OSError:  # it ended meanwhile
        return False


@contextmanager
def _nvml() -> Iterator[bool]:
    """NVML for a moment; False where this host has none that works."""
    _find_library()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield False
        return
    try:
        yield True
    finally:
        pynvml.nvmlShutdown()


def _find_library() -> None:
    """Load NVML from where a mounted driver keeps it, so that pynvml finds it by its name."""
    for folder in _MOUNTED:
        library = Path(folder) / "libnvidia-ml.so.1"
        if library.exists():
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            return


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
