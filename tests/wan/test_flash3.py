"""flash-attn 3: where it is found, when `auto` takes it, and what its fp8 form rounds. Its own numbers need
Hopper: tests/gpu/test_fast_gpu.py.
"""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from wan import attention_backends, flash3
from wan.attention_backends import AttentionBackend, AttentionBackendError


def exact(q, k, v, softmax_scale=None, causal=False, q_descale=None, k_descale=None, v_descale=None):
    """What flash-attn 3 promises, in fp32: (out, log-sum-exp)."""
    pairs = ((q, q_descale), (k, k_descale), (v, v_descale))
    q, k, v = (t.float() if s is None else t.float() * s[:, None, :, None] for t, s in pairs)
    scores = torch.einsum("blnd,bmnd->bnlm", q, k) * (softmax_scale or q.shape[-1] ** -0.5)
    out = torch.einsum("bnlm,bmnd->blnd", scores.softmax(-1), v)
    return out.bfloat16(), scores.logsumexp(-1)


@pytest.fixture
def found(monkeypatch):
    """A stand-in for each module that carries flash-attn 3; `found(name)` lets it be imported."""

    def install(name: str) -> flash3.Flash3 | None:
        if name in flash3.PACKAGES:
            module = ModuleType(name)
            module.flash_attn_func = exact
            monkeypatch.setitem(sys.modules, name, module)
        elif name:
            for part in ("xformers", "xformers.ops", "xformers.ops.fmha"):
                monkeypatch.setitem(sys.modules, part, ModuleType(part))
            fmha = sys.modules["xformers.ops.fmha"]
            fmha.memory_efficient_attention_forward = lambda q, k, v, attn_bias, scale, op: exact(
                q, k, v, scale
            )[0]
            module = ModuleType(name)
            module.FwOp = SimpleNamespace(is_available=lambda: True)
            monkeypatch.setitem(sys.modules, name, module)
        flash3.find.cache_clear()
        return flash3.find()[0]

    yield install
    monkeypatch.undo()
    flash3.find.cache_clear()


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(attention_backends, "_capability", lambda _: (9, 0))
    monkeypatch.setattr(attention_backends, "_cudnn", lambda: 91900)

    def query(dtype=torch.bfloat16, dim=128):
        return SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, shape=(1, 4096, 2, dim))

    return query


def qkv(tokens: int = 1100, dim: int = 64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, tokens, 2, dim, generator=generator) for _ in range(3))
    k = k + 8 * torch.randn(1, 1, 2, dim, generator=generator)  # as real keys: channels far from zero
    return tuple(t.bfloat16() for t in (q, k, v))


@pytest.mark.parametrize("name", [*flash3.PACKAGES, flash3.XFORMERS])
def test_each_source_is_found_used_and_named(name: str, found, hopper) -> None:
    forward = found(name)
    assert forward is not None and forward.source == name
    q, k, v = qkv()
    got = forward(q, k, v, scale=None, causal=False)
    assert torch.equal(got, exact(q, k, v)[0])
    backend = AttentionBackend()
    assert backend.kernel_for(hopper()) == "flash_attn_3"
    assert backend.describe(hopper())["flash_attn_3"] == name
    assert backend.describe(hopper())["module"] == name
    assert not backend.describe(hopper())["lossy"]
    assert AttentionBackend(name="sdpa").kernel_for(hopper()) == "cudnn"
    for other in (hopper(torch.float16), hopper(torch.float32), hopper(dim=264), hopper(dim=96)):
        assert backend.kernel_for(other) != "flash_attn_3"


def test_without_it_the_reason_is_reported(found, hopper) -> None:
    assert found("") is None
    assert AttentionBackend().kernel_for(hopper()) == "cudnn"
    told = AttentionBackend().describe(hopper())["flash_attn_3"]
    assert all(name in told for name in (*flash3.PACKAGES, flash3.XFORMERS))
    assert AttentionBackend().module_for(hopper()) == "torch"
    assert AttentionBackend(name="sdpa").describe(hopper())["flash_attn_3"] is None


def test_a_library_that_does_not_load_is_absent_with_its_words(found, monkeypatch) -> None:
    class Broken:
        def __getattr__(self, name):
            msg = "libcudart.so.12: cannot open shared object file"
            raise OSError(msg)

    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", Broken())
    assert found("") is None
    assert "libcudart.so.12" in flash3.find()[1]["fa3_fwd_interface"]


def test_another_gpu_takes_what_sdpa_says(found, hopper, monkeypatch) -> None:
    found("fa3_fwd_interface")
    for capability in ((8, 0), (8, 9), (10, 0), (12, 0)):
        monkeypatch.setattr(attention_backends, "_capability", lambda _, c=capability: c)
        assert AttentionBackend().kernel_for(hopper()) == "flash"


