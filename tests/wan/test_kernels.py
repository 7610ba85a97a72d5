"""The Triton kernels: compiled ahead of time for every capability, interpreted against the references."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from wan.kernels import reference

pytest.importorskip("triton", reason="triton has no wheel for this platform")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CAPABILITIES = (80, 86, 89, 90, 100, 120)

# A kernel must be decorated with TRITON_INTERPRET already set, so the interpreter runs in its own process.
INTERPRET = """
import json, sys, torch
from wan.kernels import KERNELS

def error(got, want):
    return max(float((g.double() - w).norm() / w.norm()) for g, w in zip(got, want, strict=True))

def tuples(value):
    return (value,) if isinstance(value, torch.Tensor) else value

def steps(got, want):
    # share of 8-bit values that differ; largest difference of any value, relative to the largest one
    pairs = [(g.double(), w.double()) for g, w in zip(got, want, strict=True)]
    eight = [float((g != w).double().mean()) for (g, w), t in zip(pairs, got) if t.element_size() == 1]
    share = max(eight, default=0.0)
    return share, max(float((g - w).abs().max() / w.abs().max()) for g, w in pairs)

def cast(args, dtype):
    return [a.to(dtype) if isinstance(a, torch.Tensor) else a for a in args]

generator = torch.Generator().manual_seed(int(sys.argv[1]))
for spec in KERNELS:
    args, kwargs = spec.example("cpu", generator)
    if spec.lossy:  # in fp32, since the interpreter cuts bf16, which may be a step of 8 bits
        args = cast(args, torch.float32)
        got, want = tuples(spec.launch(*args, **kwargs)), tuples(spec.reference(*args, **kwargs))
        print(json.dumps({
            "name": spec.name, "steps": steps(got, want),
            "dtypes": [str(g.dtype) for g in got] == [str(w.dtype) for w in want],
            "strides": [g.stride() for g in got] == [w.stride() for w in want],
        }))
        continue
    want = tuples(spec.reference(*cast(args, torch.double), **kwargs))
    got, same = tuples(spec.launch(*args, **kwargs)), tuples(spec.reference(*args, **kwargs))
    wide = tuples(spec.launch(*cast(args, torch.float32), **kwargs))
    print(json.dumps({
        "name": spec.name, "own": error(got, want), "reference": error(same, want), "fp32": error(wide, want),
        "dtypes": [str(g.dtype) for g in got] == [str(s.dtype) for s in same],
        "strides": [g.stride() for g in got] == [s.stride() for s in same],
    }))
