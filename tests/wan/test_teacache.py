"""TeaCache: which steps run, the sums that decide it, and the outputs; planned and counted."""

from __future__ import annotations

import goldens
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wan.modules.multitalk_model import WanModel
from wan.modules.teacache import COEFFICIENTS, TeaCache, plan_steps

NAME = "dit_teacache"
CASES = [("multitalk-480", 0.2), ("multitalk-480", 0.5), ("multitalk-720", 0.2)]


def setup(scale: str, threshold: float):
    z, model = goldens.load(NAME), WanModel(**goldens.config(NAME))
    goldens.fill(model, "dit_single_fp32")
    prefix = f"{scale.replace('-', '_')}_th{threshold}_"
    return z, model, {k: z[prefix + k] for k in ("out", "ran", "acc")}


@pytest.mark.parametrize(("scale", "threshold"), CASES)
def test_planned(scale: str, threshold: float, measured) -> None:
    z, model, want = setup(scale, threshold)
    extra, context = goldens.regenerate(NAME), goldens.load("dit_single_fp32")["context"]
    time = model.embed_time(z["timesteps"])
    cache = TeaCache.create(time.e, time.e0, threshold=threshold, model_scale=scale)
    what = f"{scale} threshold {threshold}"
    ran = torch.tensor(cache.plan.run).repeat_interleave(3)
    measured(NAME, f"{what}: steps that run", float((ran != want["ran"].bool()).sum()), 0, metric="count")
    sums = torch.tensor(cache.plan.accumulated).repeat_interleave(3)
    measured(NAME, f"{what}: sums", goldens.error(sums, want["acc"], absolute=True), 1e-5, metric="abs")

    text = model.embed_text([context], extra["clip_fea"])
    audio = [model.embed_audio(a) for a in (extra["audio"], torch.zeros_like(extra["audio"]))]
    worst = 0.0
    for step in range(len(z["timesteps"])):
        latents = torch.cat((z["x"] * (1 + 0.01 * step), z["y"][0]))[None]
        t = model.embed_time(z["timesteps"][step : step + 1])
        for slot in range(3):
            got = model.predict(latents, t, text, audio[slot == 2], teacache=cache, step=step, slot=slot)
            worst = max(worst, goldens.error(got[0], want["out"][3 * step + slot]))
    measured(NAME, f"{what}: outputs", worst, 1e-5)


@pytest.mark.parametrize(("scale", "threshold"), CASES[:2])
def test_counted_through_forward(scale: str, threshold: float) -> None:
    """The original's interface: `teacache_init`, then calls of `forward` in turn; a second round starts
    afresh.
    """
    z, model, want = setup(scale, threshold)
    extra, context = goldens.regenerate(NAME), goldens.load("dit_single_fp32")["context"]
    steps = len(z["timesteps"])
    model.teacache_init(teacache_thresh=threshold, sample_steps=steps, model_scale=scale)
    silent = torch.zeros_like(extra["audio"])
    for round_ in range(2):
        for call in range(3 * steps if round_ == 0 else 6):
            step, slot = divmod(call, 3)
            got = model(
                [z["x"] * (1 + 0.01 * step)],
                z["timesteps"][step : step + 1],
                [context],
                100,
                clip_fea=extra["clip_fea"],
                y=z["y"],
                audio=silent if slot == 2 else extra["audio"],
            )
            assert model.teacache.ran == bool(want["ran"][call])
            assert abs(model.teacache.accumulated - want["acc"][call]) < 1e-5
            assert goldens.error(got[0], want["out"][call]) < 1e-5
    model.disable_teacache()
    assert model.teacache is None


def test_two_passes_do_not_mix() -> None:
    """Specification §9 D3: with two passes a step each keeps its own residual."""
    cache = TeaCache(plan=plan_steps(torch.ones(8, 4), 1.0, (0.0,), lambda i: i < 5), passes=2)
    assert cache.plan.run == (True,) * 5 + (False,) * 3
    x = torch.zeros(1)
    for step in range(8):
        for slot, added in enumerate((1.0, -1.0)):
            assert cache.run(step, slot, x, lambda x, added=added: x + added).item() == added
    with pytest.raises(ValueError, match="2 passes"):
        cache.run(0, 2, x, lambda x: x)


@given(
    st.lists(st.floats(0.1, 10), min_size=1, max_size=30),
    st.floats(0.01, 1.0),
    st.sampled_from(sorted(COEFFICIENTS)),
)
def test_rules(levels: list[float], threshold: float, key: tuple[str, bool]) -> None:
    signal = torch.tensor(levels)[:, None].expand(-1, 4)
    plan = plan_steps(signal, threshold, COEFFICIENTS[key], lambda i: i < 5)
    assert len(plan.run) == len(levels)
    assert all(plan.run[:5])
    for runs, total in zip(plan.run, plan.accumulated, strict=True):
        assert (total == 0) if runs else (total < threshold)


def test_unknown_scale_is_named() -> None:
    with pytest.raises(ValueError, match="multitalk-480, multitalk-720"):
        TeaCache.create(torch.ones(2, 1), torch.ones(2, 6, 1), model_scale="multitalk-999")