def test_by_name_it_runs_where_it_can_and_nowhere_else(found, hopper, monkeypatch) -> None:
    """On another GPU fa3-fwd's launch would end the process; it has no windows, fp16 or odd widths."""
    found("fa3_fwd_interface")
    attention_backends._package_kernel.cache_clear()
    q, k, v = qkv(tokens=8)
    backend = AttentionBackend(name="flash_attn")
    takes = [True]
    monkeypatch.setattr(attention_backends, "flash3_takes", lambda _: takes[0])
    assert torch.equal(backend(q, k, v), exact(q, k, v)[0])
    for window, able in (((4, 4), True), ((-1, -1), False)):
        takes[0] = able
        with pytest.raises(AttentionBackendError, match="flash_attn can't be imported"):
            backend(q, k, v, window=window)
    attention_backends._package_kernel.cache_clear()


def test_a_causal_mask_is_aligned_the_same_everywhere(found, hopper, monkeypatch) -> None:
    found("fa3_fwd_interface")
    q, k, v = qkv(tokens=8)
    want = AttentionBackend(name="sdpa")(q[:, :3], k, v, causal=True)
    monkeypatch.setattr(
        AttentionBackend, "kernel_for", lambda self, *_: {"sdpa": "cpu"}.get(self.name, "flash_attn_3")
    )
    assert torch.equal(AttentionBackend()(q[:, :3], k, v, causal=True), want)


def test_fp8_rounds_with_one_scale_a_head(found) -> None:
    forward = found("fa3_fwd_interface")
    q, k, v = qkv()
    want = exact(*(t.double() for t in (q, k, v)))[0].float()

    def error(got: torch.Tensor) -> float:
        return float((got.float() - want).norm() / want.norm())

    rounded = error(forward.fp8(q, k, v, scale=None, causal=False))
    assert 0.01 < rounded < 0.05
    (q8, a), (k8, b), (v8, c) = (flash3.by_heads(t) for t in (q, k, v))  # keys with their mean
    assert error(exact(q8, k8, v8, q_descale=a, k_descale=b, v_descale=c)[0]) > 2 * rounded


@pytest.mark.parametrize("size", [1e-20, 1e-3, 1.0, 1e3, 1e20])
def test_steps_keep_every_size_and_never_overflow(size: float) -> None:
    x = torch.randn(2, 50, 3, 16, generator=torch.Generator().manual_seed(1)).bfloat16() * size
    x[:, :, 1] = 0
    data, step = flash3.by_heads(x)
    assert data.dtype == torch.float8_e4m3fn and step.shape == (2, 3)
    back = data.float() * step[:, None, :, None]
    assert torch.isfinite(back).all() and not back[:, :, 1].any()
    assert (back - x).double().norm() / x.double().norm() < 0.03
    largest = data.float().abs().amax(dim=(1, 3))
    assert torch.equal(largest, torch.tensor([448.0, 0.0, 448.0]).expand(2, 3))


def test_keys_far_from_zero_lose_their_mean_alone() -> None:
    x = torch.randn(1, 301, 2, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    far = (x + 100 * torch.randn(1, 1, 2, 64, generator=torch.Generator().manual_seed(3))).bfloat16()
    data, step = flash3.by_heads(far, centre=True)
    want = far.double() - far.double().mean(1, keepdim=True)
    back = data.double() * step[:, None, :, None].double()
    assert (back - want).norm() / want.norm() < 0.03


def test_what_rounds_is_loaded_when_first_used() -> None:
    code = """
import sys, torch
from wan import flash3
def loaded():
    return [n for n in ("wan.quant", "wan.kernels.fp8", "wan.kernels.reference_lossy") if n in sys.modules]
assert not loaded(), loaded()
flash3.by_heads(torch.ones(1, 3, 2, 16).bfloat16())
assert "wan.kernels.reference_lossy" in loaded() and "triton" not in sys.modules, loaded()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_fp8_says_what_it_lacks(found, hopper, monkeypatch) -> None:
    many = torch.zeros(1, 1024, 1, 64, dtype=torch.bfloat16)
    monkeypatch.setattr(attention_backends, "flash3_takes", lambda _: True)
    found("")
    with pytest.raises(AttentionBackendError, match="there is none"):
        AttentionBackend(name="fp8")(many, many, many)
    found(flash3.XFORMERS)
    with pytest.raises(AttentionBackendError, match=r"for bf16 alone.*fa3-fwd"):
        AttentionBackend(name="fp8")(many, many, many)
    found("fa3_fwd_interface")
    assert AttentionBackend(name="fp8")(many, many, many).shape == many.shape
