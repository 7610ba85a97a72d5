"""The softmax of absorbed audio attention: interpreted, at odd sizes, over its input; and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

# A kernel must be decorated with TRITON_INTERPRET already set, so the interpreter runs in its own process.
CODE = """
import torch
from wan.kernels import bias_softmax, reference
from wan.kernels.ops import absorbed_weights
from wan.modules import ops
draw = lambda *shape: torch.randn(*shape, generator=generator)
generator = torch.Generator().manual_seed(0)
for frames, tokens, heads, keys in ((1, 1, 1, 1), (2, 5, 3, 7), (3, 43, 3, 32), (1, 200, 5, 33)):
    scores, bias = 9 * draw(frames, tokens, heads * keys), draw(frames, 1, heads * keys)
    scores[0, 0] = 1e4  # the greatest is taken off before the exponential
    kept, want = scores.clone(), reference.bias_softmax(scores, bias, heads)
    got = bias_softmax(scores, bias, heads)
    assert torch.equal(scores, kept)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    over = bias_softmax(scores, bias, heads, inplace=True)
    assert over.data_ptr() == scores.data_ptr() and torch.equal(over, got)
    x, into = draw(frames, tokens, 16), draw(frames, 16, heads * keys)
    fused, eager = absorbed_weights(x, into, bias, heads), ops.absorbed_weights(x, into, bias, heads)
    torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-6)
"""


def test_it_is_the_reference_at_every_size() -> None:
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("scores", "bias", "text"),
    [
        (torch.zeros(2, 3, 12), torch.zeros(1, 1, 12), r"got \(2, 3, 12\) and \(1, 1, 12\)"),
        (torch.zeros(2, 3, 10), torch.zeros(2, 1, 10), "of 4 heads wanted"),
        (torch.zeros(2, 3, 24)[..., ::2], torch.zeros(2, 1, 12), "contiguous inputs only"),
    ],
)
def test_what_does_not_fit_is_refused(scores: torch.Tensor, bias: torch.Tensor, text: str) -> None:
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    from wan.kernels.softmax import bias_softmax

    with pytest.raises(ValueError, match=text):
        bias_softmax(scores, bias, 4)
