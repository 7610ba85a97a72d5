"""On a GPU: kernels against fp64, the fused DiT against fp32, offload on streams, fp8 products, attention by
name.
"""

from __future__ import annotations

import pytest
import torch
from capability import needs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

CONFIG = {
    "in_dim": 36,
    "dim": 256,
    "ffn_dim": 512,
    "num_heads": 2,
    "num_layers": 6,
    "text_dim": 64,
    "text_len": 16,
    "context_tokens": 8,
    "intermediate_dim": 16,
}


@pytest.fixture(autouse=True)
def _exact():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with torch.inference_mode():
        yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def tuples(value) -> tuple[torch.Tensor, ...]:
    return (value,) if isinstance(value, torch.Tensor) else tuple(value)


def kernel_names() -> list[str]:
    pytest.importorskip("triton")
    from wan.kernels import KERNELS

    return [spec.name for spec in KERNELS]


@pytest.mark.parametrize("name", kernel_names())
@pytest.mark.parametrize("seed", [0, 1])
def test_kernel_against_fp64(name: str, seed: int) -> None:
    from wan.kernels import KERNELS

    spec = next(s for s in KERNELS if s.name == name)
    args, kwargs = spec.example("cuda", torch.Generator("cuda").manual_seed(seed))
    if spec.lossy:
        needs(divmod(spec.floor, 10), spec.name)
        same = tuples(spec.reference(*args, **kwargs))
        for g, s in zip(tuples(spec.launch(*args, **kwargs)), same, strict=True):
            assert g.dtype == s.dtype
            off = (g.float() - s.float()).abs() / s.float().abs().max()
            assert off.max() <= 2**-3  # a step of fp8, the output's own rounding
            assert (off > 2**-7).float().mean() < 0.01
        return
    wide = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    want, same = tuples(spec.reference(*wide, **kwargs)), tuples(spec.reference(*args, **kwargs))
    for g, s, w in zip(tuples(spec.launch(*args, **kwargs)), same, want, strict=True):
        gate = 1e-6 if g.dtype == torch.float32 else 1.02 * error(s, w)
        assert 0 < error(g, w) <= gate


def model(dtype: torch.dtype, seed: int = 0):
    from wan.modules.multitalk_model import WanModel

    torch.manual_seed(seed)
    return WanModel(**CONFIG).to("cuda", dtype).eval().requires_grad_(False)


def call(dtype: torch.dtype, people: int = 1) -> dict:
    g = torch.Generator("cuda").manual_seed(1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device="cuda").bfloat16().to(dtype)

    masks = torch.zeros(3, 16, 16, device="cuda")
    masks[0, :, :6], masks[1, :, 10:], masks[2, :, 6:10] = 1, 1, 1
    return {
        "x": [randn(16, 3, 16, 16)],
        "t": torch.tensor([700.0], device="cuda"),
        "context": [randn(9, 64)],
        "seq_len": 192,
        "clip_fea": randn(1, 257, 1280),
        "y": randn(1, 20, 3, 16, 16),
        "audio": randn(people, 9, 5, 12, 768),
        "ref_target_masks": masks,
    }


@pytest.mark.parametrize("absorb", [False, True])
def test_fused_dit_is_no_further_from_fp32_than_the_eager_one(absorb: bool) -> None:
    from wan.fuse import join_qkv
    from wan.kernels import FUSED

    own = model(torch.bfloat16)
    wide = model(torch.float32)
    wide.load_state_dict(own.state_dict())
    want = wide(**call(torch.float32))
    eager = error(own(**call(torch.bfloat16)), want)
    join_qkv(own)
    fused = error(own.use(ops=FUSED, absorb_audio=absorb)(**call(torch.bfloat16)), want)
    assert 0 < fused <= 1.1 * eager, (fused, eager)


@pytest.mark.parametrize("people", [1, 2])
def test_fused_fp32_equals_eager_fp32(people: int) -> None:
    from wan.kernels import FUSED

    m = model(torch.float32)
    want = m(**call(torch.float32, people))
    assert error(m.use(ops=FUSED)(**call(torch.float32, people)), want) < 2e-5


@pytest.mark.parametrize("persistent", [0, 3_000_000])
def test_offload_equals_resident(persistent: int) -> None:
    from wan.offload import offload

    m = model(torch.bfloat16)
    want = m(**call(torch.bfloat16))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    m.cpu()
    offloader = offload(m, "cuda", persistent_parameters=persistent)
    for _ in range(5):
        assert torch.equal(m(**call(torch.bfloat16)), want)
    assert offloader.fetched_late == 1
    assert all(b.arena.is_pinned() for b in offloader.blocks)
    del want
    assert torch.cuda.memory_allocated() < before


def test_fp8_products_are_near_the_restored_weights() -> None:
    from wan.quant import quantize, use_fp8_matmul

    needs((8, 9), "fp8 arithmetic")
    m = model(torch.bfloat16)
    want = m(**call(torch.bfloat16))
    quantize(m, "fp8")
    restored = error(m(**call(torch.bfloat16)), want)
    assert use_fp8_matmul(m) == sum(1 for _ in m.blocks) * 15
    multiplied = error(m(**call(torch.bfloat16)), want)
    assert restored < 0.06
    assert restored < multiplied < 0.09


@pytest.mark.parametrize("name", ["flash", "efficient", "math"])
def test_attention_by_name_agrees(name: str) -> None:
    from wan.attention_backends import AttentionBackend

    q, k, v = (torch.randn(1, 300, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    want = AttentionBackend(name="math")(*(t.double() for t in (q, k, v)))
    assert error(AttentionBackend(name=name)(q, k, v), want) < 6e-3


def test_sdpa_reports_what_runs() -> None:
    from wan.attention_backends import CUDNN_FLOOR, AttentionBackend

    q, k, v = (torch.randn(1, 300, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    told = AttentionBackend(name="sdpa").describe(q)
    hopper, cudnn = torch.cuda.get_device_capability() == (9, 0), torch.backends.cudnn.version() or 0
    assert told["kernel"] == ("cudnn" if hopper and cudnn >= CUDNN_FLOOR else "flash")
    want = AttentionBackend(name="math")(*(t.double() for t in (q, k, v)))
    assert error(AttentionBackend(name="sdpa")(q, k, v), want) < 6e-3


def test_frames_reach_the_host_whole_while_the_gpu_goes_on() -> None:
    """Each piece is read when its own copy is done, with work queued behind it that changes its source."""
    from wan.frames import on_host

    source = torch.empty(3, 4, 1024, 1024, device="cuda")
    seen = []

    def pieces():
        for number in range(5):
            source.fill_(number)
            yield source
            source.mul_(-1)  # queued behind the copy, on the same stream

    for frames in on_host(pieces()):
        assert frames.device.type == "cpu"
        assert frames.is_pinned()
        seen.append((frames.min().item(), frames.max().item()))
    assert seen == [(float(n), float(n)) for n in range(5)]
