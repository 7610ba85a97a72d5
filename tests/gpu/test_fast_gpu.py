"""On a GPU: the fp8 model by its kernels, and flash-attn 3, in bf16 and fp8, against exact attention."""

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
    absorbed = error(m.use(absorb_audio=True)(**call(torch.bfloat16)), want)
    assert 1e-3 < absorbed < 1.02 * results[True]  # fewer linears round
    attention = m.blocks[0].self_attn
    assert joined((attention.q, attention.k, attention.v)) is not None
    assert m.runtime.ops.name == "triton, fp8"
    assert 1e-3 < results[True] < 0.09
    assert results[True] < 1.2 * results[False]


def flash3(*, fp8: bool) -> None:
    from wan.flash3 import find

    needs((9, 0), "flash-attn 3")
    found, absent = find()
    if found is None or (fp8 and not found.descales):
        # needed: only some images hold it; what `auto` is without it is tested in tests/wan/test_flash3.py
        pytest.skip(f"no flash-attn 3{' for fp8' if fp8 else ''} here: {absent}")


@pytest.mark.parametrize(("name", "gate"), [("auto", 4e-3), ("fp8", 0.07)])
@pytest.mark.parametrize("rows", [1024, 1337, 4096])
def test_flash_attn_3_against_exact(name: str, gate: float, rows: int) -> None:
    flash3(fp8=name == "fp8")
    generator = torch.Generator("cuda").manual_seed(rows)
    joined = torch.randn(1, rows, 3 * 4 * 128, generator=generator, device="cuda").bfloat16()
    q, k, v = (t.unflatten(-1, (4, 128)) for t in joined.chunk(3, dim=-1))
    k = k + 3 * torch.randn(1, 1, 4, 128, generator=generator, device="cuda").bfloat16()
    wide = (t.double().transpose(1, 2) for t in (q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(*wide).transpose(1, 2)
    backend = AttentionBackend(name=name)
    assert backend.kernel_for(q) == {"auto": "flash_attn_3"}.get(name, name)
    got = backend(q, k, v)
    assert got.dtype == q.dtype
    assert 1e-4 < error(got, want) < gate


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("rows", [1, 1337, 33_600])
def test_heads_by_their_kernels(centre: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from wan import flash3
    from wan.kernels import fp8, reference_lossy

    needs((8, 9), "fp8 arithmetic")
    generator = torch.Generator("cuda").manual_seed(rows)
    joined = torch.randn(1, rows, 3 * 40 * 128, generator=generator, device="cuda").bfloat16()
    for part in joined.chunk(3, dim=-1):
        x = part.unflatten(-1, (40, 128))
        assert flash3._kernels("cuda") is fp8
        data, step = flash3.by_heads(x, centre=centre)
        with monkeypatch.context() as patch:
            patch.setattr(flash3, "_kernels", lambda _: reference_lossy)
            same, other = flash3.by_heads(x, centre=centre)
        assert data.is_contiguous() and data.dtype == same.dtype == torch.float8_e4m3fn
        torch.testing.assert_close(step, other, rtol=1e-5, atol=1e-30)
        # means differ in the order of their sums, and so may values next to the middle of two steps
        assert (data.float() != same.float()).float().mean() <= (1e-3 if centre else 0.0)
        back = data.float() * step[:, None, :, None]
        want = same.float() * other[:, None, :, None]
        assert (back - want).norm() <= 1e-3 * want.norm()  # one token less its mean is zero: so is both
