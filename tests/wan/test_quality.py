"""The qualities: what each word stands for, what wins, what is refused, and the machine's part."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wan.attention_backends import LOSSY
from wan.quality import (
    LOSSY_ATTENTION,
    QUALITIES,
    TIERS,
    Machine,
    QualityError,
    Switches,
    expand,
    fp8_attention_problem,
    fp8_problem,
    settle,
)

GPU = Machine(fp8_attention=None, device="H200", fp8=None, memory=140 << 30, loras=1)


def test_exact_is_the_default_and_has_nothing_lossy() -> None:
    assert expand().quality == "exact"
    assert expand().switches == Switches()
    assert not expand().switches.lossy
    assert all(TIERS[name].lossy for name in QUALITIES if name != "exact")
    assert LOSSY_ATTENTION == LOSSY


def test_an_explicit_switch_wins_and_is_told() -> None:
    setting = expand("turbo", steps=4, vae_decode="bf16", attention=None)
    assert setting.switches.steps == 4
    assert setting.switches.text_guide_scale == 1.0
    assert setting.overrides == ("steps",)
    told = setting.to_json()
    assert (told["quality"], told["overrides"]) == ("turbo", ["steps"])
    assert told["lossy"] == ["vae_decode", "lora"]
    assert expand("exact", attention="sage").switches.lossy == ("attention",)
    quantised = expand("exact", weights="int8")
    assert (quantised.overrides, quantised.switches.lossy) == (("weights",), ("weights",))


@given(
    quality=st.sampled_from(QUALITIES),
    steps=st.none() | st.integers(1, 99),
    vae_decode=st.none() | st.sampled_from(["fp32", "bf16"]),
)
def test_every_switch_is_the_given_one_or_the_words(quality, steps, vae_decode) -> None:
    explicit = {"steps": steps, "vae_decode": vae_decode}
    setting = expand(quality, **explicit)
    for name, value in vars(setting.switches).items():
        own = getattr(TIERS[quality], name)
        wanted = own if explicit.get(name) is None else explicit[name]
        assert value == wanted
        assert (name in setting.overrides) == (wanted != own)


@pytest.mark.parametrize(
    ("quality", "explicit", "text"),
    [
        ("best", {}, "'best' is not one of exact, near, fast, turbo"),
        ("exact", {"linears": "fp4"}, "linears 'fp4' is not one of bf16, fp8"),
        ("exact", {"vae_decode": "fp8"}, "vae_decode 'fp8' is not one of fp32, bf16"),
        ("near", {"absorb_audio": True}, "absorb_audio True is not one of auto, none, silence, all"),
        ("exact", {"color": 1}, "no switch color"),
    ],
)
def test_what_cannot_be(quality, explicit, text) -> None:
    with pytest.raises(QualityError, match=text):
        expand(quality, **explicit)


@pytest.mark.parametrize(
    ("quality", "machine", "text"),
    [
        ("fast", Machine(), r"a CPU has no fp8.*works here: exact, near"),
        (
            "fast",
            Machine(device="A100", fp8=fp8_problem((8, 0), "2.7.1"), memory=80 << 30),
            r"fp8 linears can't run on A100: compute capability 8\.0.*works here: exact, near$",
        ),
        ("turbo", Machine(device="H200", fp8=None, memory=140 << 30), r"LoRA.*works here: exact, near, fast"),
        (
            "near",
            Machine(device="L4", fp8=None, memory=24 << 30),
            r"64 GiB, L4 has 24.*here: exact, fast",
        ),
    ],
)
def test_what_is_missing_is_one_error_that_says_what_works(quality, machine, text) -> None:
    with pytest.raises(QualityError, match=text):
        settle(expand(quality), machine)
    settle(expand("exact"), machine)


def test_lossy_attention_needs_its_units() -> None:
    asked = Switches(attention="fp8")
    assert Machine().lacks(asked) == (
        "attention fp8 can't run on cpu: it needs a GPU of compute capability 9.0",
    )
    assert not GPU.lacks(asked)
    assert fp8_attention_problem((8, 9)) == "compute capability 8.9, flash-attn 3 is for 9.0"
    assert "fa3_fwd_interface" in (fp8_attention_problem((9, 0)) or "")  # absent here, and named


@pytest.mark.parametrize(
    ("gib", "more", "chosen"),
    [
        (None, {}, "none"), (24, {}, "none"), (47, {}, "none"), (80, {}, "silence"), (95, {}, "silence"),
        (140, {}, "all"), (140, {"linears": "fp8"}, "all"), (140, {"resident": False}, "none"),
        (140, {"absorb_audio": "none"}, "none"), (80, {"absorb_audio": "all"}, "all"),
        (140, {"weights": "int8"}, "all"), (140, {"frames": 201}, "all"),
        (140, {"frames": 401}, "silence"),
        (140, {"speakers": 2}, "silence"), (24, {"speakers": 2}, "none"),
        (140, {"speakers": 2, "absorb_audio": "all"}, "silence"),
        (140, {"speakers": 2, "absorb_audio": "none"}, "none"),
    ],
)  # fmt: skip
def test_auto_becomes_what_the_memory_allows(gib, more, chosen) -> None:
    resident, frames = more.pop("resident", True), more.pop("frames", 81)
    speakers = more.pop("speakers", 1)
    machine = Machine(fp8=None, memory=None if gib is None else gib << 30, resident=resident)
    setting = expand("exact", **more)
    settled = settle(setting, machine, frames=frames, speakers=speakers)
    assert settled.switches.absorb_audio == chosen
    assert (settled.overrides, settled.quality) == (setting.overrides, "exact")


def test_two_speakers_need_no_memory_for_what_is_not_absorbed() -> None:
    small = Machine(fp8=None, memory=48 << 30)
    with pytest.raises(QualityError, match="64 GiB"):
        settle(expand("near"), small)
    assert settle(expand("near"), small, speakers=2).switches.absorb_audio == "silence"


def test_a_machine_with_all_of_it() -> None:
    for name in QUALITIES:
        settle(expand(name), GPU)


@pytest.mark.parametrize(
    ("capability", "torch", "works"),
    [
        ((9, 0), "2.11.0+cu130", True), ((9, 0), "2.4.1", False), ((8, 9), "2.6.0", False),
        ((8, 9), "2.10.0", True), ((8, 6), "2.15.0", False), ((12, 0), "2.7.0", True),
    ],
)  # fmt: skip
def test_who_has_fp8_products(capability, torch, works) -> None:
    assert (fp8_problem(capability, torch) is None) == works


def test_the_cpu_is_looked_at() -> None:
    machine = Machine.here("cpu", loras=2)
    assert (machine.device, machine.loras, machine.memory) == ("cpu", 2, None)
    assert machine.lacks(TIERS["fast"])
