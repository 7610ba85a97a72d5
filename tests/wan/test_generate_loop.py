"""The whole `generate` on tiny parts against the reference: clip, streaming, two speakers, boxes, APG,
TeaCache.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import goldens
import pytest
import torch
from PIL import Image

from wan.configs import WAN_CONFIGS
from wan.modules.multitalk_model import WanModel
from wan.modules.vae import VideoVAE, WanVAE
from wan.multitalk import OFFICIAL, MultiTalkPipeline, Parity
from wan.parts import Parts
from wan.progress import Cancelled
from wan.quality import Machine, Switches

NAME = "generate_loop"
ENTRY = goldens.index(NAME)
CASES = ENTRY["cases"]
BUCKETS = {"multitalk-480": {"0.67": (32, 48), "1.00": (32, 32), "1.50": (48, 32)}}


class ImageFeatures:
    """Stands for CLIP: fixed features plus a trace of the frame, so that a wrong frame shows."""

    def visual(self, videos: list[torch.Tensor]) -> torch.Tensor:
        fixed = goldens.seeded.randn("pipe.clip", (1, 257, 1280)).to(videos[0].device)
        return fixed + 0.1 * videos[0].mean()


def texts(prompts: list[str], device: torch.device) -> list[torch.Tensor]:
    """Stands for T5: the prompt's states, and the negative prompt's."""
    table = [("pipe.ctx", (9, 20)), ("pipe.ctxnull", (6, 20))]
    return [goldens.seeded.randn(*table[i]).to(device) for i in range(len(prompts))]


class Recorder(WanModel):
    """Remembers what every pass was given and gave."""

    def __init__(self, **sizes) -> None:
        super().__init__(**sizes)
        self.inputs, self.outputs, self.audio = [], [], []

    def predict(self, latents, time, text, audio, **where):
        out = super().predict(latents, time, text, audio, **where)
        self.inputs.append(latents[0])
        self.outputs.append(out[0])
        self.audio.append(audio)
        return out


@pytest.fixture
def pipeline() -> MultiTalkPipeline:
    return make_pipeline("cpu")


def make_pipeline(device: str) -> MultiTalkPipeline:
    model = goldens.fill(Recorder(**goldens.config("dit_single_fp32")), "dit_single_fp32")
    vae = goldens.fill(VideoVAE(**vae_sizes()), "vae_tiny")
    parts = Parts(
        model=model.to(device),
        vae=WanVAE(model=vae, device=device),
        text_encoder=texts,
        image_encoder=ImageFeatures(),
    )
    config = replace(WAN_CONFIGS["multitalk-14B"], param_dtype_name="float32")
    return MultiTalkPipeline.from_parts(config, parts, device, buckets=BUCKETS)


def vae_sizes() -> dict:
    accepted = VideoVAE.__init__.__annotations__
    return {k: v for k, v in goldens.config("vae_tiny").items() if k in accepted}


def job(case: dict) -> dict:
    people = {
        f"person{k + 1}": goldens.seeded.randn(f"pipe.audio{k}", (case["n_audio"], 12, 768), 0.5)
        for k in range(case["humans"])
    }
    image = Image.fromarray(goldens.load(NAME)["image"].numpy())
    data = {"prompt": "p", "cond_image": image, "cond_audio": people}
    return {**data, "bbox": case["bbox"]} if "bbox" in case else data


def arguments(case: dict) -> dict:
    extra = SimpleNamespace(use_apg=case.get("apg", False), use_teacache=case.get("tea", False))
    return {
        "motion_frame": ENTRY["motion_frame"],
        "frame_num": ENTRY["frame_num"],
        "shift": ENTRY["shift"],
        "sampling_steps": case.get("steps", ENTRY["steps"]),
        "text_guide_scale": case.get("tg", 5.0),
        "n_prompt": "neg",
        "seed": ENTRY["seed"],
        "max_frames_num": 1000 if case["mode"] == "streaming" else ENTRY["frame_num"],
        "color_correction_strength": case.get("color", 0.0),
        "progress": False,
        "extra_args": extra,
    }


@pytest.mark.parametrize("name", CASES)
def test_generate(name: str, pipeline: MultiTalkPipeline, measured) -> None:
    z = {k.removeprefix(f"{name}_"): v for k, v in goldens.load(NAME).items() if k.startswith(f"{name}_")}
    case = CASES[name]["case"]
    # The original ends the shortest case with a stop rule that ours does not need; its length is the
    # official one.
    parity = OFFICIAL if case["mode"] == "streaming" else Parity()
    video = pipeline.generate(job(case), **arguments(case), parity=parity)
    model = pipeline.model
    assert len(model.inputs) == CASES[name]["calls"]
    assert list(video.shape) == CASES[name]["shape"]
    assert video.dtype == torch.float32
    mask_errors = latent_masks(pipeline, case) != z["masks"]
    measured(NAME, f"{name}: masks", float(mask_errors.sum()), 0, metric="count")
    measured(NAME, f"{name}: noise", goldens.error(model.inputs[0][:16], z["noise"]), 0)
    for key, call in (("y_first", 0), ("y_last", -1)):
        if key in z:
            measured(NAME, f"{name}: {key}", goldens.error(model.inputs[call][16:][None], z[key]), 2e-4)
    got = model.inputs[-1][:16]
    measured(NAME, f"{name}: last latents", goldens.error(got, z["last_latent_in"]), 2e-4)
    measured(NAME, f"{name}: last prediction", goldens.error(model.outputs[-1], z["last_pred"]), 2e-4)
    levels = ((video + 1) / 2 * 255).clamp(0, 255).to(torch.uint8)
    worst = (levels.int() - z["video_u8"].int()).abs().max().item()
    measured(NAME, f"{name}: frames", worst, 1, metric="levels of 255")
    error = goldens.error(video[:, -1], z["video_f32_frame_last"], absolute=True)
    measured(NAME, f"{name}: last frame", error, 2e-3, metric="abs")
    people = [a.people for a in model.audio[:3]]
    assert people == [s[0] for s in CASES[name]["audio_shapes"]][: len(people)] or "tg" in case


def latent_masks(pipeline: MultiTalkPipeline, case: dict) -> torch.Tensor:
    from wan.pipeline_steps import Options, prepare

    options = Options(frame_num=ENTRY["frame_num"], motion_frame=ENTRY["motion_frame"])
    return prepare(job(case), options, pipeline.buckets).masks


def test_a_video_is_as_long_as_its_speech(pipeline: MultiTalkPipeline) -> None:
    """Specification §9 D6: the original loses three frames; ours begins with the same ones and goes on."""
    case = CASES["stream1"]["case"]
    ours = pipeline.generate(job(case), **arguments(case))
    original = goldens.load(NAME)["stream1_video_u8"]
    assert ours.shape[1] == case["n_audio"] == original.shape[1] + 3
    levels = ((ours + 1) / 2 * 255).clamp(0, 255).to(torch.uint8)
    assert (levels[:, :17].int() - original.int()).abs().max() <= 1


@pytest.mark.parametrize("n_audio", [1, 4, 9])
def test_short_speech_makes_a_short_video(n_audio: int, pipeline: MultiTalkPipeline) -> None:
    """Specification §9 D7."""
    case = {"humans": 1, "n_audio": n_audio, "mode": "streaming"}
    video = pipeline.generate(job(case), **{**arguments(case), "sampling_steps": 1})
    assert video.shape == (3, n_audio, 32, 48)
    with pytest.raises(ValueError, match="more than frame_num"):
        pipeline.generate(job(case), **arguments(case), parity=OFFICIAL)


def test_teacache_with_two_passes_leaves_nothing_behind(pipeline: MultiTalkPipeline) -> None:
    """Specification §9 D3 and D4: a second run, or another kind between, changes nothing."""
    case = {"humans": 1, "n_audio": 20, "mode": "clip", "tea": True, "steps": 8, "tg": 1.0}
    first = pipeline.generate(job(case), **arguments(case))
    other = CASES["clip1_teacache"]["case"]
    pipeline.generate(job(other), **arguments(other))
    assert torch.equal(first, pipeline.generate(job(case), **arguments(case)))


def test_seeds(pipeline: MultiTalkPipeline) -> None:
    """The seed decides the video; the process's own generator is left alone, and does not matter."""
    case = CASES["clip1"]["case"]
    options = {**arguments(case), "sampling_steps": 1}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = pipeline.generate(job(case), **options)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert torch.equal(first, pipeline.generate(job(case), **options))
    other = pipeline.generate(job(case), **{**options, "seed": -1})
    assert pipeline.last_seed != ENTRY["seed"]
    assert not torch.equal(first, other)
    again = pipeline.generate(job(case), **{**options, "seed": pipeline.last_seed})
    assert torch.equal(other, again)


