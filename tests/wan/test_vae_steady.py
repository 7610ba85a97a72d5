"""Still parts of a video are encoded once, and the latents keep every bit."""

import functools
from collections import Counter
from contextlib import contextmanager, nullcontext

import pytest
import torch
from goldens import config, seeded
from hypothesis import given, settings
from hypothesis import strategies as st

from wan.modules.vae import CausalCache, VideoVAE, WanVAE, first_frame
from wan.modules.vae_layers import CausalConv3d, Downsample, ResidualBlock
from wan.modules.vae_steady import SteadyEncoder, same_bits

SCALE = (torch.linspace(-1, 1, 4), torch.linspace(0.5, 2, 4))


@functools.cache
def tiny() -> VideoVAE:
    model = VideoVAE(dim=4, z_dim=4).eval().requires_grad_(False)
    seeded.fill(model, "steady:")
    return model


@functools.cache
def official() -> VideoVAE:
    model = VideoVAE(**config("vae_full_width")).eval().requires_grad_(False)
    seeded.fill(model, "steady:")
    return model


def clip(known: int, frames: int, height: int = 16, width: int = 24) -> torch.Tensor:
    """What `wan.pipeline_steps.encode` gives to the VAE: known frames, then grey."""
    x = torch.zeros(1, 3, frames, height, width)
    x[:, :, :known] = seeded.randn(f"steady.{known}", (1, 3, known, height, width))
    return x


def calls(model: VideoVAE, run) -> Counter[str]:
    """How often each convolution of the encoder with a memory ran, by name, in the network's order."""
    counted: Counter[str] = Counter()
    hooks = []
    for name, module in model.encoder.named_modules():
        if isinstance(module, torch.nn.Conv3d) and module.kernel_size[0] == 3:
            counted[name] = 0
            hooks.append(module.register_forward_hook(lambda *_, n=name: counted.update([n])))
    run()
    for hook in hooks:
        hook.remove()
    return counted


@st.composite
def videos(draw):
    """Up to 12 latents, in runs: grey, a still picture, or frames that all differ."""
    total = draw(st.integers(1, 12))
    x, at = torch.zeros(1, 3, first_frame(total), 16, 24), 0
    while at < x.shape[2]:
        stop = min(at + draw(st.integers(1, 24)), x.shape[2])
        kind = draw(st.sampled_from(["grey", "still", "moving"]))
        if kind != "grey":
            frames = 1 if kind == "still" else stop - at
            x[:, :, at:stop] = seeded.randn(f"steady.{kind}.{at}", (1, 3, frames, 16, 24))
        at = stop
    return x


@contextmanager
def frame_after_frame(model: VideoVAE):
    """Convolutions give channels-last results, as on a GPU; on a CPU they don't of themselves."""
    hooks = [
        m.register_forward_hook(lambda *a: a[-1].contiguous(memory_format=torch.channels_last_3d))
        for m in model.modules()
        if isinstance(m, torch.nn.Conv3d)
    ]
    model.use(channels_last=True)
    try:
        yield
    finally:
        model.use(channels_last=False)
        for hook in hooks:
            hook.remove()


