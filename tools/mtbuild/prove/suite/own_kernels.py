"""The suite's own Triton kernels: for images without `wan.kernels`, and a floor for all others.

`add` is elementwise; `matmul` uses the tensor path (mma.sync, wgmma or tcgen05 by target), which no
elementwise kernel tests. The entries have the shape of `wan.kernels.KERNELS`' entries.
"""

from types import SimpleNamespace

import torch
import triton
import triton.language as tl


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):  # noqa: N803 - Triton's style for constants
    """out[i] = x[i] + y[i] for i < n."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    tl.store(out + offsets, tl.load(x + offsets, mask=mask) + tl.load(y + offsets, mask=mask), mask=mask)


@triton.jit
def matmul_kernel(a, b, c, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):  # noqa: N803
    """c[M, N] fp32 = a[M, k] fp16 @ b[k, N] fp16, row-major, in one program; k is a multiple of K."""
    rows = tl.arange(0, M)
    columns = tl.arange(0, N)
    inner = tl.arange(0, K)
    total = tl.zeros((M, N), dtype=tl.float32)
    for start in range(0, k, K):
        left = tl.load(a + rows[:, None] * k + (start + inner)[None, :])
        right = tl.load(b + (start + inner)[:, None] * N + columns[None, :])
        total += tl.dot(left, right)
    tl.store(c + rows[:, None] * N + columns[None, :], total)


def _add(x, y):
    out = torch.full_like(x, float("nan"))
    add_kernel[(triton.cdiv(x.numel(), 1024),)](x, y, out, x.numel(), BLOCK=1024)
    return out


def _matmul(a, b):
    c = torch.full((64, 64), float("nan"), device=a.device)
    matmul_kernel[(1,)](a, b, c, a.shape[1], M=64, N=64, K=32)
    return c


def _vectors(device, generator):
    return (torch.randn(3001, device=device, generator=generator), torch.ones(3001, device=device)), {}


def _matrices(device, generator):
    a = torch.randn(64, 128, device=device, generator=generator).half()
    b = torch.randn(128, 64, device=device, generator=generator).half()
    return (a, b), {}


KERNELS = (
    SimpleNamespace(
        name="suite.add",
        fn=add_kernel,
        signature={"x": "*fp32", "y": "*fp32", "out": "*fp32", "n": "i32"},
        constexprs={"BLOCK": 1024},
        options={"num_warps": 4},
        launch=_add,
        reference=lambda x, y: x + y,
        example=_vectors,
    ),
    SimpleNamespace(
        name="suite.matmul",
        fn=matmul_kernel,
        signature={"a": "*fp16", "b": "*fp16", "c": "*fp32", "k": "i32"},
        constexprs={"M": 64, "N": 64, "K": 32},
        options={"num_warps": 4},
        launch=_matmul,
        reference=lambda a, b: a.float() @ b.float(),
        example=_matrices,
    ),
)
