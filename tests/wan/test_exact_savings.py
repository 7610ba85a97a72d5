"""What the exact tier leaves out must not change the numbers: kept K/V, shared layer 0, joined products."""

from __future__ import annotations

import weakref

import goldens
import pytest
import torch

from wan.fuse import join_qkv, joined
from wan.kernels.ops import ffn
from wan.modules.layers import TextCondition
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
        "negative": m.embed_text([context[:3] * 0.5], extra["clip_fea"], keep=keep),
        "audio": m.embed_audio(audio, z["ref_target_masks"], keep=keep),
        "silence": m.embed_audio(torch.zeros_like(audio)[-1:], keep=keep),
    }


THREE = (("text", "audio"), ("negative", "audio"), ("negative", "silence"))


def count(module: torch.nn.Module, seen: list[str], name: str) -> torch.utils.hooks.RemovableHandle:
    return module.register_forward_hook(lambda *_: seen.append(name))


@pytest.mark.parametrize("absorb", ["", "silence", "all"])
@pytest.mark.parametrize("name", ["dit_single_fp32", "dit_multi_fp32"])
def test_shared_layer_0_and_kept_keys_change_nothing(name: str, absorb: str) -> None:
    m = model(name).use(absorb_audio=absorb == "all", absorb_silence=absorb == "silence")
    plain, kept = passes(m, name, keep=False), passes(m, name, keep=True)
    for _ in range(2):  # the second step reads what the first has kept
        share, calls = StepShare(), []
        block = m.blocks[0]
        hooks = [count(block.self_attn.o, calls, "self")]
        hooks += [count(getattr(block.cross_attn, n), calls, f"cross {n}") for n in "qo"]
        wanted, got = [], []
        for text, audio in THREE:
            got.append(m.predict(kept["latents"], kept["time"], kept[text], kept[audio], share=share))
        computed = list(calls)
        for text, audio in THREE:
            wanted.append(m.predict(plain["latents"], plain["time"], plain[text], plain[audio]))
        for hook in hooks:
            hook.remove()
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        assert not torch.equal(got[0], got[1])
        assert not torch.equal(got[1], got[2])
        assert sorted(computed) == ["cross o", "cross o", "cross q", "self"], "one of each but two texts"


def test_another_image_is_another_image() -> None:
    """Passes of one step may differ in their image too: then only the query of block 0 is common."""
    name = "dit_single_fp32"
    m = model(name)
    c = passes(m, name, keep=True)
    other = m.embed_text([goldens.load(name)["context"]], goldens.regenerate(name)["clip_fea"] * 0.5)
    unknown = TextCondition(tokens=c["text"].tokens, image=other.image)
    share = StepShare()
    for text in (c["text"], other, c["negative"], unknown, c["text"]):
        got = m.predict(c["latents"], c["time"], text, c["audio"], share=share)
        assert torch.equal(got, m.predict(c["latents"], c["time"], text, c["audio"]))


def test_silence_first_then_speakers_recomputes_the_positions() -> None:
    name = "dit_multi_fp32"
    m = model(name)
    c, share = passes(m, name, keep=False), StepShare()
    for which in ("silence", "audio", "audio"):
        got = m.predict(c["latents"], c["time"], c["text"], c[which], share=share)
        assert torch.equal(got, m.predict(c["latents"], c["time"], c["text"], c[which]))


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
