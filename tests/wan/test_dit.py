"""The audio DiT against the reference: parts, taps inside a forward, outputs, one and two speakers."""

from __future__ import annotations

import functools

import goldens
import pytest
import torch

from wan.modules.attention import (
    SingleStreamMutiAttention,
    normalize_and_scale,
    official_reference_map,
    reference_map,
)
from wan.modules.audio_proj import AudioProjModel
from wan.modules.layers import WanLayerNorm, WanRMSNorm, sinusoidal_embedding_1d
from wan.modules.multitalk_model import WanModel
from wan.modules.rope import RotaryPositionalEmbedding1D, axis_angles, rotate, video_table
from wan.modules.runtime import Parallel

FP32 = 2e-5


def tiny(name: str, dtype: torch.dtype = torch.float32) -> WanModel:
    return goldens.fill(WanModel(**goldens.config(name)), name).to(dtype)


def inputs(name: str, dtype: torch.dtype = torch.float32) -> dict:
    z = goldens.load(name)
    extra = {k: v.to(dtype) for k, v in goldens.regenerate(name).items()}
    return {
        "x": [z["x"]],
        "t": z["t"],
        "context": [extra["context"] if "context" in extra else z["context"].to(dtype)],
        "seq_len": 10_000,
        "clip_fea": extra["clip_fea"],
        "y": z["y"].to(dtype),
        "audio": extra["audio"],
        "ref_target_masks": z["ref_target_masks"].to(dtype),
    }


class Taps:
    """Remembers what named modules returned in the last forward."""

    def __init__(self, model: WanModel) -> None:
        self.seen: dict[str, torch.Tensor] = {}
        block = model.blocks[0]
        self._hook(model.patch_embedding, "patch_embedding")
        self._hook(model.text_embedding, "text_embedding")
        self._hook(model.img_emb, "img_emb")
        self._hook(model.audio_proj, "audio_proj")
        self._hook(block.self_attn.o, "b0_self_attn")
        self._hook(block.cross_attn, "b0_cross_attn")
        self._hook(block.audio_cross_attn.proj, "b0_audio_attn")
        self._hook(block.ffn, "b0_ffn")
        self._hook(block, "b0_out")
        self._hook(model.blocks[1], "b1_out")
        self._hook(model.head, "head")

    def _hook(self, module: torch.nn.Module, name: str) -> None:
        module.register_forward_hook(lambda _m, _i, out, name=name: self.seen.__setitem__(name, out))


@pytest.mark.parametrize("name", ["dit_single_fp32", "dit_multi_fp32"])
def test_fp32_with_taps(name: str, measured) -> None:
    model, z = tiny(name), goldens.load(name)
    taps = Taps(model)
    out = model(**inputs(name))
    for tap, got in taps.seen.items():
        want = z["tap_img_emb_rows0_4"] if tap == "img_emb" else z[f"tap_{tap}"]
        got = got[:, :4] if tap == "img_emb" else got
        measured(name, f"tap {tap}", goldens.error(got, want), FP32)
    time = model.embed_time(z["t"])
    measured(name, "tap time_embedding", goldens.error(time.e, z["tap_time_embedding"]), FP32)
    measured(
        name,
        "tap time_projection",
        goldens.error(time.e0.flatten(1), z["tap_time_projection"].flatten(1)),
        FP32,
    )
    measured(name, "out", goldens.error(out[0], z["out"]), FP32)


@pytest.mark.parametrize("name", ["dit_single_fp32", "dit_multi_fp32", "dit_multi_bf16"])
@pytest.mark.parametrize("official", [False, True])
def test_reference_map_in_the_block(name: str, official: bool, measured) -> None:
    dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
    model, z = tiny(name, dtype), goldens.load(name)
    maps = block0_maps(model, name, dtype, official=official)
    error = goldens.error(maps, z["tap_b0_ref_attn_map"])
    measured(name, f"block 0 map, official={official}", error, FP32 if dtype == torch.float32 else 0.02)


def block0_maps(model: WanModel, name: str, dtype: torch.dtype, *, official: bool) -> torch.Tensor:
    arguments, masks = inputs(name, dtype), goldens.load(name)["ref_target_masks"]
    seen = {}

    def grab(q, k, ctx):
        grid = ctx.grid
        m = torch.nn.functional.interpolate(masks[None], size=grid[1:], mode="nearest")[0].flatten(1)
        seen["map"] = reference_map(q, k, grid, m, Parallel(), official=official)
        return original(q, k, ctx)

    block = model.blocks[0]
    original, block.speaker_positions = block.speaker_positions, grab
    model(**arguments)
    return seen["map"].float()


def test_long_audio_two_speakers(measured) -> None:
    name = "dit_long_audio"
    model = goldens.fill(WanModel(**goldens.config(name)), "dit_single_fp32")
    out = model(**inputs(name))
    measured(name, "out", goldens.error(out[0], goldens.load(name)["out"]), FP32)


