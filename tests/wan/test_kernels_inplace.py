"""The gated residual written over its input: the same numbers, and refused where its rows are apart."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import torch
from wan.kernels import gate_residual, gate_residual_norm
g = torch.Generator().manual_seed(0)
draw = lambda *s: torch.randn(*s, generator=g)
x, y, gate, scale, shift = draw(1, 5, 48), draw(1, 5, 48), draw(1, 1, 48), draw(1, 1, 48), draw(1, 1, 48)
want, normed = gate_residual_norm(x, y, gate, scale, shift, modulate=True)
over = x.clone()
out, same = gate_residual_norm(over, y, gate, scale, shift, modulate=True, inplace=True)
assert out.data_ptr() == over.data_ptr()
assert torch.equal(out, want) and torch.equal(same, normed)
over = x.clone()
assert torch.equal(gate_residual(over, y, gate, inplace=True), want) and torch.equal(over, want)
try:
    gate_residual(torch.cat((x, x), dim=-1)[..., :48], y, gate, inplace=True)
except ValueError as error:
    assert "contiguous" in str(error), error
else:
    raise AssertionError("rows that are apart were written over")
"""


def test_in_place() -> None:
    pytest.importorskip("triton")
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
