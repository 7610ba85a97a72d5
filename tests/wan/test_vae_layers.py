"""The VAE's norm kernel writes where the next convolution reads."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton has no wheel for this platform")

# A kernel must be decorated with TRITON_INTERPRET already set.
CODE = """
import torch
from wan.kernels import rms_norm_silu
from wan.modules.vae_layers import CausalCache, norm_silu_eager

x = torch.randn(1, 96, 2, 6, 7).contiguous(memory_format=torch.channels_last_3d)
gamma = torch.rand(96, 1, 1, 1)
room = CausalCache().room_behind_history(x)
got = rms_norm_silu(x, gamma, out=room)
assert got is room and torch.equal(got, rms_norm_silu(x, gamma))
torch.testing.assert_close(got, norm_silu_eager(x, gamma))
assert CausalCache().room_behind_history(x.contiguous()) is None
for bad in (torch.empty(x.shape), room.double(), room[:, :, :1]):
    try:
        rms_norm_silu(x, gamma, out=bad)
    except ValueError as error:
        assert "out must be like x" in str(error)
    else:
        raise AssertionError(bad.shape)
"""


def test_norm_into_given_memory() -> None:
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", CODE], env=env, check=True, timeout=120)
