"""int8 attention in Triton's interpreter: odd lengths, strides, both variants, and what smoothing is for."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from wan.kernels import reference_lossy

pytest.importorskip("triton", reason="triton has no wheel for this platform")

# A kernel must be decorated with TRITON_INTERPRET already set, so the interpreter runs in its own process.
INTERPRET = """
import json, torch
from wan.kernels.int8_attention import int8_attention
from wan.kernels.reference_lossy import int8_attention as reference

def error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())

generator = torch.Generator().manual_seed(3)
for rows, keys, heads, dim, scale in (
    (64, 128, 1, 128, None), (1, 1, 1, 64, None), (70, 133, 2, 64, None), (65, 257, 2, 128, 0.2),
    (31, 63, 3, 64, None),
):
    joined = torch.randn(2, max(rows, keys), 3 * heads * dim, generator=generator)  # as the model has them
    q, k, v = (t.unflatten(-1, (heads, dim)) for t in joined.chunk(3, dim=-1))
    q, k, v = q[:, :rows], k[:, :keys] + 3 * torch.randn(1, 1, heads, dim, generator=generator), v[:, :keys]
    for fp8 in (False, True):
        got, want = int8_attention(q, k, v, scale=scale, fp8=fp8), reference(q, k, v, scale=scale, fp8=fp8)
        halves = [t.bfloat16() for t in (q, k, v)]
        half = int8_attention(*halves, scale=scale, fp8=fp8)
        half_want = reference(*(t.float() for t in halves), scale=scale, fp8=fp8)
        print(json.dumps({
            "case": [rows, keys, heads, dim, fp8], "error": error(got, want), "bf16": error(half, half_want),
            "like": got.shape == q.shape and got.dtype == q.dtype and half.dtype == torch.bfloat16,
        }))
"""


def test_interpreter_equals_the_reference() -> None:
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRET], env=env, check=True, timeout=300,
                          capture_output=True, text=True)  # fmt: skip
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == 10
    for row in rows:
        assert row["like"], row
        # one value that rounds the other way is 1/127 of its group; the interpreter cuts bf16 outputs
        assert row["error"] < 1e-3, row
        assert row["bf16"] < 0.01, row


@pytest.mark.parametrize(("fp8", "gate"), [(False, 0.016), (True, 0.035)])
def test_error_against_exact_attention(fp8: bool, gate: float) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 512, 4, 128, generator=generator) for _ in range(3))
    k = k + 4 * torch.randn(1, 1, 4, 128, generator=generator)

    def error(got: torch.Tensor) -> float:
        heads_first = (t.double().transpose(1, 2) for t in (q, k, v))
        exact = torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)
        return float((got.double() - exact).norm() / exact.norm())

    smooth = error(reference_lossy.int8_attention(q, k, v, fp8=fp8))
    rough = error(reference_lossy.int8_attention(q, k, v, fp8=fp8, smooth=False))
    assert 1e-3 < smooth < gate
    assert rough > 1.2 * smooth
    if not fp8:
        assert rough > 2 * smooth


def test_shapes_without_tiles_are_refused() -> None:
    from wan.kernels.int8_attention import int8_attention

    with pytest.raises(ValueError, match="64 or 128 wide"):
        int8_attention(*(torch.zeros(1, 4, 2, 32) for _ in range(3)))
