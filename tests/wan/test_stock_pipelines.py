"""The stock pipelines with tiny networks: each against a loop written out from the networks' own forward."""

from dataclasses import replace

import pytest
import torch
from goldens import seeded
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_parts import CONFIG, T5, VAE, dit, parts, vace_builder, write_tokenizer

from wan import WanFLF2V, WanI2V, WanT2V, WanVace, WanVaceMP
from wan.first_last_frame2video import cover
from wan.modules import t5 as t5_module
from wan.modules import vae as vae_module
from wan.modules.model import WanModel
from wan.modules.t5 import T5Encoder
from wan.modules.vae import VideoVAE
from wan.progress import Cancelled
from wan.stock import Sampling, conditioned_latents, fit_area, image_to_tensor
from wan.utils.fm_solvers import FlowDPMSolverMultistepScheduler, get_sampling_sigmas
from wan.utils.fm_solvers_unipc import FlowUniPCMultistepScheduler
from wan.vace import mask_latents, on_white
from wan.vace_workers import WorkerError

SMALL = {"sampling_steps": 3, "seed": 7, "frame_num": 5}


def make(cls, kind, tmp_path):
    return cls.from_parts(CONFIG, parts(kind, tmp_path / "tokenizer"))


def picture(height=40, width=56, salt="a"):
    pixels = (seeded.rand(f"stock.{salt}", (height, width, 3)) * 255).to(torch.uint8).numpy()
    return Image.fromarray(pixels)


def texts(pipeline, prompt, negative):
    return pipeline.text_encoder([prompt, negative or CONFIG.sample_neg_prompt], "cpu")


def by_hand(pipeline, noise, forward, scale, solver="unipc", shift=5.0, steps=3):
    """The sampling loop from public pieces: `forward(latents, t, context)` is the network's own forward."""
    if solver == "unipc":
        scheduler = FlowUniPCMultistepScheduler(num_train_timesteps=1000, shift=1)
        scheduler.set_timesteps(steps, shift=shift)
    else:
        scheduler = FlowDPMSolverMultistepScheduler(num_train_timesteps=1000, shift=1)
        scheduler.set_timesteps(sigmas=get_sampling_sigmas(steps, shift))
    context, null = texts(pipeline, "a cat runs", "")
    latents = noise
    for t in scheduler.timesteps:
        cond, uncond = (forward(latents, t[None], c) for c in (context, null))
        v = uncond + scale * (cond - uncond)
        latents = scheduler.step(v[None], t, latents[None]).prev_sample[0]
    return pipeline.vae.decode([latents])[0]


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


# ---- text to video ----


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_text_to_video(tmp_path, solver):
    pipeline = make(WanT2V, "t2v", tmp_path)
    video = pipeline.generate("a cat runs", size=(48, 32), sample_solver=solver, **SMALL)
    assert video.shape == (3, 5, 32, 48)
    assert video.abs().max() <= 1

    def forward(x, t, context):
        return pipeline.model([x], t, [context], seq_len=12)[0]

    expected = by_hand(pipeline, noise(16, 2, 4, 6), forward, 5.0, solver)
    torch.testing.assert_close(video, expected, atol=1e-5, rtol=1e-5)


def test_the_seed_decides_and_global_generators_stay(tmp_path):
    pipeline = make(WanT2V, "t2v", tmp_path)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    videos = [pipeline.generate("a cat", (32, 32), **(SMALL | {"seed": seed})) for seed in (1, 1, 2, -1)]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(videos[0], videos[1])
    assert not torch.equal(videos[0], videos[2])
    assert not torch.equal(videos[2], videos[3])


def test_negative_prompt_defaults_to_the_configuration(tmp_path):
    pipeline = make(WanT2V, "t2v", tmp_path)
    default = pipeline.generate("a cat", (32, 32), **SMALL)
    same = pipeline.generate("a cat", (32, 32), n_prompt=CONFIG.sample_neg_prompt, **SMALL)
    assert torch.equal(default, same)
    assert not torch.equal(default, pipeline.generate("a cat", (32, 32), n_prompt="a dog", **SMALL))


