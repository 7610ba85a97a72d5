"""The choice of the attention kernel, and that all ways through it give the same numbers."""

from __future__ import annotations

from types import SimpleNamespace

import goldens
import pytest
import torch

from wan import attention_backends
from wan.attention_backends import AttentionBackend, AttentionBackendError
from wan.modules.attention import attention, flash_attention


def plain(q, k, v, scale=None):
    """softmax(q·kᵀ·scale)·v on [B, L, N, D] in fp64."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)).softmax(-1)
    return (weights @ v).transpose(1, 2)


def qkv(batch: int = 2, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    shapes = {"q": (batch, 7, 3, 8), "k": (batch, 11, 3, 8), "v": (batch, 11, 3, 8)}
    return [goldens.seeded.randn(f"attention.{n}", s).to(dtype) for n, s in shapes.items()]


def test_plain_and_scaled() -> None:
    q, k, v = qkv()
    assert goldens.error(AttentionBackend()(q, k, v), plain(q, k, v)) < 1e-6
    assert goldens.error(AttentionBackend()(q, k, v, scale=0.3), plain(q, k, v, 0.3)) < 1e-6


def test_differing_lengths() -> None:
    q, k, v = qkv()
    out = AttentionBackend()(q, k, v, q_lens=[7, 4], k_lens=torch.tensor([5, 11]))
    assert goldens.error(out[:1], plain(q[:1], k[:1, :5], v[:1, :5])) < 1e-6
    assert goldens.error(out[1:, :4], plain(q[1:, :4], k[1:], v[1:])) < 1e-6
    assert not out[1, 4:].any()
    with pytest.raises(ValueError, match="11 rows"):
        AttentionBackend()(q, k, v, k_lens=[12, 1])


def test_call_compatible_functions() -> None:
    q, k, v = qkv()
    for function in (flash_attention, attention):
        out = function(q, k, v, k_lens=torch.tensor([11, 6]))
        assert out.dtype == torch.float32
        assert goldens.rel_l2(out[1:], plain(q[1:], k[1:, :6], v[1:, :6])) < 0.01  # it computes in bf16
    assert flash_attention(*qkv(dtype=torch.float16)).dtype == torch.float16
    with pytest.raises(ValueError, match="inference"):
        flash_attention(q, k, v, dropout_p=0.1)


def test_what_is_missing_is_an_error() -> None:
    with pytest.raises(AttentionBackendError, match=r"unknown attention backend .x..*sdpa"):
        AttentionBackend(name="x")
    for name, module in (("flash_attn", "flash_attn"), ("sage", "sageattention"), ("xformers", "xformers")):
        try:
            __import__(module)
        except ImportError:
            with pytest.raises(AttentionBackendError, match="can't be imported"):
                AttentionBackend(name=name)
    with pytest.raises(AttentionBackendError, match="sliding window"):
        AttentionBackend()(*qkv(), window=(4, 4))


def test_fp8_is_asked_for_by_name_and_has_no_stand_in() -> None:
    backend = AttentionBackend(name="fp8")
    q, k, v = qkv()
    assert torch.equal(backend(q, k, v), AttentionBackend()(q, k, v))  # few keys: nothing to gain
    many = torch.zeros(1, 1024, 1, 64, dtype=torch.bfloat16)
    with pytest.raises(AttentionBackendError, match=r"'fp8' needs bf16 on a GPU of compute capability 9\.0"):
        backend(many, many, many)
    assert backend.describe(q)["lossy"]


def test_a_kernel_that_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_backends, "_cudnn", lambda: 91500)
    with pytest.raises(AttentionBackendError, match="wrong results"):
        AttentionBackend(name="cudnn")(*qkv(dtype=torch.bfloat16))
    monkeypatch.setattr(attention_backends, "_cudnn", lambda: 91900)
    with pytest.raises(AttentionBackendError, match="means kernel 'cudnn', which refuses"):
        AttentionBackend(name="cudnn")(*qkv(dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("capability", "cudnn", "dtype", "head_dim", "kernel"),
    [
        ((9, 0), 91501, torch.bfloat16, 128, "cudnn"),
        ((9, 0), 91500, torch.bfloat16, 128, "flash"),
        ((9, 0), 0, torch.bfloat16, 128, "flash"),
        ((9, 0), 91900, torch.bfloat16, 12, "flash"),
        ((9, 0), 91900, torch.float32, 128, "efficient"),
        ((8, 9), 91900, torch.bfloat16, 128, "flash"),
        ((7, 5), 91900, torch.float16, 128, "efficient"),
        ((8, 0), 91900, torch.bfloat16, 384, "efficient"),
    ],
)
def test_rule_of_the_default(capability, cudnn, dtype, head_dim, kernel, monkeypatch) -> None:
    monkeypatch.setattr(attention_backends.flash3, "find", lambda: (None, {"fa3_fwd_interface": "absent"}))
    monkeypatch.setattr(attention_backends, "_capability", lambda _: capability)
    monkeypatch.setattr(attention_backends, "_cudnn", lambda: cudnn)
    q = SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, shape=(1, 100, 40, head_dim))
    backend = AttentionBackend()
    assert backend.kernel_for(q) == kernel
    report = backend.describe(q)
    assert (report["backend"], report["kernel"], report["lossy"]) == ("auto", kernel, False)
    assert AttentionBackend(name="sdpa").kernel_for(q) == kernel
    assert AttentionBackend(name="flash").kernel_for(q) == "flash"


def test_values_of_another_width_than_keys(monkeypatch) -> None:
    monkeypatch.setattr(attention_backends, "_capability", lambda _: (9, 0))
    monkeypatch.setattr(attention_backends.flash3, "find", lambda: (object(), {}))
    q = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=(1, 9, 4, 128))
    assert AttentionBackend().kernel_for(q, v_dim=8) == "efficient"
