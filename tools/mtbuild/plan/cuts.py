"""What can safely go from the wheels of an image, and why: data, with its source.

Measured on torch 2.7.1, triton 3.3.1 and xformers 0.0.31 (docs/images.md): each cut was made, then torch and
xformers were imported and kernels compiled. Not cut, although large: cuDNN's engines (the VAE is 3-D
convolution), cuBLASLt, NCCL, cuSPARSELt (libtorch_cuda.so links them), torch/include (torch.compile on a CPU
compiles against it), torch_shm_manager (multi-process loaders start it).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CUTS", "Cut", "cut_of"]


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Shell patterns relative to site-packages: what to remove, and whose symbol tables to strip."""

    remove: tuple[str, ...] = ()
    strip: tuple[str, ...] = ()


CUTS: dict[str, Cut] = {
    "torch": Cut(
        remove=(
            "torch/bin/protoc*",  # the compiler of protocol buffers; nothing at run time calls it
            "torch/bin/*_test torch/bin/test_*",
            "torch/lib/lib*_test.so torch/lib/libbackend_with_compiler.so",  # built for torch's own tests
            "torch/lib/*.a",
        ),
        # Symbol tables only; dynamic symbols, which the loader and extensions use, stay.
        strip=("torch/lib/libtorch_*.so", "torch/lib/libc10*.so", "torch/lib/libtorch.so"),
    ),
    "triton": Cut(
        remove=(
            # Proton, the profiler, and what it links: 159 MB that no kernel needs
            "triton/_C/libproton.so triton/profiler triton/instrumentation ../../../bin/proton*",
            "triton/backends/nvidia/lib/cupti",
            # disassemblers, for people who read machine code
            "triton/backends/nvidia/bin/cuobjdump triton/backends/nvidia/bin/nvdisasm",
            "triton/backends/nvidia/lib/*.a",
            "triton/_C/libtriton_amd_codegen.so",  # the Python side of the AMD backend must stay
        ),
        strip=("triton/_C/libtriton.so",),
    ),
    "xformers": Cut(strip=("xformers/*.so", "xformers/flash_attn_3/*.so")),
    # Opened by CUPTI only to read hardware counters and to save a GPU's state; torch's profiler does neither.
    "nvidia-cuda-cupti-cu12": Cut(
        remove=(
            "nvidia/cuda_cupti/lib/libcheckpoint.so nvidia/cuda_cupti/lib/libnvperf_*.so",
            "nvidia/cuda_cupti/lib/libpcsamplingutil.so",
        )
    ),
    # Linked by nothing in torch, xformers or triton (no DT_NEEDED names it, nothing opens it by name):
    # the multi-GPU variant of the dense solver.
    "nvidia-cusolver-cu12": Cut(remove=("nvidia/cusolver/lib/libcusolverMg.so*",)),
    "nvidia-cusolver": Cut(remove=("nvidia/cu13/lib/libcusolverMg.so*",)),
}

# Of every wheel of these kinds: headers that only an nvcc reads, and static libraries.
_NVIDIA = Cut(
    remove=(
        "nvidia/*/include nvidia/*/src",
        "nvidia/*/lib/*.a",
        "nvidia/*/lib/cmake nvidia/*/lib/pkgconfig",
    )
)
_TESTS = ("numpy", "scipy", "sympy", "networkx", "mpmath")  # packages that ship their own test suites


def cut_of(name: str) -> Cut:
    """For a package by its canonical name; empty for most."""
    cut = CUTS.get(name, Cut())
    if name.startswith(("nvidia-", "cuda-")):
        return Cut(remove=(*_NVIDIA.remove, *cut.remove), strip=cut.strip)
    if name in _TESTS:
        return Cut(remove=(f"{name}/tests {name}/*/tests {name}/*/*/tests", *cut.remove), strip=cut.strip)
    return cut