@functools.cache
def real_width() -> WanModel:
    with torch.device("meta"):  # no random initialisation of 780 M parameters
        model = WanModel(**goldens.config("dit_real_width_1layer"))
    return goldens.fill(model.to_empty(device="cpu"), "dit_real_width_1layer")


@pytest.mark.slow
@pytest.mark.parametrize(("people", "out"), [(1, "out_one"), (2, "out_two")])
def test_real_width_layer(people: int, out: str, measured) -> None:
    name = "dit_real_width_1layer"
    arguments = inputs(name)
    arguments["audio"] = arguments["audio"][:people]
    got = real_width()(**arguments)
    measured(name, out, goldens.error(got[0], goldens.load(name)[out]), FP32)


def test_single_bf16(measured) -> None:
    name, dtype = "dit_single_bf16", torch.bfloat16
    out = tiny(name, dtype)(**inputs(name, dtype))
    assert out.dtype == torch.float32
    measured(name, "out", goldens.rel_l2(out[0], goldens.load(name)["out"]), 0.01, metric="rel L2")


def test_multi_bf16_classes(measured) -> None:
    """Specification §8.5: classes may differ only where the two best maps lie within one bf16 step."""
    name, dtype = "dit_multi_bf16", torch.bfloat16
    want = goldens.load(name)["tap_b0_ref_attn_map"]
    got = block0_maps(tiny(name, dtype), name, dtype, official=False)
    best = want.sort(0, descending=True).values
    step = best[0] * 2.0**-7
    decided = (best[0] - best[1]) > step
    wrong = (got.argmax(0) != want.argmax(0)) & decided
    measured(name, "classes beyond a bf16 step", float(wrong.sum()), 0, metric="count")


def test_multi_bf16_with_injected_positions(measured) -> None:
    """With the positions of the reference's own map, the audio attention agrees within bf16 noise."""
    name, dtype = "dit_multi_bf16", torch.bfloat16
    model, z = tiny(name, dtype), goldens.load(name)
    taps, block = Taps(model), model.blocks[0]
    positions = block.audio_cross_attn.positions(z["tap_b0_ref_attn_map"].to(dtype))
    block.speaker_positions = lambda *_: positions
    model(**inputs(name, dtype))
    error = goldens.rel_l2(taps.seen["b0_audio_attn"], z["tap_b0_audio_attn"])
    measured(name, "audio attention, injected positions", error, 0.01, metric="rel L2")


def test_multi_bf16_official_map(measured) -> None:
    """With the original's explicit map in bf16 every class is the same, so whole outputs can be compared."""
    name, dtype = "dit_multi_bf16", torch.bfloat16
    model, z = tiny(name, dtype).use(official_map=True), goldens.load(name)
    out = model(**inputs(name, dtype))
    measured(name, "out, official map", goldens.rel_l2(out[0], z["out"]), 0.01, metric="rel L2")


def test_one_speaker_needs_no_map() -> None:
    name = "dit_single_fp32"
    arguments = inputs(name)
    model = tiny(name)
    with_masks = model(**arguments)
    assert torch.equal(with_masks, model(**{**arguments, "ref_target_masks": None}))


def test_kept_keys_and_values_change_nothing() -> None:
    name = "dit_multi_fp32"
    model, a = tiny(name), inputs(name)
    text = model.embed_text(a["context"], a["clip_fea"], keep=True)
    audio = model.embed_audio(a["audio"], a["ref_target_masks"], keep=True)
    latents = torch.cat((a["x"][0], a["y"][0]))[None]
    for _ in range(2):  # the second pass reads what the first one kept
        assert torch.equal(model.predict(latents, model.embed_time(a["t"]), text, audio), model(**a))


def test_guidance_passes(measured) -> None:
    name = "dit_cfg_step"
    z, model = goldens.load(name), tiny("dit_multi_fp32")
    cond = inputs("dit_multi_fp32")
    null = {**cond, "context": [z["context_null"]]}
    silent = {"audio": torch.zeros_like(cond["audio"])[-1:]}
    for what, arguments in {
        "cond": cond,
        "drop_text": null,
        "uncond": {**null, **silent},
        "drop_audio": {**cond, **silent},
    }.items():
        measured(name, what, goldens.error(model(**arguments)[0], z[what]), FP32)


# --- parts ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts() -> dict[str, torch.Tensor]:
    return goldens.load("dit_parts")


def test_sinusoid(parts, measured) -> None:
    error = goldens.error(sinusoidal_embedding_1d(256, parts["sin_pos"]), parts["sin_dim256"])
    measured("dit_parts", "sinusoid", error, 1e-12)


def test_rope(parts, measured) -> None:
    for dim in (44, 42):
        angles = axis_angles(40, dim)
        for function, part in ((torch.cos, "re"), (torch.sin, "im")):
            want = parts[f"rope_params_{dim}_first40_{part}"]
            measured("dit_parts", f"rope table {dim} {part}", goldens.error(function(angles), want), 1e-12)
    x = parts["rope_x"]
    grid = next(g for g in [(3, 4, 5), (4, 3, 5), (5, 3, 4)] if _rope_matches(x, g, parts["rope_y"]))
    table = video_table(grid, 128, "cpu")
    got = rotate(x, table.cos[:, None], table.sin[:, None])
    measured("dit_parts", "rope applied", goldens.error(got, parts["rope_y"]), FP32)
    got = RotaryPositionalEmbedding1D(128)(parts["rope1d_q"], parts["rope1d_pos"])
    measured("dit_parts", "1-D rope", goldens.error(got, parts["rope1d_y"]), FP32)


