"""The stock image-to-video transformer against the reference, and what its other forms hold."""

from __future__ import annotations

import goldens
import pytest
import torch

from wan.modules.model import WanModel
from wan.modules.vace_model import VaceWanModel

NAME = "wan_i2v_plain"
TINY = {
    "dim": 48,
    "ffn_dim": 96,
    "freq_dim": 32,
    "text_dim": 20,
    "text_len": 24,
    "num_heads": 4,
    "num_layers": 4,
}


def test_i2v(measured) -> None:
    z, entry = goldens.load(NAME), goldens.index(NAME)
    model = goldens.fill(WanModel(**goldens.config(NAME)), NAME)
    out = model(
        [z["x"]],
        torch.tensor([entry["t"]]),
        [z["context"]],
        entry["seq_len"],
        clip_fea=goldens.regenerate(NAME).get("clip_fea", goldens.seeded.randn("dit.clip", (1, 257, 1280))),
        y=[z["y"]],
    )
    measured(NAME, "out", goldens.error(out[0], z["out"]), 2e-5)


def test_batch_equals_single_samples() -> None:
    """Samples of one shape run together, others one by one; each gets its own result."""
    model = WanModel(**TINY)
    goldens.seeded.fill(model)
    x = [goldens.seeded.randn(f"x{i}", shape) for i, shape in enumerate([(16, 2, 4, 6), (16, 2, 4, 6)])]
    context = [goldens.seeded.randn(f"c{i}", (5 + i, 20)) for i in range(3)]
    t = torch.tensor([500.0, 20.0, 900.0])
    single = [model([a], t[i : i + 1], [context[i]], 12)[0] for i, a in enumerate(x)]
    for got, want in zip(model(x, t[:2], context[:2], 12), single, strict=True):
        assert goldens.error(got, want) < 1e-5
    x.append(goldens.seeded.randn("x2", (16, 1, 6, 4)))
    mixed = model(x, t, context, 12)
    assert torch.equal(mixed[2], model([x[2]], t[2:], [context[2]], 6)[0])
    with pytest.raises(ValueError, match="12 tokens"):
        model(x, t, context, 11)


def test_first_last_frame_model_has_positions_for_two_images() -> None:
    model = WanModel(model_type="flf2v", in_dim=36, **TINY)
    assert tuple(model.img_emb.emb_pos.shape) == (1, 514, 1280)
    goldens.seeded.fill(model)
    out = model(
        [torch.zeros(16, 1, 4, 4)],
        torch.tensor([1.0]),
        [torch.zeros(3, 20)],
        4,
        clip_fea=goldens.seeded.randn("clip", (2, 257, 1280)),
        y=[torch.zeros(20, 1, 4, 4)],
    )
    assert out[0].shape == (16, 1, 4, 4)


def test_vace_hints() -> None:
    """A scale of 0 is the stock model; hints enter every vace layer."""
    model = VaceWanModel(vace_layers=[0, 2], vace_in_dim=8, **TINY)
    goldens.seeded.fill(model)
    stock = WanModel(**TINY)
    goldens.seeded.fill(stock)
    x, vace = goldens.seeded.randn("x", (16, 2, 4, 6)), goldens.seeded.randn("v", (8, 2, 4, 6))
    t, context = torch.tensor([300.0]), [goldens.seeded.randn("c", (5, 20))]
    off = model([x], t, [vace], context, 12, vace_context_scale=0.0)[0]
    assert torch.equal(off, stock([x], t, context, 12)[0])
    assert goldens.error(model([x], t, [vace], context, 12)[0], off) > 1e-2
    keys = [k for k in model.state_dict() if k.startswith("vace_blocks") and "_proj" in k]
    assert {k.rsplit(".", 1)[0] for k in keys} == {
        "vace_blocks.0.before_proj",
        "vace_blocks.0.after_proj",
        "vace_blocks.1.after_proj",
    }


def test_what_no_checkpoint_has_is_refused() -> None:
    for change in ({"qk_norm": False}, {"window_size": (4, 4)}, {"model_type": "x2v"}, {"num_heads": 5}):
        with pytest.raises(ValueError):
            WanModel(**{**TINY, **change})