def test_guidance_of_one_runs_one_branch(tmp_path):
    pipeline = make(WanT2V, "t2v", tmp_path)
    calls = []
    predict = pipeline.model.predict
    pipeline.model.predict = lambda *a: calls.append(1) or predict(*a)
    pipeline.generate("a cat", (32, 32), guide_scale=1.0, **SMALL)
    assert len(calls) == 3
    pipeline.generate("a cat", (32, 32), guide_scale=2.0, **SMALL)
    assert len(calls) == 3 + 6


def test_one_frame_is_an_image(tmp_path):
    pipeline = make(WanT2V, "t2v", tmp_path)
    assert pipeline.generate("a cat", (32, 48), **(SMALL | {"frame_num": 1})).shape == (3, 1, 48, 32)


def test_progress_and_cancellation(tmp_path):
    pipeline = make(WanT2V, "t2v", tmp_path)
    calls = []
    pipeline.generate("a cat", (32, 32), on_progress=lambda *c: calls.append(c), **SMALL)
    assert [c for c in dict.fromkeys(calls) if c[0]] == [(i, 3, "denoise") for i in (1, 2, 3)]
    with pytest.raises(Cancelled):
        pipeline.generate("a cat", (32, 32), cancelled=lambda: len(calls) > 0, **SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (40, 32)}, "multiples of 16 and 16, got 40x32"),
        ({"frame_num": 8}, "4n\\+1 frames"),
        ({"sample_solver": "euler"}, "choose one of unipc, dpm"),
        ({"sampling_steps": 0}, "at least 1"),
    ],
)
def test_bad_values_are_named(tmp_path, change, message):
    pipeline = make(WanT2V, "t2v", tmp_path)
    with pytest.raises(ValueError, match=message):
        pipeline.generate("a cat", **({"size": (32, 32)} | SMALL | change))


def test_ranks_above_zero_return_nothing(tmp_path):
    pipeline = WanT2V.from_parts(CONFIG, parts("t2v", tmp_path), rank=1)
    assert pipeline.generate("a cat", (32, 32), **SMALL) is None


