"""The VAE against the reference's encode and decode (gate: 1e-4 absolute, multitalk.md §8.4)."""

import functools

import pytest
import torch
from goldens import config, error, index, load, seeded

from wan.modules.vae import LATENT_MEAN, LATENT_STD, VideoVAE, WanVAE

GATE = 1e-4


@functools.cache
def seeded_vae(name: str) -> WanVAE:
    model = VideoVAE(**config(name))
    signature = seeded.fill(model, index(name)["salt"])
    for key, (shape, total, _) in index(name)["params"].items():
        assert list(signature[key][0]) == shape
        assert signature[key][1] == pytest.approx(total, rel=1e-6, abs=1e-4)
    return WanVAE(model=model, device="cpu")


@pytest.mark.parametrize("name", ["vae_tiny", "vae_full_width"])
@pytest.mark.parametrize("chunk", [1, 2])
def test_encode_and_decode(name, chunk, measured):
    vae, golden = seeded_vae(name), load(name)
    what = "" if chunk == 1 else f", {chunk} latents at a time"
    z = vae.encode([golden["x"][0]], chunk)[0]
    measured(name, f"encode{what}", error(z, golden["z"][0], absolute=True), GATE, metric="abs")
    y = vae.decode([golden["dec_in"]], chunk)[0]
    measured(name, f"decode{what}", error(y, golden["y"][0], absolute=True), GATE, metric="abs")
    assert z.dtype == y.dtype == torch.float32


def test_encode_one_frame(measured):
    vae, golden = seeded_vae("vae_tiny"), load("vae_tiny")
    z = vae.encode([golden["x"][0, :, :1]])[0]
    want = golden["z_first_frame_only"][0]
    measured("vae_tiny", "encode one frame", error(z, want, absolute=True), GATE, metric="abs")


def test_full_width_parameter_count():
    with torch.device("meta"):
        model = VideoVAE(**config("vae_full_width"))
    assert sum(p.numel() for p in model.parameters()) == index("vae_full_width")["n_params"] == 126_892_531


def test_latent_statistics():
    golden = load("vae_tiny")
    assert torch.equal(torch.tensor(LATENT_MEAN), golden["mean"])
    assert torch.equal(torch.tensor(LATENT_STD), golden["std"])


def test_reduced_precision_decode_is_close_and_fp32():
    vae, golden = seeded_vae("vae_tiny"), load("vae_tiny")
    y = vae.decode([golden["dec_in"]], dtype=torch.bfloat16)[0]
    assert y.dtype == torch.float32
    assert 0 < (y - golden["y"][0]).abs().mean() < 0.02
    vae = WanVAE(model=vae.model, device="cpu")
    vae.decode_dtype = torch.bfloat16
    assert torch.equal(vae.decode([golden["dec_in"]])[0], y)
    assert error(vae.encode([golden["x"][0]])[0], golden["z"][0], absolute=True) < GATE  # still fp32


def test_several_videos_share_nothing():
    vae, golden = seeded_vae("vae_tiny"), load("vae_tiny")
    x = golden["x"][0]
    together = vae.encode([x, x.flip(1), x[:, :5]])
    alone = [vae.encode([v])[0] for v in (x, x.flip(1), x[:, :5])]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize(
    ("shape", "message"),
    [((3, 8, 32, 32), "4n\\+1 frames"), ((3, 5, 30, 32), "multiples of 8"), ((3, 5, 32, 20), "32x20")],
)
def test_shapes_that_do_not_fit_are_named(shape, message):
    with pytest.raises(ValueError, match=message):
        seeded_vae("vae_tiny").encode([torch.zeros(shape)])


def test_needs_a_file_or_a_model():
    with pytest.raises(ValueError, match="either vae_pth"):
        WanVAE(device="cpu")