"""


def test_import_needs_no_triton_and_no_torch_work() -> None:
    code = "import sys, wan.kernels as k; assert 'triton' not in sys.modules, 'eager'; assert k.available()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRET, "7"],
        env=env,
        check=True,
        timeout=300,
        capture_output=True,
        text=True,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row["name"]: row for row in rows}


def _names(*, lossy: bool) -> list[str]:
    from wan.kernels import KERNELS

    return [spec.name for spec in KERNELS if spec.lossy == lossy]


@pytest.mark.parametrize("name", _names(lossy=True))
def test_interpreter_gives_the_references_eight_bits(name: str, interpreted: dict[str, Any]) -> None:
    row = interpreted[name]
    assert row["dtypes"] and row["strides"], row
    share, worst = row["steps"]
    assert share < 1e-4, row  # values between two steps, where the last bit of fp32 decides
    assert worst <= 2**-3, row  # one step


@pytest.mark.parametrize("name", _names(lossy=False))
def test_interpreter_equals_the_fp64_reference(name: str, interpreted: dict[str, dict[str, float]]) -> None:
    row = interpreted[name]
    assert row["dtypes"] and row["strides"], row
    assert 0 < row["fp32"] < 1e-6, row
    # The interpreter cuts fp32 to bf16 instead of rounding, which doubles the error of a bf16 output; real
    # rounding is checked on a GPU (tests/gpu). An output that were wrong anywhere would be off by far more.
    assert 0 < row["own"] <= 2.1 * row["reference"], row


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiles_ahead_of_time(capability: int, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wan.kernels import KERNELS

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert {spec.floor for spec in KERNELS} == {80, 89}
    for spec in KERNELS:
        if spec.floor > capability:
            continue
        compiled = spec.compile(capability)
        cubin = compiled.asm["cubin"]
        assert cubin[:4] == b"\x7fELF", spec.name
        assert f".target sm_{capability}" in compiled.asm["ptx"], spec.name


def test_every_argument_is_described_once() -> None:
    from wan.kernels import KERNELS

    assert len({spec.name for spec in KERNELS}) == len(KERNELS)
    for spec in KERNELS:
        described = [*spec.signature, *spec.constexprs]
        assert sorted(described) == sorted(spec.fn.arg_names), spec.name


class TestReferences:
    """The references against torch's own operators and the formulas of the specification."""

    def test_layer_norm(self) -> None:
        x, w, b = torch.randn(2, 5, 48), torch.randn(48), torch.randn(48)
        want = torch.nn.functional.layer_norm(x, (48,), w, b, 1e-6)
        torch.testing.assert_close(reference.layer_norm(x, w, b), want, rtol=1e-5, atol=1e-6)

    def test_modulation_and_gate(self) -> None:
        x, y = torch.randn(2, 5, 48), torch.randn(2, 5, 48)
        scale, shift, gate = torch.randn(3, 2, 1, 48)
        plain = torch.nn.functional.layer_norm(x, (48,), eps=1e-6)
        torch.testing.assert_close(
            reference.layer_norm_modulate(x, scale, shift), plain * (1 + scale) + shift
        )
        torch.testing.assert_close(reference.gate_residual(x, y, gate), x + y * gate)
        out, normed = reference.gate_residual_norm(x, y, gate, scale, shift, modulate=True)
        torch.testing.assert_close(normed, reference.layer_norm_modulate(out, scale, shift))

    def test_rms_norm_and_rotation(self) -> None:
        x, w = torch.randn(1, 6, 4 * 8), torch.randn(32)
        angle = torch.randn(6, 4)
        normed = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w).double()
        turned = (
            torch.view_as_complex(normed.view(1, 6, 4, 4, 2)) * torch.exp(1j * angle.double())[None, :, None]
        )
        want = torch.view_as_real(turned).reshape(1, 6, 32).float()
        got = reference.rms_norm_rope(x, w, angle.cos(), angle.sin())
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

    def test_vae_norm(self) -> None:
        x, gamma = torch.randn(2, 6, 2, 3, 4), torch.randn(6, 1, 1, 1)
        want = torch.nn.functional.silu(torch.nn.functional.normalize(x, dim=1) * 6**0.5 * gamma)
        torch.testing.assert_close(reference.rms_norm_silu(x, gamma), want)


class TestLaunchErrors:
    """Bad shapes are refused before a pointer reaches a kernel."""

    def test_strided_channels(self) -> None:
        from wan.kernels import layer_norm

        with pytest.raises(ValueError, match="rows must be evenly spaced"):
            layer_norm(torch.randn(1, 48, 8).transpose(1, 2), torch.ones(48), torch.zeros(48))

    def test_wrong_table(self) -> None:
        from wan.kernels import rms_norm_rope

        with pytest.raises(ValueError, match=r"rope: .* wants cos and sin \[5, D/2\]"):
            rms_norm_rope(torch.randn(1, 5, 32), torch.ones(32), torch.ones(4, 4), torch.ones(4, 4))

    def test_wrong_vector(self) -> None:
        from wan.kernels import layer_norm_modulate

        with pytest.raises(ValueError, match="scale: expected 32 contiguous channels"):
            layer_norm_modulate(torch.randn(2, 5, 32), torch.ones(3, 1, 32), torch.ones(32))

    def test_mismatched_residual(self) -> None:
        from wan.kernels import gate_residual

        with pytest.raises(ValueError, match="differ"):
            gate_residual(torch.randn(1, 5, 32), torch.randn(1, 4, 32))