def test_from_a_checkpoint_folder(tmp_path, monkeypatch):
    """The constructor reads T5, VAE and DiT from files (sizes cut down, the code path whole)."""
    import json

    from safetensors.torch import save_file

    sizes = T5 | {"dim": 20}
    for name, value in sizes.items():
        monkeypatch.setitem(t5_module.UMT5_XXL, name, value)
    monkeypatch.setattr(t5_module, "UMT5_XXL_LAYERS", 1)
    monkeypatch.setattr(vae_module, "VideoVAE", lambda z_dim: VideoVAE(**VAE, z_dim=z_dim))
    reference = make(WanT2V, "t2v", tmp_path)
    assert isinstance(reference.text_encoder.model, T5Encoder)
    torch.save(reference.text_encoder.model.state_dict(), tmp_path / CONFIG.t5_checkpoint)
    torch.save(reference.vae.model.state_dict(), tmp_path / CONFIG.vae_checkpoint)
    save_file(reference.model.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    model = reference.model
    config = {k: getattr(model, k) for k in ("model_type", "dim", "ffn_dim", "num_heads", "num_layers")}
    config |= {k: getattr(model, k) for k in ("in_dim", "freq_dim", "text_dim", "text_len", "out_dim")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_tokenizer(tmp_path / CONFIG.t5_tokenizer)
    pipeline = WanT2V(replace(CONFIG, clip_checkpoint=None), tmp_path, t5_cpu=True)
    assert isinstance(pipeline.model, WanModel)
    a, b = (p.generate("a cat", (32, 32), **SMALL) for p in (reference, pipeline))
    assert torch.equal(a, b.cpu())


# ---- image to video ----


def conditioned(pipeline, frames, size, frame_num):
    """[20,T,h,w] as the specification says it (§3.6), step by step."""
    video = torch.zeros(3, frame_num, *size)
    video[:, 0] = torch.nn.functional.interpolate(frames[0][None], size=size, mode="bicubic")[0]
    mask = torch.zeros(1, frame_num, size[0] // 8, size[1] // 8)
    mask[:, 0] = 1
    if len(frames) == 2:
        video[:, -1] = torch.nn.functional.interpolate(frames[1][None], size=size, mode="bicubic")[0]
        mask[:, -1] = 1
    mask = torch.cat([mask[:, :1].repeat(1, 4, 1, 1), mask[:, 1:]], dim=1)
    mask = mask.view(1, mask.shape[1] // 4, 4, *mask.shape[2:]).transpose(1, 2)[0]
    return torch.cat([mask, pipeline.vae.encode([video])[0]])


def test_image_to_video(tmp_path):
    pipeline = make(WanI2V, "i2v", tmp_path)
    image = picture()
    video = pipeline.generate("a cat runs", image, max_area=32 * 48, **SMALL)
    assert video.shape == (3, 5, 32, 32)  # 40:56 in 1536 pixels: 33.1 x 46.4, down to whole patches
    frame = image_to_tensor(image)
    y = conditioned(pipeline, [frame], (32, 32), 5)
    clip = pipeline.clip.visual([frame[:, None]])

    def forward(x, t, context):
        return pipeline.model([x], t, [context], seq_len=8, clip_fea=clip, y=[y])[0]

    expected = by_hand(pipeline, noise(16, 2, 4, 4), forward, 5.0)
    torch.testing.assert_close(video, expected, atol=1e-5, rtol=1e-5)


def test_first_and_last_frame_to_video(tmp_path):
    pipeline = make(WanFLF2V, "flf2v", tmp_path)
    first, last = picture(), picture(80, 100, "b")
    video = pipeline.generate("a cat runs", first, last, max_area=32 * 48, **SMALL)
    frames = [image_to_tensor(first), cover(image_to_tensor(last), (40, 56))]
    y = conditioned(pipeline, frames, (32, 32), 5)
    assert y[:4, -1].sum() == 16  # only the last of the four frames of the last latent is known
    clip = pipeline.clip.visual([f[:, None] for f in frames])

    def forward(x, t, context):
        return pipeline.model([x], t, [context], seq_len=8, clip_fea=clip, y=[y])[0]

    expected = by_hand(pipeline, noise(16, 2, 4, 4), forward, 5.5, shift=16)
    torch.testing.assert_close(video, expected, atol=1e-5, rtol=1e-5)
    other = pipeline.generate("a cat runs", first, picture(salt="c"), max_area=32 * 48, **SMALL)
    assert not torch.equal(video, other)


def test_mask_of_the_first_frame(tmp_path):
    y = conditioned_latents(make(WanI2V, "i2v", tmp_path).vae, [torch.zeros(3, 32, 48)], [0], 9, (32, 48))
    assert y.shape == (20, 3, 4, 6)
    assert torch.equal(y[:4, :, 0, 0], torch.tensor([[1.0, 0, 0]] * 4))


def test_cover_fills_the_size_and_keeps_the_aspect_ratio():
    assert cover(torch.zeros(3, 100, 50), (40, 56)).shape == (3, 40, 56)
    assert cover(torch.zeros(3, 31, 97), (40, 56)).shape == (3, 40, 56)
    same = torch.zeros(3, 40, 56)
    assert cover(same, (40, 56)) is same


@given(st.integers(16, 4000), st.integers(16, 4000), st.sampled_from([480 * 832, 720 * 1280]))
def test_area_is_kept(height, width, area):
    ratio = height / width
    if not 1 / 8 < ratio < 8:
        return
    h, w = fit_area(height, width, area, (4, 8, 8), (1, 2, 2))
    assert h % 2 == w % 2 == 0
    assert 0.6 * area < h * w * 64 <= area


def test_images_from_pil_and_tensors():
    image = Image.new("L", (5, 4), 255)
    assert torch.equal(image_to_tensor(image), torch.ones(3, 4, 5))
    assert image_to_tensor(torch.zeros(3, 4, 5)).shape == (3, 4, 5)
    with pytest.raises(ValueError, match=r"\[3, H, W\]"):
        image_to_tensor(torch.zeros(4, 5))


# ---- VACE ----


def control(references=0):
    frames, mask = seeded.randn("vace.frames", (3, 5, 32, 48)).clamp(-1, 1), torch.zeros(1, 5, 32, 48)
    mask[:, :, :, 24:] = 1
    images = [seeded.randn(f"vace.ref{i}", (3, 1, 32, 48)).clamp(-1, 1) for i in range(references)]
    return [frames], [mask], [images or None]


@pytest.mark.parametrize("references", [0, 2])
def test_vace(tmp_path, references):
    pipeline = make(WanVace, "vace", tmp_path)
    frames, masks, images = control(references)
    video = pipeline.generate("a cat runs", frames, masks, images, context_scale=0.8, **SMALL)
    assert video.shape == (3, 5, 32, 48)
    vae, binary = pipeline.vae, masks[0]
    z = torch.cat([vae.encode([frames[0] * (1 - binary)])[0], vae.encode([frames[0] * binary])[0]])
    for image in reversed(images[0] or []):
        latent = vae.encode([image])[0]
        z = torch.cat([torch.cat([latent, torch.zeros_like(latent)]), z], dim=1)
    vace = torch.cat([z, mask_latents(binary, (4, 8, 8), references)])
    assert vace.shape == (96, 2 + references, 4, 6)

    def forward(x, t, context):
        return pipeline.model([x], t, [vace], [context], seq_len=99, vace_context_scale=0.8)[0]

    scheduler_noise = noise(16, 2 + references, 4, 6)
    vae_decode = vae.decode
    vae.decode = lambda zs: vae_decode([z[:, references:] for z in zs])
    expected = by_hand(pipeline, scheduler_noise, forward, 5.0)
    torch.testing.assert_close(video, expected, atol=1e-5, rtol=1e-5)


def test_mask_latents_hold_every_pixel():
    mask = seeded.rand("vace.mask", (1, 5, 16, 24))
    latents = mask_latents(mask, (4, 8, 8), 1)
    assert latents.shape == (64, 3, 2, 3)
    assert latents[:, 0].abs().sum() == 0
    # channel 8·i + j of cell (y, x) is pixel (8y + i, 8x + j); latent frames pick video frames
    assert latents[8 * 3 + 5, 1, 1, 2] == mask[0, 1, 8 + 3, 16 + 5]


def test_vace_prepares_tensors_and_images(tmp_path):
    pipeline = make(WanVace, "vace", tmp_path)
    frames, masks, images = pipeline.prepare_source([None], [None], [[picture(20, 60)]], 5, (32, 48))
    assert frames[0].shape == (3, 5, 32, 48)
    assert torch.equal(masks[0], torch.ones(1, 5, 32, 48))
    assert images[0][0].shape == (3, 1, 32, 48)
    assert torch.equal(images[0][0][:, 0, 0], torch.ones(3, 48))  # white above the wide picture
    assert on_white(torch.zeros(3, 64, 10), (32, 48))[0, 0].sum() == 32 * (48 - 5)


def test_vace_bad_mask(tmp_path):
    frames, _, _ = control()
    with pytest.raises(ValueError, match="a mask must be"):
        make(WanVace, "vace", tmp_path).generate("a", frames, [torch.ones(1, 5, 8, 8)], None, **SMALL)


@pytest.mark.parametrize("use_usp", [True])
def test_vace_on_two_processes_equals_one(tmp_path, use_usp):
    frames, masks, images = control()
    alone = make(WanVace, "vace", tmp_path).generate("a cat", frames, masks, images, **SMALL)
    with WanVaceMP(CONFIG, tmp_path, use_usp, world_size=2, build=vace_builder(tmp_path, use_usp)) as workers:
        together = workers.generate("a cat", frames, masks, images, **SMALL)
        torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-4)
        with pytest.raises(WorkerError, match="one control video"):
            workers.generate("a cat", [], None, None, **SMALL)


def test_vace_workers_must_match_their_sizes(tmp_path):
    with pytest.raises(ValueError, match="make them equal"):
        WanVaceMP(CONFIG, tmp_path, ulysses_size=2, ring_size=2, world_size=3)


def test_sampling_is_checked():
    assert dit("t2v").num_heads == 4
    with pytest.raises(ValueError, match="sample_solver is 'x'"):
        Sampling(solver="x")
