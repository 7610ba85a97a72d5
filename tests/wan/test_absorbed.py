"""Audio projections multiplied into keys and values: the same function, for speech and for silence."""

from __future__ import annotations

import copy
import math

import goldens
import pytest
import torch

from wan.modules.attention import SingleStreamMutiAttention
from wan.modules.multitalk_model import WanModel
from wan.quant import quantize

NAME = "dit_single_fp32"
FP32 = 2e-5


def call(m: WanModel, name: str = NAME, *, silent: bool = False) -> dict[str, object]:
    z, extra = goldens.load(name), goldens.regenerate(name)
    audio = torch.zeros_like(extra["audio"])[-1:] if silent else extra["audio"]
    context = extra["context"] if "context" in extra else z["context"]
    rest = {"clip_fea": extra["clip_fea"], "y": z["y"], "ref_target_masks": z["ref_target_masks"]}
    return {"x": [z["x"]], "t": z["t"], "context": [context], "seq_len": 10**6, "audio": audio, **rest}


def model(name: str = NAME) -> WanModel:
    return goldens.fill(WanModel(**goldens.config(name)), name)


def test_it_is_the_same_function(measured) -> None:
    m, want = model(), goldens.load(NAME)["out"]
    plain = m(**call(m))
    got = m.use(absorb_audio=True)(**call(m))
    assert not torch.equal(got, plain)
    measured(NAME, "output with absorbed audio projections", goldens.error(got[0], want), FP32)
    assert torch.equal(m(**call(m)), got)
    assert torch.equal(m.use(absorb_audio=False, absorb_silence=True)(**call(m)), plain), (
        "speech is not silence"
    )


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_of_quantised_weights_it_is_the_same_function(kind: str, measured) -> None:
    """Of the weights as they were rounded: nothing else is lost."""
    m = model()
    quantize(m, kind)
    plain = m(**call(m))
    got = m.use(absorb_audio=True)(**call(m))
    assert not torch.equal(got, plain)
    measured(NAME, f"absorbed audio projections of {kind} weights", goldens.error(got, plain), FP32)


@pytest.mark.parametrize("name", [NAME, "dit_multi_fp32"])
def test_silence_from_two_frames_is_the_same_function(name: str, measured) -> None:
    """One silent person stands for everybody, so two speakers gain too."""
    m = model(name)
    plain = m(**call(m, name, silent=True))
    got = m.use(absorb_silence=True)(**call(m, name, silent=True))
    assert not torch.equal(got, plain)
    measured(name, "silence with absorbed audio projections", goldens.error(got, plain), FP32)
    assert torch.equal(m.use(absorb_audio=True)(**call(m, name, silent=True)), got)


def test_silence_is_seen_and_kept_small() -> None:
    m = model().use(absorb_silence=True)
    audio = goldens.regenerate(NAME)["audio"]
    silence = m.embed_audio(torch.zeros_like(audio), keep=True)
    assert silence.still
    assert torch.equal(silence.tokens[:, 1:-1], silence.tokens[:, 2:])
    assert not torch.equal(silence.tokens[:, 0], silence.tokens[:, 1])
    assert not m.embed_audio(audio).still
    late = torch.zeros_like(audio)
    late[:, -1] += 0.1
    assert not m.embed_audio(late).still


def test_two_speakers_are_left_alone() -> None:
    name = "dit_multi_fp32"
    m = model(name)
    want = m(**call(m, name))
    assert torch.equal(m.use(absorb_audio=True, absorb_silence=True)(**call(m, name)), want)


@pytest.mark.parametrize(("common", "gate"), [(0.0, 1.3), (1.0, 1.0)])
def test_error_of_the_attention_alone(common: float, gate: float) -> None:
    """Against fp64, at the real number of heads, so that what is spread over them in bf16 would fail here.

    `common` is a part that all tokens of a frame share: no weight depends on it, so it should cost nothing.
    The rest of the error is that of scores in bf16, which the reference's kernel keeps in fp32.
    """
    torch.manual_seed(0)
    attention = SingleStreamMutiAttention(1280, 96, 40, True, False, None)
    for name, p in attention.named_parameters():
        p.data.normal_(0, 0.02 if name.endswith("bias") else p.shape[1] ** -0.5)
    own = attention.bfloat16()
    wide = copy.deepcopy(own).double()
    x, audio = torch.randn(1, 3 * 64, 1280).bfloat16(), torch.randn(1, 3, 32, 96)
    audio = (audio + common * torch.randn(1, 3, 1, 96)).bfloat16()
    want = wide(x.double(), audio.double(), human_num=1)
    plain = goldens.rel_l2(own(x, audio, human_num=1), want)
    parts = own.absorb(*own.keys_values(audio))
    assert 0 < goldens.rel_l2(own.attend_absorbed(x, *parts, frames=3), want) <= gate * plain


@pytest.mark.parametrize("silent", [False, True])
def test_error_of_a_model_in_bf16(silent: bool) -> None:
    """The rule of every variant: at most 1.10 times the error of the reference's order of rounding."""
    torch.manual_seed(1)
    sizes = {"in_dim": 36, "dim": 1280, "ffn_dim": 2560, "num_heads": 40, "num_layers": 2}
    own = WanModel(**sizes, text_dim=64, text_len=16, context_tokens=32, intermediate_dim=16).eval()
    for name, p in own.named_parameters():
        if "modulation" in name:
            p.data.normal_(0, sizes["dim"] ** -0.5)
        elif p.ndim == 1:
            p.data.normal_(0, 0.02) if name.endswith("bias") else p.data.normal_(1, 0.1)
        else:
            p.data.normal_(0, math.prod(p.shape[1:]) ** -0.5)
    own = own.bfloat16()
    audio = torch.zeros(1, 9, 5, 12, 768) if silent else torch.randn(1, 9, 5, 12, 768)
    half = {"clip_fea": torch.randn(1, 257, 1280), "y": torch.randn(1, 20, 3, 16, 16), "audio": audio}
    half = {name: t.bfloat16() for name, t in half.items()}
    lists = {"x": [torch.randn(16, 3, 16, 16)], "context": [torch.randn(9, 64).bfloat16()]}
    rest = {"t": torch.tensor([800.0]), "seq_len": 192}
    wide = copy.deepcopy(own).float()
    as_float = {name: [t.float() for t in ts] for name, ts in lists.items()}
    want = wide(**as_float, **{name: t.float() for name, t in half.items()}, **rest)
    plain = goldens.rel_l2(own(**lists, **half, **rest), want)
    absorbed = goldens.rel_l2(own.use(absorb_audio=True)(**lists, **half, **rest), want)
    assert 0 < absorbed <= 1.10 * plain