def _rope_matches(x: torch.Tensor, grid: tuple[int, int, int], want: torch.Tensor) -> bool:
    table = video_table(grid, 128, "cpu")
    return goldens.error(rotate(x, table.cos[:, None], table.sin[:, None]), want) < 1e-3


def test_norms(parts, measured) -> None:
    x = parts["norm_x"]
    rms, ln = WanRMSNorm(16, eps=1e-6), WanLayerNorm(16, elementwise_affine=True)
    rms.weight.copy_(goldens.seeded.randn("rms.w", (16,)))
    ln.weight.copy_(goldens.seeded.randn("ln.w", (16,)))
    ln.bias.copy_(goldens.seeded.randn("ln.b", (16,)))
    for module, name in ((rms, "rms_y"), (ln, "ln_y")):
        measured("dit_parts", name, goldens.error(module(x), parts[name]), FP32)
        got = module.bfloat16()(x.bfloat16()).float()
        measured("dit_parts", f"{name}_bf16", goldens.error(got, parts[f"{name}_bf16"]), 0.0)


def test_reference_map(parts, measured) -> None:
    q, k, masks = parts["map_q"], parts["map_k"], parts["map_masks"]
    grid = (3, 2, 3)
    measured(
        "dit_parts", "map", goldens.error(reference_map(q, k, grid, masks, Parallel()), parts["map_y"]), FP32
    )
    got = official_reference_map(q, k[:, :6], masks)
    measured("dit_parts", "map, explicit", goldens.error(got, parts["map_y"]), FP32)
    half = [t.bfloat16() for t in (q, k)]
    got = reference_map(*half, grid, masks, Parallel()).float()
    measured("dit_parts", "map bf16", goldens.error(got, parts["map_y_bf16"]), 0.02)


def test_audio_attention(parts, measured) -> None:
    module = SingleStreamMutiAttention(32, 12, 2, True, False, None)
    goldens.fill(module, "dit_parts", "ssma:")
    x = parts["ssma_x"]
    got = module(x, parts["ssma_e1"], human_num=1)
    measured("dit_parts", "audio attention, 1 speaker", goldens.error(got, parts["ssma_y1"]), FP32)
    got = module(x, parts["ssma_e2"], x_ref_attn_map=parts["ssma_map"], human_num=2)
    measured("dit_parts", "audio attention, 2 speakers", goldens.error(got, parts["ssma_y2"]), FP32)


def test_audio_projection(parts, measured) -> None:
    first, latter, want = parts["aproj_first"], parts["aproj_latter"], parts["aproj_y"]
    module = AudioProjModel(
        seq_len=5,
        seq_len_vf=8,
        blocks=first.shape[3],
        channels=first.shape[4],
        intermediate_dim=10,
        output_dim=want.shape[3],
        context_tokens=want.shape[2],
        norm_output_audio=True,
    )
    goldens.fill(module, "dit_parts", "aproj:")
    measured("dit_parts", "audio projection", goldens.error(module(first, latter), want), FP32)


def test_normalize_and_scale(parts, measured) -> None:
    got = normalize_and_scale(torch.linspace(-3, 5, 9), (-3, 5), (20, 24))
    measured("dit_parts", "normalize_and_scale", goldens.error(got, parts["normalize_and_scale"]), FP32)


# --- wrong input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audio": None}, "needs audio"),
        ({"clip_fea": None}, "needs CLIP"),
        ({"seq_len": 71}, "72 tokens"),
        ({"y": None}, "16 channels"),
        ({"audio": torch.zeros(1, 8, 5, 12, 768)}, "8 frames"),
        ({"audio": torch.zeros(1, 5, 5, 12, 768)}, "2 latent frames"),
        ({"audio": torch.zeros(3, 9, 5, 12, 768)}, "3 people"),
        ({"audio": torch.zeros(2, 9, 5, 12, 768), "ref_target_masks": None}, "ref_target_masks"),
        ({"context": [torch.zeros(25, 20)]}, "25 tokens"),
    ],
)
def test_wrong_input_says_what(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny("dit_single_fp32")(**{**inputs("dit_single_fp32"), **change})


def test_keys_of_the_real_model() -> None:
    with torch.device("meta"):
        model = WanModel(
            model_type="i2v", in_dim=36, dim=5120, ffn_dim=13824, freq_dim=256, num_heads=40, num_layers=40
        )
    got = {k: list(v.shape) for k, v in model.state_dict().items()}
    assert got == goldens.keys("dit_multitalk_i2v_14B")
    assert sum(p.numel() for p in model.parameters()) == 18_882_046_784
