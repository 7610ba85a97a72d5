"""The driver answers inside the container, and torch's CUDA runtime works on it."""

from __future__ import annotations

import ctypes

from result import CheckResult, Context, failed, passed

ID = "libcuda"
TIERS = ("gpu",)
LIMIT_S = 180


def run(ctx: Context) -> CheckResult:
    """Ask the driver by itself first, so that a failure names the driver or torch, not both."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return failed(
            "libcuda.so.1 is not in the container",
            detail=str(error),
            diagnosis="the container got no GPU driver (no toolkit, no CDI device, or "
            "NVIDIA_DRIVER_CAPABILITIES lacks compute)",
            fix="see `mtbuild doctor` for how this host hands GPUs to containers",
        )
    status = driver.cuInit(0)
    if status != 0:
        return failed(
            f"cuInit gives error {status}",
            diagnosis="driver library and kernel module differ, or the device nodes are not in the container",
            fix="check that /dev/nvidia0, /dev/nvidiactl and /dev/nvidia-uvm are there and "
            "nvidia-smi works on the host",
        )
    version, count = ctypes.c_int(), ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    driver.cuDeviceGetCount(ctypes.byref(count))
    supports = f"{version.value // 1000}.{version.value % 1000 // 10}"
    import torch

    if count.value == 0 or not torch.cuda.is_available():
        return failed(
            f"the driver shows {count.value} devices, torch.cuda.is_available() is "
            f"{torch.cuda.is_available()}",
            diagnosis=f"torch was built for CUDA {torch.version.cuda}, the driver supports {supports}",
            fix="take an image for this driver: `mtbuild pick --driver VERSION`",
        )
    devices = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        devices.append({"name": torch.cuda.get_device_name(index), "sm": f"{major}.{minor}"})
    arches = torch.cuda.get_arch_list()
    value = torch.arange(8, device="cuda").square().sum().item()
    if value != 140:
        return failed(
            f"a sum on the GPU gives {value}, not 140",
            diagnosis="the GPU or its driver computes wrongly",
            fix="test the GPU (nvidia-smi -q, ECC errors), and use another host",
        )
    return passed(
        f"{devices[0]['name']} ({devices[0]['sm']}), driver for CUDA {supports}, torch for "
        f"{torch.version.cuda}",
        libcuda__driver_cuda=supports,
        libcuda__devices=devices,
        libcuda__torch_arches=arches,
    )
