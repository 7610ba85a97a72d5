"""Which card is which: by index, by UUID, and never by luck."""

from __future__ import annotations

import os
import re
from types import SimpleNamespace
from typing import Any

import pytest

from mtbuild.errors import InputError
from mtbuild.prove import host_facts
from mtbuild.prove.host_facts import HostGpu, choose

CARDS = [
    HostGpu(
        index=index,
        name=name,
        uuid=uuid,
        sm="8.9",
        memory_bytes=24 << 30,
        driver="580.65",
        cuda="13.0",
        minor=1 - index,
    )
    for index, (name, uuid) in enumerate(
        [("NVIDIA L4", "GPU-aa11aa11-0000-4000-8000-000000000000"), ("NVIDIA L40S", "GPU-aa22bb22-0000-4000")]
    )
]


@pytest.mark.parametrize(
    ("wanted", "index"),
    [(None, 0), ("0", 0), ("1", 1), (CARDS[1].uuid, 1), ("GPU-aa2", 1), ("AA11", 0)],
)
def test_a_card_by_index_or_uuid(wanted: str | None, index: int) -> None:
    assert choose(CARDS, wanted).index == index


@pytest.mark.parametrize(
    ("wanted", "why"), [("2", "no GPU"), ("GPU-ff", "no GPU"), ("GPU-aa", "more than one"), ("", "no")]
)
def test_a_name_that_fits_none_or_two_is_an_error_that_lists_them(wanted: str, why: str) -> None:
    with pytest.raises(InputError, match=f"names {why}") as raised:
        choose(CARDS, wanted)
    for card in CARDS:
        assert re.search(f"{card.index}: {card.name} {card.uuid}", raised.value.fix or "")


def test_memory_is_told_apart_by_card_and_container(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cards; this process stands for the container's, process 1 for somebody else's."""
    mine = SimpleNamespace(pid=os.getpid(), usedGpuMemory=7)
    untold = SimpleNamespace(pid=os.getpid(), usedGpuMemory=None)
    other = SimpleNamespace(pid=1, usedGpuMemory=100)
    running = [[mine, mine, other], [untold, other]]
    monkeypatch.setattr(host_facts, "_belongs", lambda pid, container: pid == os.getpid())
    nvml: dict[str, Any] = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: len(running),
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetUUID": lambda handle: f"GPU-{handle}".encode(),
        "nvmlDeviceGetComputeRunningProcesses": lambda handle: running[handle],
    }
    for name, answer in nvml.items():
        monkeypatch.setattr(host_facts.pynvml, name, answer)
    assert host_facts.held_by("c") == {"GPU-0": 14, "GPU-1": 1}