def test_progress_frames_and_cancellation(pipeline: MultiTalkPipeline) -> None:
    case = CASES["stream1"]["case"]
    seen, pieces = [], []
    video = pipeline.generate(
        job(case), **arguments(case), on_progress=lambda *a: seen.append(a), on_frames=pieces.append
    )
    assert torch.equal(torch.cat(pieces, dim=1), video)
    assert max(p.shape[1] for p in pieces) <= 4  # as they are decoded, not clip by clip
    total = 3 * 4
    assert seen[0] == (0, total, "text")
    assert seen[-1] == (total, total, "decode")
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert {stage for _, _, stage in seen} == {"text", "encode", "denoise", "decode"}
    steps = []

    def stop() -> bool:
        return len(steps) >= 2

    def count(step: int, total: int, stage: str) -> None:
        if stage == "denoise":
            steps.append(step)

    with pytest.raises(Cancelled, match="of 12 steps"):
        pipeline.generate(job(case), **arguments(case), on_progress=count, cancelled=stop)


@pytest.mark.parametrize(
    ("gib", "humans", "absorbed"),
    [(140, 1, (True, False)), (140, 2, (False, True)), (60, 1, (False, True)), (24, 1, (False, False))],
)
def test_open_switches_are_what_the_machine_allows(
    gib: int, humans: int, absorbed: tuple[bool, bool], pipeline: MultiTalkPipeline, monkeypatch
) -> None:
    """`Switches()` straight from `wan.quality`, which nobody has settled."""
    here = Machine(memory=gib << 30)
    monkeypatch.setattr("wan.multitalk.Machine.here", lambda device, *, resident: here)
    case = next(c["case"] for c in CASES.values() if c["case"]["humans"] == humans)
    before, seen = pipeline.model.runtime, set()

    def look(step: int, total: int, stage: str) -> None:
        seen.add((pipeline.model.runtime.absorb_audio, pipeline.model.runtime.absorb_silence))

    pipeline.generate(
        job(case), **{**arguments(case), "sampling_steps": 1}, on_progress=look, switches=Switches()
    )
    assert seen == {absorbed}
    assert pipeline.model.runtime == before


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantised_weights_are_absorbed_too(kind: str, pipeline: MultiTalkPipeline, monkeypatch) -> None:
    from wan.quant import quantize

    quantize(pipeline.model, kind)
    case = next(c["case"] for c in CASES.values() if c["case"]["humans"] == 1)
    options = {**arguments(case), "sampling_steps": 1}
    assert pipeline.weights == kind
    videos = {
        how: pipeline.generate(job(case), **options, switches=Switches(absorb_audio=how))
        for how in ("none", "silence", "all")
    }
    assert not torch.equal(videos["all"], videos["none"])
    assert not torch.equal(videos["silence"], videos["none"])
    assert goldens.error(videos["all"], videos["none"]) < 2e-4
    assert goldens.error(videos["silence"], videos["none"]) < 2e-4
    monkeypatch.setattr("wan.multitalk.Machine.here", lambda device, *, resident: Machine(memory=140 << 30))
    for open_ones in (Switches(), Switches(weights=kind)):
        assert torch.equal(pipeline.generate(job(case), **options, switches=open_ones), videos["all"])


