"""On a GPU: the fp8 model by its kernels, and int8 attention, against the exact ones."""

from __future__ import annotations

import pytest
import torch
from capability import needs
from test_gpu import _exact, call, error, model  # noqa: F401 - the fixture

from wan.attention_backends import AttentionBackend
from wan.kernels.ops import FUSED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def test_the_fp8_model_by_its_kernels() -> None:
    from wan.quant import joined, speed_up

    needs((8, 9), "fp8 arithmetic")
    want = model(torch.bfloat16).use(ops=FUSED)(**call(torch.bfloat16))
    results = {}
    for fused in (False, True):
        m = model(torch.bfloat16).use(ops=FUSED)
        assert speed_up(m, fused=fused) == 10 * len(m.blocks)
        results[fused] = error(m(**call(torch.bfloat16)), want)
    attention = m.blocks[0].self_attn
    assert joined((attention.q, attention.k, attention.v)) is not None
    assert m.runtime.ops.name == "triton, fp8"
    assert 1e-3 < results[True] < 0.09
    assert results[True] < 1.2 * results[False]


@pytest.mark.parametrize(("name", "floor", "gate"), [("int8", (8, 0), 0.02), ("int8_fp8", (8, 9), 0.06)])
@pytest.mark.parametrize("rows", [1024, 1337, 4096])
def test_int8_attention_against_exact(name: str, floor: tuple[int, int], gate: float, rows: int) -> None:
    needs(floor, name)
    generator = torch.Generator("cuda").manual_seed(rows)
    joined = torch.randn(1, rows, 3 * 4 * 128, generator=generator, device="cuda").bfloat16()
    q, k, v = (t.unflatten(-1, (4, 128)) for t in joined.chunk(3, dim=-1))
    k = k + 3 * torch.randn(1, 1, 4, 128, generator=generator, device="cuda").bfloat16()
    wide = (t.double().transpose(1, 2) for t in (q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(*wide).transpose(1, 2)
    got = AttentionBackend(name=name)(q, k, v)
    assert got.dtype == q.dtype
    assert 1e-3 < error(got, want) < gate
