"""q, k, v in fp8 by heads: the kernels, interpreted, against their references bit for bit, whatever the
strides and lengths; and what they refuse.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

# A kernel must be decorated with TRITON_INTERPRET already set, so the interpreter runs in its own process.
INTERPRET = """
import importlib, json, torch
from wan import flash3
from wan.kernels import fp8, reference_lossy

generator = torch.Generator().manual_seed(3)
draw = lambda *shape: torch.randn(*shape, generator=generator)

def forms():
    # (name, x): slices of a joined product, heads before tokens in memory, odd lengths and widths
    for tokens in (1, 63, 65, 128, 1100):
        whole = draw(2, tokens, 3 * 4 * 128).bfloat16()
        for name, part in zip("qkv", whole.chunk(3, dim=-1), strict=True):
            yield f"{name} of {tokens}", part.unflatten(-1, (4, 128))
    x = draw(2, 130, 3, 128)
    x[:, :, 1] = 0
    yield "zero head", x.bfloat16()
    yield "big means", (x + 300 * draw(1, 1, 3, 128)).bfloat16()
    yield "one value", torch.full((1, 70, 2, 64), 1000.0).bfloat16()
    yield "tiny", x.bfloat16() * 1e-20
    yield "huge", x.bfloat16() * 1e20
    yield "heads first", draw(2, 3, 77, 64).bfloat16().transpose(1, 2)
    yield "72 wide", draw(1, 77, 3, 72).bfloat16()
    yield "some of the tokens", draw(2, 200, 3, 64).bfloat16()[:, 11:150:2]

def by_heads(kernels, x, centre):
    flash3._kernels = lambda _: kernels
    return flash3.by_heads(x, centre=centre)

for name, x in forms():
    got, want = fp8.head_extremes(x), reference_lossy.head_extremes(x)
    size = want[:2].abs().amax() + 1e-30
    centre, width = want[2].contiguous(), (want[1] - want[0]).amax(-1)
    inverse = 3 * 448 / width.clamp(min=1e-30)  # some go beyond 448
    data, same = fp8.quantize_heads(x, centre, inverse), reference_lossy.quantize_heads(x, centre, inverse)
    row = {
        "name": name,
        "extremes": torch.equal(got[:2], want[:2]),
        "mean": float((got[2] - want[2]).abs().max() / size),
        "data": torch.equal(data.view(torch.uint8), same.view(torch.uint8)),
        "form": data.is_contiguous() and same.is_contiguous() and data.dtype == torch.float8_e4m3fn,
        "finite": bool(torch.isfinite(data.float()).all()),
    }
    for centred in (False, True):
        (a, step), (b, other) = by_heads(fp8, x, centred), by_heads(reference_lossy, x, centred)
        back, back_other = a.float() * step[:, None, :, None], b.float() * other[:, None, :, None]
        row[f"whole {centred}"] = float((back - back_other).norm() / (x.float().norm() + 1e-30))
    print(json.dumps(row))

x = draw(1, 70, 2, 64).bfloat16()
x[0, 69, 1, 3] = float("nan")
data = fp8.quantize_heads(x, torch.zeros(1, 2, 64), torch.ones(1, 2)).float()
assert data.isnan().sum() == 1 and data[0, 69, 1, 3].isnan()
"""


def test_interpreter_equals_the_references() -> None:
    pytest.importorskip("triton")
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRET], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == 23
    for row in rows:
        assert row["extremes"] and row["mean"] < 1e-6, row
        assert row["data"] and row["form"] and row["finite"], row
        assert row["whole False"] == 0, row
        # means differ in the order of their sums, and so may values next to the middle of two steps
        assert row["whole True"] < 1e-4, row


@pytest.mark.parametrize("change", ["channels", "centre", "inverse", "dtype"])
def test_what_does_not_fit_is_refused(change: str) -> None:
    pytest.importorskip("triton")
    from wan.kernels import fp8

    x, centre, inverse = torch.zeros(1, 5, 2, 8), torch.zeros(1, 2, 8), torch.ones(1, 2)
    if change == "channels":
        with pytest.raises(ValueError, match="side by side"):
            fp8.head_extremes(x.transpose(2, 3))
        return
    centre = centre[:, :1] if change == "centre" else centre
    inverse = {"inverse": inverse[:, :1], "dtype": inverse.bfloat16()}.get(change, inverse)
    with pytest.raises(ValueError, match=f"{'centre' if change == 'centre' else 'inverse'} must be fp32"):
        fp8.quantize_heads(x, centre, inverse)
