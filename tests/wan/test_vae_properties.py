"""Rules of the causal VAE: any split into pieces gives the same numbers; no frame depends on a later one."""

import functools

import torch
from goldens import seeded
from hypothesis import given, settings
from hypothesis import strategies as st

from wan.modules.vae import CausalCache, VideoVAE, first_frame, pieces

SCALE = (torch.linspace(-1, 1, 4), torch.linspace(0.5, 2, 4))
quick = settings(max_examples=25, deadline=None)


@functools.cache
def tiny() -> VideoVAE:
    model = VideoVAE(dim=4, z_dim=4).eval().requires_grad_(False)
    seeded.fill(model, "property:")
    return model


@st.composite
def splits(draw):
    """Sizes of the pieces, in latents, of a video of up to 6 latents."""
    return draw(st.lists(st.integers(1, 4), min_size=1, max_size=4).filter(lambda s: sum(s) <= 6))


def video(latents: int) -> torch.Tensor:
    return seeded.randn(f"property.video{latents}", (1, 3, first_frame(latents), 16, 24))


def latent(latents: int) -> torch.Tensor:
    return seeded.randn(f"property.latent{latents}", (1, 4, latents, 2, 3))


@quick
@given(splits())
def test_any_split_encodes_the_same(sizes):
    model, total = tiny(), sum(sizes)
    x, cache, out, at = video(total), CausalCache(), [], 0
    for size in sizes:
        piece = x[:, :, first_frame(at) : first_frame(at + size)]
        out.append(model.encoder(piece, cache))
        at += size
    whole = model.encoder(x, CausalCache())
    assert whole.shape == (1, 8, total, 2, 3)
    torch.testing.assert_close(torch.cat(out, 2), whole, atol=2e-5, rtol=1e-5)


@quick
@given(splits())
def test_any_split_decodes_the_same(sizes):
    model, total = tiny(), sum(sizes)
    cache = CausalCache()
    out = [model.decoder(piece, cache) for piece in latent(total).split(sizes, dim=2)]
    whole = model.decoder(latent(total), CausalCache())
    assert whole.shape == (1, 3, first_frame(total), 16, 24)
    torch.testing.assert_close(torch.cat(out, 2), whole, atol=2e-5, rtol=1e-5)


@quick
@given(st.integers(1, 6), st.integers(1, 7))
def test_encode_and_decode_do_not_depend_on_the_chunk(total, chunk):
    model = tiny()
    a, b = model.encode(video(total), SCALE, 1), model.encode(video(total), SCALE, chunk)
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)
    a, b = model.decode(latent(total), SCALE, 1), model.decode(latent(total), SCALE, chunk)
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


@quick
@given(st.integers(2, 6), st.data())
def test_the_past_does_not_see_the_future(total, data):
    model, changed = tiny(), data.draw(st.integers(1, total - 1))
    z = latent(total)
    other = z.clone()
    other[:, :, changed:] += 1
    a, b = (model.decoder(v, CausalCache()) for v in (z, other))
    frame = first_frame(changed)
    assert torch.equal(a[:, :, :frame], b[:, :, :frame])
    assert not torch.equal(a[:, :, frame:], b[:, :, frame:])


@given(st.integers(1, 60), st.integers(1, 70))
def test_pieces_cover_everything_once(total, chunk):
    spans = list(pieces(total, chunk))
    assert [i for start, stop in spans for i in range(start, stop)] == list(range(total))
    assert spans[0] == (0, 1)