@settings(max_examples=60, deadline=None)
@given(videos(), st.integers(1, 5), st.booleans(), st.booleans())
def test_every_bit_is_that_of_the_plain_encode(x, chunk, channels_last, half) -> None:
    model = tiny()
    with (
        frame_after_frame(model) if channels_last else nullcontext(),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        want = model.encode(x, SCALE, chunk, reuse=False)
        assert same_bits(model.encode(x, SCALE, chunk), want)


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("known", [1, 25])
def test_every_bit_at_official_widths(known: int, chunk: int) -> None:
    vae, x = WanVAE(model=official(), device="cpu"), clip(known, 81, 16, 16)[0]
    want = vae.encode([x], chunk, reuse=False)[0]
    assert same_bits(vae.encode([x], chunk)[0], want)


def lags(model: VideoVAE) -> dict[str, int]:
    """How many pieces later than its input each convolution's output can be still, at the latest.

    By its memory: the two frames before a piece are the end of the piece before it, or, where pieces have one
    frame, of the two before it. A strided convolution remembers one frame, so one piece in either case.
    """
    found, lag, frames = {}, 0, 4
    for name, module in model.encoder.named_modules():
        if isinstance(module, CausalConv3d) and module.kernel_size[0] == 3:
            lag += 1 if frames > 1 else 2
            found[name] = lag
        elif isinstance(module, Downsample) and module.temporal:
            lag, frames = lag + 1, frames // 2
            found[f"{name}.time_conv"] = lag
    return found


@pytest.mark.parametrize("known", [1, 25])
def test_no_layer_runs_longer_than_its_memory_demands(known: int) -> None:
    model, total = tiny(), 21
    counted = calls(model, lambda: model.encode(clip(known, 81), SCALE))
    equal_from = 2 + (known - 1) // 4  # the first piece that is equal to the one before it
    bound = {name: min(equal_from + lag, total) for name, lag in lags(model).items()}
    time_convs = {name for name in counted if "time_conv" in name}
    assert set(counted) == set(bound)
    for name, count in counted.items():
        assert count <= bound[name] - (name in time_convs), name  # these don't run for the first frame
    assert counted["conv1"] == equal_from + 1
    assert list(counted.values())[-1] == total, "the deepest layers never settle in a clip"
    plain = calls(model, lambda: model.encode(clip(known, 81), SCALE, reuse=False))
    assert all(n == total - (name in time_convs) for name, n in plain.items())


def test_a_moving_video_is_computed_whole_and_keeps_nothing(monkeypatch) -> None:
    model, x = tiny(), seeded.randn("steady.moving", (1, 3, 21, 16, 24))
    kept = []
    original = SteadyEncoder.__call__

    def watched(self, piece, *, repeats):
        out = original(self, piece, repeats=repeats)
        kept.append(self._kept)
        return out

    monkeypatch.setattr(SteadyEncoder, "__call__", watched)
    counted = calls(model, lambda: model.encode(x, SCALE))
    assert counted == calls(model, lambda: model.encode(x, SCALE, reuse=False))
    assert kept == [None] * 12


def test_a_grey_video_settles_to_the_end() -> None:
    """Then the head's output itself is what is kept."""
    model, total = tiny(), 40
    x = torch.zeros(1, 3, first_frame(total), 16, 24)
    counted = calls(model, lambda: model.encode(x, SCALE))
    assert max(counted.values()) < total
    assert same_bits(model.encode(x, SCALE), model.encode(x, SCALE, reuse=False))


def test_after_a_still_part_the_memory_is_right() -> None:
    """A layer that was left out must remember what it would remember, had it run."""
    model = tiny()
    x = torch.cat((clip(1, 61), seeded.randn("steady.end", (1, 3, 20, 16, 24)), clip(1, 48)), dim=2)
    counted = calls(model, lambda: model.encode(x, SCALE))
    assert counted["conv1"] < 33 // 2
    assert same_bits(model.encode(x, SCALE), model.encode(x, SCALE, reuse=False))


def test_steps_are_the_forward() -> None:
    model = tiny()
    x, cache = clip(9, 9), CausalCache()
    want = model.encoder(x, CausalCache())
    for step in model.encoder.steps():
        x = step(x, cache)
    assert same_bits(x, want)
    blocks = sum(isinstance(m, ResidualBlock) for m in model.encoder.modules())
    others = 1 + 3 + 1 + 3  # the first convolution, downsamplings, the attention, the head
    assert len(model.encoder.steps()) == 2 * blocks + others


def test_history_is_put_before_what_the_norm_wrote(monkeypatch) -> None:
    """Channels-last: convolutions get the tensor that joining would give, without a second copy of it."""
    model, x = tiny(), seeded.randn("steady.moving", (1, 3, 21, 16, 24))
    z = seeded.randn("steady.latent", (1, 4, 5, 2, 3))
    joined, cat = [], torch.cat
    monkeypatch.setattr(torch, "cat", lambda *a, **k: joined.append(1) or cat(*a, **k))
    with frame_after_frame(model):
        got = model.encode(x, SCALE), model.decode(z, SCALE)
        in_place = len(joined)
        joined.clear()
        monkeypatch.setattr(CausalCache, "room_behind_history", lambda *_: None)
        want = model.encode(x, SCALE), model.decode(z, SCALE)
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
    assert in_place < len(joined) / 4


def test_bits_are_compared_not_values() -> None:
    zero, nan = torch.zeros(3), torch.full((3,), torch.nan)
    assert not same_bits(zero, -zero)
    assert same_bits(nan, nan.clone())
    assert not same_bits(zero, zero.bfloat16())
    assert not same_bits(zero, zero[:2])
