"""Guidance: APG with momentum, and both CFG formulas with the Euler step, against the reference."""

from __future__ import annotations

import goldens
import pytest

from wan.guidance import ApgOptions, Guidance, MomentumBuffer, adaptive_projected_guidance
from wan.pipeline_steps import euler_step

GATE = 1e-5


def test_apg_with_momentum(measured) -> None:
    z, entry = goldens.load("apg"), goldens.index("apg")
    buffer = MomentumBuffer(entry["momentum"])
    for i in range(3):
        got = adaptive_projected_guidance(
            z[f"diff{i}"], z[f"cond{i}"], buffer, norm_threshold=entry["norm_threshold"]
        )
        measured("apg", f"step {i}", goldens.error(got, z[f"y{i}"]), GATE)
        error = goldens.error(buffer.running_average, z[f"running{i}"])
        measured("apg", f"momentum {i}", error, GATE)


@pytest.mark.parametrize(
    ("what", "options"),
    [("no_threshold", {"norm_threshold": 0}), ("eta1", {"eta": 1.0, "norm_threshold": 5})],
)
def test_apg_options(what: str, options: dict, measured) -> None:
    z = goldens.load("apg")
    got = adaptive_projected_guidance(z["diff0"], z["cond0"], None, **options)
    measured("apg", what, goldens.error(got, z[f"y_{what}"]), GATE)


def test_guidance_formulas(measured) -> None:
    z, entry = goldens.load("dit_cfg_step"), goldens.index("dit_cfg_step")
    scales = {"text_scale": entry["text_scale"], "audio_scale": entry["audio_scale"]}
    three = Guidance(**scales)
    got = three([z[name] for name in three.passes])
    measured("dit_cfg_step", "guided, three passes", goldens.error(got, z["guided_three"]), GATE)
    two = Guidance(**{**scales, "text_scale": 1.0})
    assert two.passes == ("cond", "drop_audio")
    got = two([z[name] for name in two.passes])
    measured("dit_cfg_step", "guided, two passes", goldens.error(got, z["guided_two"]), GATE)
    x, (t, following) = goldens.load("dit_multi_fp32")["x"], entry["t"]
    got = euler_step(x, z["guided_three"], t, following)
    measured("dit_cfg_step", "Euler step", goldens.error(got, z["next_latent"]), GATE)


def test_apg_with_scale_one_changes_nothing() -> None:
    z = goldens.load("dit_cfg_step")
    guidance = Guidance(text_scale=1.0, audio_scale=1.0, apg=ApgOptions())
    assert goldens.error(guidance([z["cond"], z["drop_audio"]]), z["cond"]) == 0
