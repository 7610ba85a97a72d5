"""Quality `fast`: a small DiT with fp8 linears against the exact one; by PyTorch, by Triton."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import goldens
import pytest
import torch
from test_dit import inputs, tiny

from wan.quant import FULL_RATE, Fp8Rows, QuantError, QuantLinear, eager_rows, fp8_product, speed_up

FUSED = """
import json, sys, torch
sys.path[:0] = [sys.argv[1]]
import goldens
from test_dit import inputs, tiny
from test_exact_savings import THREE, passes
from wan.kernels.ops import FUSED
from wan.modules.multitalk_model import StepShare
from wan.quant import speed_up, joined

NAME = "dit_single_fp32"

def run(fused, fp8=True, **how):
    model = tiny(NAME).float().eval().requires_grad_(False)
    if fused:
        model.use(ops=FUSED)
    if fp8:
        speed_up(model, fused=fused, anywhere=True)
    with torch.no_grad():
        return model, model.use(**how)(**inputs(NAME))

def shared(name, **how):
    # whether a step that shares block 0 gives what its passes give alone; only one of them is silent
    m = tiny(name).float().eval().requires_grad_(False).use(ops=FUSED)
    speed_up(m, anywhere=True)
    m.use(**how)
    known, share = passes(m, name, keep=True), StepShare()
    with torch.no_grad():
        step = [m.predict(known["latents"], known["time"], known[t], known[a], share=share) for t, a in THREE]
        alone = [m.predict(known["latents"], known["time"], known[t], known[a]) for t, a in THREE]
    return all(torch.equal(a, b) for a, b in zip(step, alone, strict=True))

(_, exact), (_, eager), (model, fused) = run(True, fp8=False), run(False), run(True)
_, absorbed = run(True, absorb_audio=True)
attention = model.blocks[0].self_attn
print(json.dumps({
    "ops": model.runtime.ops.name, "joined": joined((attention.q, attention.k, attention.v)) is not None,
    "eager": goldens.rel_l2(eager, exact), "fused": goldens.rel_l2(fused, exact),
    "between": goldens.rel_l2(fused, eager), "absorbed": goldens.rel_l2(absorbed, exact),
    "same": torch.equal(absorbed, fused),
    "shared": [shared(NAME, absorb_silence=True), shared(NAME, absorb_audio=True),
               shared("dit_multi_fp32", absorb_silence=True)],
}))
"""


def fast(name: str) -> torch.nn.Module:
    model = tiny(name).eval().requires_grad_(False)
    speed_up(model, fused=False, anywhere=True)
    return model


def test_rows_times_rows() -> None:
    x, w, bias = torch.randn(2, 5, 32), torch.randn(48, 32), torch.randn(48)
    rows, (data, scale) = Fp8Rows(*eager_rows(x), dtype=x.dtype), eager_rows(w)
    want = (rows.data.float() * rows.scale) @ (data.float() * scale).T + bias
    got = fp8_product(rows, data, scale, bias)
    assert got.dtype == torch.float32
    assert goldens.rel_l2(got, want) < 4e-3  # the product comes out in bf16
    assert goldens.rel_l2(got, x @ w.T + bias) < 0.05


@pytest.mark.parametrize("name", ["dit_single_fp32", "dit_multi_fp32"])
def test_the_error_of_a_small_model(name: str, measured) -> None:
    with torch.no_grad():
        want = tiny(name).eval()(**inputs(name))
        got = fast(name)(**inputs(name))
    error = goldens.rel_l2(got, want)
    measured(name, "fp8 linears against exact", error, 0.08, metric="rel L2")
    assert error > 1e-4  # it is not the exact model


def test_only_what_sees_every_token_is_quantised() -> None:
    model = fast("dit_single_fp32")
    found = {name.partition(".")[2].partition(".")[2] for name, m in model.named_modules()
             if isinstance(m, QuantLinear)}  # fmt: skip
    assert found == set(FULL_RATE)
    assert all(m.matmul == "fp8" for m in model.modules() if isinstance(m, QuantLinear))


def test_a_cpu_is_refused() -> None:
    with pytest.raises(QuantError, match="no fp8 matrix units"):
        speed_up(tiny("dit_single_fp32"))


def test_the_fused_way_is_as_near(measured) -> None:
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    here = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", FUSED, here], env=env, check=True, timeout=300,
                          capture_output=True, text=True)  # fmt: skip
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["ops"] == "triton, fp8"
    assert row["joined"]
    measured("dit_single_fp32", "fp8 linears, fused, against exact", row["fused"], 0.08, metric="rel L2")
    assert row["fused"] < 1.2 * row["eager"], row
    assert row["between"] < row["eager"], row
    assert not row["same"]
    assert row["absorbed"] < row["fused"], "what absorbed projections read was not rounded"
    assert row["shared"] == [True, True, True]
