"""What the exact tier leaves out must not change the numbers: kept K/V, shared layer 0, joined and absorbed
products.
"""

from __future__ import annotations

import copy
import weakref

import goldens
import pytest
import torch

from wan.fuse import join_qkv, joined
from wan.kernels.ops import ffn
from wan.modules.attention import SingleStreamMutiAttention
from wan.modules.multitalk_model import StepShare, WanModel
from wan.quant import quantize

FP32 = 2e-5


def model(name: str) -> WanModel:
    return goldens.fill(WanModel(**goldens.config(name)), name)


def passes(m: WanModel, name: str, *, keep: bool) -> dict[str, object]:
    """Embedded conditions of a fixture: latents with y, time, text, audio and silence."""
    z, extra = goldens.load(name), goldens.regenerate(name)
    audio = extra["audio"]
    context = extra["context"] if "context" in extra else z["context"]
    return {
        "latents": torch.cat((z["x"], z["y"][0]))[None],
        "time": m.embed_time(z["t"]),
        "text": m.embed_text([context], extra["clip_fea"], keep=keep),
        "audio": m.embed_audio(audio, z["ref_target_masks"], keep=keep),
        "silence": m.embed_audio(torch.zeros_like(audio)[-1:], keep=keep),
    }


@pytest.mark.parametrize("name", ["dit_single_fp32", "dit_multi_fp32"])
def test_shared_layer_0_and_kept_keys_change_nothing(name: str) -> None:
    m = model(name)
    plain, kept = passes(m, name, keep=False), passes(m, name, keep=True)
    for _ in range(2):  # the second step reads what the first has kept
        share = StepShare()
        attention = m.blocks[0].self_attn
        calls: list[int] = []
        hook = attention.o.register_forward_hook(lambda *_, seen=calls: seen.append(1))
        for which in ("audio", "audio", "silence"):
            got = m.predict(kept["latents"], kept["time"], kept["text"], kept[which], share=share)
            computed = len(calls)
            want = m.predict(plain["latents"], plain["time"], plain["text"], plain[which])
            assert torch.equal(got, want)
            del calls[computed:]
        hook.remove()
        assert len(calls) == 1, "three passes, one self-attention in block 0"


def test_silence_first_then_speakers_recomputes_the_positions() -> None:
    name = "dit_multi_fp32"
    m = model(name)
    c, share = passes(m, name, keep=False), StepShare()
    for which in ("silence", "audio", "audio"):
        got = m.predict(c["latents"], c["time"], c["text"], c[which], share=share)
        assert torch.equal(got, m.predict(c["latents"], c["time"], c["text"], c[which]))


def test_absorbed_audio_is_the_same_function(measured) -> None:
    name = "dit_single_fp32"
    m = model(name)
    c = passes(m, name, keep=True)
    want = goldens.load(name)["out"]
    got = m.use(absorb_audio=True).predict(c["latents"], c["time"], c["text"], c["audio"])
    assert not torch.equal(
        got, m.use(absorb_audio=False).predict(c["latents"], c["time"], c["text"], c["audio"])
    )
    measured(name, "output with absorbed audio projections", goldens.error(got[0], want), FP32)
    again = m.use(absorb_audio=True).predict(c["latents"], c["time"], c["text"], c["audio"])
    assert torch.equal(got, again)


def test_absorbed_audio_in_bf16_is_as_near_to_fp64_as_the_reference_order() -> None:
    """Real number of heads, so that a bias spread over them in bf16 would fail here (error × 3)."""
    torch.manual_seed(0)
    attention = SingleStreamMutiAttention(1280, 96, 40, True, False, None)
    for name, p in attention.named_parameters():
        p.data.normal_(0, 0.02 if name.endswith("bias") else p.shape[1] ** -0.5)
    own = attention.bfloat16()
    wide = copy.deepcopy(own).double()
    x, audio = torch.randn(1, 3 * 64, 1280).bfloat16(), torch.randn(1, 3, 32, 96).bfloat16()
    want = wide(x.double(), audio.double(), human_num=1)
    plain = goldens.rel_l2(own(x, audio, human_num=1), want)
    absorbed = own.attend_absorbed(x, *own.absorb(*own.keys_values(audio)))
    assert 0 < goldens.rel_l2(absorbed, want) <= 1.5 * plain


def test_absorption_does_not_touch_two_speakers() -> None:
    name = "dit_multi_fp32"
    m = model(name)
    c = passes(m, name, keep=False)
    want = m.predict(c["latents"], c["time"], c["text"], c["audio"])
    assert torch.equal(m.use(absorb_audio=True).predict(c["latents"], c["time"], c["text"], c["audio"]), want)


def test_joined_qkv(measured) -> None:
    name = "dit_single_fp32"
    m = model(name)
    keys = set(m.state_dict())
    assert join_qkv(m) == len(m.blocks)
    assert set(m.state_dict()) == keys
    c = passes(m, name, keep=False)
    run = lambda: m.predict(c["latents"], c["time"], c["text"], c["audio"])  # noqa: E731
    measured(name, "output with joined q, k, v", goldens.error(run()[0], goldens.load(name)["out"]), FP32)
    attention = m.blocks[0].self_attn
    linears = (attention.q, attention.k, attention.v)
    before, (weight, bias) = run(), joined(linears)
    assert torch.equal(weight, torch.cat([linear.weight for linear in linears]))
    assert torch.equal(bias, torch.cat([linear.bias for linear in linears]))
    attention.q.weight.data += 0.1  # what a LoRA merge does: the joined matrix must follow
    changed = run()
    assert not torch.allclose(changed, before)
    attention.q.weight.data = (
        attention.q.weight.data.clone()
    )  # what moving a model does: no longer side by side
    assert joined(linears) is None
    torch.testing.assert_close(run(), changed, rtol=1e-5, atol=1e-5)


def test_joining_holds_no_memory_of_its_own() -> None:
    m = model("dit_single_fp32")
    join_qkv(m)
    linears = [getattr(m.blocks[0].self_attn, n) for n in "qkv"]
    memory = weakref.ref(linears[0].weight.untyped_storage())
    assert memory() is not None
    m.double()  # moves every parameter, as .to("cpu") or an offload does
    assert memory() is None
    assert joined(linears) is None


def test_quantised_linears_stay_apart() -> None:
    m = model("dit_single_fp32")
    quantize(m, "int8")
    assert join_qkv(m) == 0
    assert joined([getattr(m.blocks[0].self_attn, n) for n in "qkv"]) is None


def test_gelu_epilogue_leaves_a_cpu_alone() -> None:
    layers = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.GELU(approximate="tanh"), torch.nn.Linear(8, 4)
    )
    x = torch.randn(1, 3, 4)
    assert torch.equal(ffn(layers, x), layers(x))
