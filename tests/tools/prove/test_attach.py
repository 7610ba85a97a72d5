"""How a container gets the GPUs: the first way that the host has."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mtbuild.errors import InfrastructureError
from mtbuild.prove import attach
from mtbuild.prove.engine import EngineFacts

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


def nodes(folder: Path) -> Path:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (folder / name).touch()
    return folder


def spec(folder: Path, *, kind: str = "nvidia.com/gpu", name: str = "nvidia.yaml") -> Path:
    (folder / name).write_text(
        json.dumps({"cdiVersion": "0.5.0", "kind": kind, "devices": []})
        if name.endswith("json")
        else f"cdiVersion: 0.5.0\nkind: {kind}\ndevices: []\n"
    )
    return folder


def test_the_toolkits_runtime_comes_first(tmp_path: Path) -> None:
    facts = replace(FACTS, runtimes=("nvidia", "runc"), cdi=(str(spec(tmp_path)),))
    found = attach.attach(facts, dev=nodes(tmp_path))
    assert found.way == "runtime"
    assert found.requests[0]["Driver"] == "nvidia"
    assert found.requests[0]["Capabilities"] == [["gpu"]]
    assert found.requests[0]["Count"] == -1


@pytest.mark.parametrize("name", ["nvidia.yaml", "nvidia.json"])
def test_then_a_cdi_device(tmp_path: Path, name: str) -> None:
    found = attach.attach(replace(FACTS, cdi=(str(spec(tmp_path, name=name)),)), dev=nodes(tmp_path))
    assert found.way == "cdi"
    assert found.requests[0]["DeviceIDs"] == ["nvidia.com/gpu=all"]
    assert not found.devices


def test_then_the_nodes_with_the_drivers_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "libcuda.so.1"
    library.touch()
    monkeypatch.setattr(attach, "_driver_libraries", lambda: [library])
    other = spec(tmp_path, kind="vendor.com/net")
    found = attach.attach(replace(FACTS, cdi=(str(other), "/nowhere")), dev=nodes(tmp_path))
    assert found.way == "devices"
    assert [entry.split(":")[0].rsplit("/", 1)[1] for entry in found.devices] == [
        "nvidia0",
        "nvidia1",
        "nvidiactl",
        "nvidia-uvm",
    ]
    assert found.mounts == {str(library): "/usr/local/nvidia/lib64/libcuda.so.1"}
    assert found.environment == {"LD_LIBRARY_PATH": "/usr/local/nvidia/lib64"}


def test_a_gpu_that_no_way_leads_to_is_an_error_with_its_fix(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("kind: [")
    with pytest.raises(InfrastructureError, match="no way to hand it to a container") as raised:
        attach.attach(replace(FACTS, cdi=(str(tmp_path),)), dev=tmp_path)
    assert "nvidia-container-toolkit" in raised.value.fix