def test_what_lies_beyond_the_end_is_not_decoded(pipeline: MultiTalkPipeline, monkeypatch) -> None:
    case, asked, made = CASES["stream1"]["case"], [], []
    data = job(case)
    data["cond_audio"] = {person: speech[:5] for person, speech in data["cond_audio"].items()}
    whole = pipeline.generate(data, **arguments(case))
    decode_pieces = pipeline.parts.vae.decode_pieces

    def counted(latents, **options):
        asked.append(1 + 4 * (latents.shape[1] - 1))
        for piece in decode_pieces(latents, **options):
            made.append(piece.shape[1])
            yield piece

    monkeypatch.setattr(pipeline.parts.vae, "decode_pieces", counted)
    assert torch.equal(pipeline.generate(data, **arguments(case)), whole)
    beyond = sum(asked) - ENTRY["motion_frame"] * (len(asked) - 1) - whole.shape[1]
    assert sum(asked) - sum(made) == beyond // 4 * 4 > 0


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"prompt": None}, {}, "no 'prompt'"),
        ({"cond_image": "nowhere.png"}, {}, "nowhere.png"),
        ({"cond_audio": {"person2": torch.zeros(20, 12, 768)}}, {}, "person1"),
        ({"cond_audio": {"person1": torch.zeros(20, 768)}}, {}, r"\[frames, 12, 768\]"),
        ({"cond_audio": {"person1": torch.zeros(20, 13, 768)}}, {}, r"\(20, 13, 768\)"),
        ({"cond_audio": {"person1": torch.full((20, 12, 768), torch.nan)}}, {}, "not finite"),
        (
            {"cond_audio": {"person1": torch.zeros(20, 12, 768), "person2": torch.zeros(19, 12, 768)}},
            {},
            "20 frames of speech, person2 19",
        ),
        ({"bbox": {"person1": [0, 0, 1, 1]}}, {}, "one speaker"),
        ({}, {"size_buckget": "multitalk-999"}, "multitalk-480"),
        ({}, {"frame_num": 10}, "4·n"),
        ({}, {"motion_frame": 9}, "less than frame_num"),
        ({}, {"sampling_steps": 0}, "at least 1"),
        ({}, {"color_correction_strength": 2.0}, "from 0"),
    ],
)
def test_wrong_input_is_named(change: dict, options: dict, message: str, pipeline: MultiTalkPipeline) -> None:
    case = CASES["clip1"]["case"]
    data = {k: v for k, v in {**job(case), **change}.items() if v is not None}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pipeline.generate(data, **{**arguments(case), **options})
