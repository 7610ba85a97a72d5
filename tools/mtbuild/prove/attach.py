"""How a container gets one of this host's GPUs: the toolkit's runtime, a CDI device, or the device nodes.

One card, the chosen one: what is measured and attested is then the card that the report names.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from docker.types import DeviceRequest

from mtbuild.errors import CommandError, InfrastructureError
from mtbuild.proc import run

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mtbuild.prove.engine import EngineFacts
    from mtbuild.prove.host_facts import HostGpu

__all__ = ["Attachment", "attach"]

Way = Literal["runtime", "cdi", "devices"]

_KIND = "nvidia.com/gpu"
_INSIDE = "/usr/local/nvidia/lib64"  # where the toolkit's images look, too
_LIBRARIES = re.compile(r"lib(cuda|nvidia-ptxjitcompiler|nvidia-nvvm\d*|nvidia-ml|nvidia-gpucomp)\.so")
_CONTROL = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools")


@dataclass(frozen=True, kw_only=True)
class Attachment:
    """A way, and what it adds to the container's settings (words of the Docker SDK)."""

    way: Way
    requests: tuple[DeviceRequest, ...] = ()
    devices: tuple[str, ...] = ()
    mounts: dict[str, str] = field(default_factory=dict)  # host path → path inside, read-only
    environment: dict[str, str] = field(default_factory=dict)


def attach(facts: EngineFacts, gpu: HostGpu, *, count: int = 1, dev: Path = Path("/dev")) -> Attachment:
    """`gpu` of a host with `count` cards, by the first way there is; InfrastructureError if none is."""
    if "nvidia" in facts.runtimes:
        # The toolkit's own request: the driver's files are chosen by NVIDIA_DRIVER_CAPABILITIES of the image.
        return Attachment(
            way="runtime",
            requests=(DeviceRequest(driver="nvidia", device_ids=[gpu.uuid], capabilities=[["gpu"]]),),
        )
    described = [document for file in _specs(facts.cdi) if (document := _gpu_spec(file)) is not None]
    if described:
        name = _cdi_name(described, gpu, count)
        return Attachment(way="cdi", requests=(DeviceRequest(driver="cdi", device_ids=[f"{_KIND}={name}"]),))
    node = dev / f"nvidia{gpu.minor}"
    libraries = _driver_libraries()
    if node.exists() and libraries:
        control = [str(dev / name) for name in _CONTROL if (dev / name).exists()]
        return _by_hand([str(node), *control], libraries)
    msg = "this host has a GPU, but no way to hand it to a container"
    raise InfrastructureError(
        msg,
        fix="install nvidia-container-toolkit and run `nvidia-ctk cdi generate`, so that CDI can",
    )


def _cdi_name(specs: list[dict[str, Any]], gpu: HostGpu, count: int) -> str:
    """The CDI device that is this card alone: by UUID, by index, or `all` where it is the only one."""
    names = {str(device.get("name")) for spec in specs for device in spec.get("devices") or ()}
    # nvidia-ctk names by index (the default), by UUID, or by `gpuN`
    ours = [gpu.uuid, str(gpu.index), f"gpu{gpu.index}", *(["all"] if count == 1 else [])]
    for name in ours:
        if name in names:
            return name
    msg = f"this host's CDI specification names no device for GPU {gpu.index} ({gpu.uuid}) alone"
    raise InfrastructureError(
        msg, fix=f"run `nvidia-ctk cdi generate` again; it now names {', '.join(sorted(names)) or 'none'}"
    )


def _by_hand(devices: list[str], libraries: list[Path]) -> Attachment:
    """Device nodes plus the driver's libraries, for a host with a driver and nothing else."""
    return Attachment(
        way="devices",
        devices=tuple(f"{node}:{node}:rw" for node in devices),
        mounts={str(path): f"{_INSIDE}/{path.name}" for path in libraries},
        environment={"LD_LIBRARY_PATH": _INSIDE},
    )


def _specs(folders: Iterable[str]) -> list[Path]:
    return [
        file
        for folder in folders
        if Path(folder).is_dir()
        for file in sorted(Path(folder).iterdir())
        if file.suffix in (".json", ".yaml", ".yml")
    ]


def _gpu_spec(file: Path) -> dict[str, Any] | None:
    """The specification in this file, if it is one of GPUs."""
    try:
        text = file.read_text(encoding="utf-8")
        document: Any = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return document if isinstance(document, dict) and document.get("kind") == _KIND else None


def _driver_libraries() -> list[Path]:
    """The driver's user-space libraries: from a mounted driver's folder, else from the linker's cache."""
    mounted = Path(_INSIDE)
    if mounted.is_dir():
        return [path for path in sorted(mounted.iterdir()) if _LIBRARIES.match(path.name)]
    try:
        listing = run(["/sbin/ldconfig", "-p"], timeout_s=20).output
    except CommandError:
        return []
    found = [line.split("=>")[1].strip() for line in listing.splitlines() if "libcuda.so.1" in line]
    folders = sorted({Path(place).parent for place in found})
    return [path for folder in folders for path in sorted(folder.iterdir()) if _LIBRARIES.match(path.name)]
