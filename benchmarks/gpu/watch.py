"""What the card did during a measurement: SM clock, power, and what held the clock down, by NVML, from a
thread.

A figure without them can't be compared: at its power limit a card runs the same kernel slower.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from setting import timed

EVERY_S = 0.01
REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
}


class Watch:
    """`with Watch(device) as watch: …` then `watch.summary()`; {} where there is no GPU or no NVML."""

    def __init__(self, device: torch.device) -> None:
        self._nvml, self._handle = _open(device)
        self._samples: list[tuple[int, int, int]] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watch:
        if self._handle is not None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        nvml, handle = self._nvml, self._handle
        while not self._stop.wait(EVERY_S):
            clock = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
            why = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
            self._samples.append((clock, nvml.nvmlDeviceGetPowerUsage(handle), why))

    def summary(self) -> dict[str, Any]:
        """sm_mhz (median, least), watts (mean), and the share of samples in which each reason held the
        clock.
        """
        if not self._samples:
            return {}
        clocks, power, reasons = zip(*self._samples, strict=True)
        held = {name: sum(bool(r & bit) for r in reasons) / len(reasons) for bit, name in REASONS.items()}
        return {
            "sm_mhz": round(statistics.median(clocks)),
            "sm_mhz_least": min(clocks),
            "watts": round(statistics.mean(power) / 1e3),
            "held_by": {name: round(share, 2) for name, share in held.items() if share},
        }


def _open(device: torch.device) -> tuple[Any, Any]:
    if device.type != "cuda":
        return None, None
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
        try:
            return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except pynvml.NVMLError:
            return pynvml, pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
    except Exception as error:  # noqa: BLE001  (a measurement without clocks is better than none)
        print(f"no clocks and power: {error}", flush=True)
        return None, None


def watched(function: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """One call: ms on the device, ms until the host had launched it all, and what the card did meanwhile."""
    launched: list[float] = []

    def call() -> None:
        begin = time.perf_counter()
        function()
        launched.append((time.perf_counter() - begin) * 1e3)

    with Watch(device) as watch:
        ms = timed(call, device)
    return {"ms": round(ms, 2), "launch_ms": round(launched[0], 2), **watch.summary()}


def sustained(
    function: Callable[[], Any], device: torch.device, *, warm_s: float = 2.0, run_s: float = 1.0
) -> dict[str, Any]:
    """Median ms of one call after `warm_s` of the same call: at the clock that the card can keep up.

    `first_ms` is the median of the first calls after one warm-up, as short benchmarks have it.
    """
    function()
    first = statistics.median(timed(function, device) for _ in range(3))
    warm, count = max(1, round(warm_s * 1e3 / first)), max(3, round(run_s * 1e3 / first))
    if device.type != "cuda":
        warm, count = 1, 3
    for _ in range(warm):
        function()
    with Watch(device) as watch:
        times = [timed(function, device) for _ in range(count)]
    return {"ms": round(statistics.median(times), 4), "first_ms": round(first, 4), **watch.summary()}
