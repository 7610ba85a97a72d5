"""How a container gets the GPUs: the first way that the host has."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mtbuild.errors import InfrastructureError
from mtbuild.prove import attach
from mtbuild.prove.engine import EngineFacts
from mtbuild.prove.host_facts import HostGpu

FACTS = EngineFacts(
    version="26.1.5",
    api="1.45",
    driver="overlayfs",
    store="containerd",
    cgroup="2",
    runtimes=("io.containerd.runc.v2", "runc"),
    cdi=(),
    data_root=Path("/var/lib/docker"),
    cpus=2,
    memory_bytes=1 << 34,
    kernel="6.18",
    system="Debian",
)
CARD = HostGpu(
    index=1,
    name="NVIDIA L4",
    uuid="GPU-5ca1ab1e-0000-4000-8000-000000000001",
    sm="8.9",
    memory_bytes=1 << 34,
    driver="580.65",
    cuda="13.0",
    minor=1,
)


def nodes(folder: Path) -> Path:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (folder / name).touch()
    return folder


def spec(folder: Path, *devices: str, kind: str = "nvidia.com/gpu", name: str = "nvidia.yaml") -> Path:
    listed = [{"name": device} for device in devices]
    document = {"cdiVersion": "0.5.0", "kind": kind, "devices": listed}
    text = json.dumps(document) if name.endswith("json") else yaml.safe_dump(document)
    (folder / name).write_text(text)
    return folder


def test_the_toolkits_runtime_comes_first(tmp_path: Path) -> None:
    facts = replace(FACTS, runtimes=("nvidia", "runc"), cdi=(str(spec(tmp_path)),))
    found = attach.attach(facts, CARD, count=2, dev=nodes(tmp_path))
    assert found.way == "runtime"
    assert found.requests[0]["Driver"] == "nvidia"
    assert found.requests[0]["Capabilities"] == [["gpu"]]
    assert found.requests[0]["DeviceIDs"] == [CARD.uuid], "the chosen card, not all of them"
    assert found.requests[0]["Count"] == 0


@pytest.mark.parametrize("name", ["nvidia.yaml", "nvidia.json"])
@pytest.mark.parametrize(
    ("devices", "count", "device"),
    [
        (("0", "1", "all"), 2, "1"),
        (("0", "1", CARD.uuid, "all"), 2, CARD.uuid),
        (("gpu0", "gpu1"), 2, "gpu1"),
        (("all",), 1, "all"),
    ],
)
def test_then_a_cdi_device_of_the_card_alone(
    tmp_path: Path, name: str, devices: tuple[str, ...], count: int, device: str
) -> None:
    facts = replace(FACTS, cdi=(str(spec(tmp_path, *devices, name=name)),))
    found = attach.attach(facts, CARD, count=count, dev=nodes(tmp_path))
    assert found.way == "cdi"
    assert found.requests[0]["DeviceIDs"] == [f"nvidia.com/gpu={device}"]
    assert not found.devices


def test_all_cards_are_never_handed_over_in_place_of_one(tmp_path: Path) -> None:
    facts = replace(FACTS, cdi=(str(spec(tmp_path, "all")),))
    with pytest.raises(InfrastructureError, match=f"names no device for GPU 1 .{CARD.uuid}. alone") as raised:
        attach.attach(facts, CARD, count=2, dev=nodes(tmp_path))
    assert "it now names all" in (raised.value.fix or "")


def test_then_the_nodes_with_the_drivers_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "libcuda.so.1"
    library.touch()
    monkeypatch.setattr(attach, "_driver_libraries", lambda: [library])
    other = spec(tmp_path, kind="vendor.com/net")
    found = attach.attach(replace(FACTS, cdi=(str(other), "/nowhere")), CARD, count=2, dev=nodes(tmp_path))
    assert found.way == "devices"
    assert [entry.split(":")[0].rsplit("/", 1)[1] for entry in found.devices] == [
        "nvidia1",
        "nvidiactl",
        "nvidia-uvm",
    ]
    assert found.mounts == {str(library): "/usr/local/nvidia/lib64/libcuda.so.1"}
    assert found.environment == {"LD_LIBRARY_PATH": "/usr/local/nvidia/lib64"}


def test_a_gpu_that_no_way_leads_to_is_an_error_with_its_fix(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("kind: [")
    with pytest.raises(InfrastructureError, match="no way to hand it to a container") as raised:
        attach.attach(replace(FACTS, cdi=(str(tmp_path),)), CARD, dev=tmp_path)
    assert "nvidia-container-toolkit" in raised.value.fix
