"""The converted checkpoint: half the bytes, the same numbers, the same folder to every loader."""

import hashlib
import json
from functools import partial

import pytest
import torch
from goldens import fill, seeded
from safetensors.torch import load_file, save_file

from wan import convert as convert_module
from wan import shards as shards_module
from wan.configs import WAN_CONFIGS
from wan.convert import MANIFEST, Models, convert, main
from wan.loading import KeyMismatchError, load_model, load_pretrained, load_wav2vec2
from wan.modules.clip import VisionTransformer, visual_name
from wan.modules.multitalk_model import WanModel
from wan.modules.t5 import T5Encoder
from wan.modules.vae import VideoVAE
from wan.modules.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model
from wan.shards import block_order
from wan.tensor_files import CheckpointError, read_header

SHARD = 2_500_000
CONFIG = WAN_CONFIGS["multitalk-14B"]
DIT = {
    "model_type": "i2v", "dim": 48, "ffn_dim": 96, "num_heads": 4, "num_layers": 12, "in_dim": 36,
    "freq_dim": 16,
    "text_dim": 20, "text_len": 8, "eps": 1e-6,
    "out_dim": 16, "intermediate_dim": 16, "context_tokens": 4,
}  # fmt: skip
T5 = {
    "vocab": 64,
    "dim": 16,
    "dim_attn": 16,
    "dim_ffn": 32,
    "num_heads": 2,
    "num_layers": 2,
    "num_buckets": 8,
}
CLIP = {"image_size": 28, "dim": 32, "num_heads": 2, "out_dim": 8}
WAV = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
       "conv_dim": [4] * 7,
       "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}  # fmt: skip

MODELS = Models(
    t5=partial(T5Encoder, **T5, shared_pos=False),
    clip=partial(VisionTransformer, **CLIP, num_layers=31, features_only=True),
    vae=partial(VideoVAE, dim=4),
)


def seed(model, salt):
    seeded.fill(model, salt)
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A checkpoint folder laid out as the published ones are, with tiny networks."""
    root = tmp_path_factory.mktemp("official")
    wan, wav = root / "Wan", root / "wav2vec"
    wan.mkdir()
    wav.mkdir()
    dit = seed(WanModel(**DIT), "dit:")
    audio = {k: v for k, v in dit.items() if any(p in k for p in ("audio", "norm_x"))}
    audio = {k: v.bfloat16() if "norm_x" in k else v for k, v in audio.items()}
    base = sorted(dit.keys() - audio.keys())
    save_file({k: dit[k] for k in base[::2]}, wan / "diffusion_pytorch_model-00001-of-00002.safetensors")
    save_file({k: dit[k] for k in base[1::2]}, wan / "diffusion_pytorch_model-00002-of-00002.safetensors")
    save_file(audio, wan / "multitalk.safetensors")
    (wan / "config.json").write_text(
        json.dumps(DIT | {"_class_name": "WanModel", "_diffusers_version": "0.30.0"})
    )
    t5 = seed(MODELS.t5(), "t5:")
    torch.save({k: v.bfloat16() for k, v in t5.items()}, wan / CONFIG.t5_checkpoint)
    torch.save(seed(MODELS.vae(), "vae:"), wan / CONFIG.vae_checkpoint)
    clip = seed(VisionTransformer(**CLIP, num_layers=32), "clip:")
    whole = {f"visual.{k}": v for k, v in clip.items()} | {
        "log_scale": torch.ones(()),
        "textual.x": torch.ones(9),
    }
    torch.save(whole, wan / CONFIG.clip_checkpoint)
    (wan / CONFIG.t5_tokenizer).mkdir(parents=True)
    (wan / CONFIG.t5_tokenizer / "tokenizer.json").write_text("{}")
    speech = seed(Wav2Vec2Model(Wav2Vec2Config.from_dict(WAV)), "wav:")
    torch.save({f"wav2vec2.{k}": v for k, v in speech.items()}, wav / "pytorch_model.bin")
    (wav / "config.json").write_text(json.dumps(WAV))
    (wav / "preprocessor_config.json").write_text('{"do_normalize": false}')
    return wan, wav


@pytest.fixture(scope="module")
def converted(official, tmp_path_factory):
    wan, wav = official
    calls = []
    out = tmp_path_factory.mktemp("converted") / "out"
    options = {"models": MODELS, "shard_bytes": SHARD, "progress": lambda *c: calls.append(c)}
    return convert(wan, out, wav2vec_dir=wav, **options), calls


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def test_the_same_numbers_from_both_folders(official, converted):
    (wan, wav), (result, _) = official, converted
    out = result.folder
    equal(load_pretrained(WanModel, wan), load_pretrained(WanModel, out))
    for factory, name, dtype, rename in (
        (MODELS.t5, CONFIG.t5_checkpoint, CONFIG.t5_dtype, None),
        (MODELS.vae, CONFIG.vae_checkpoint, torch.float32, None),
        (MODELS.clip, CONFIG.clip_checkpoint, CONFIG.clip_dtype, visual_name),
    ):
        assert not (out / name).exists()  # the .safetensors beside it stands in
        options = {"dtype": dtype, "rename": rename}
        equal(load_model(factory, wan / name, **options), load_model(factory, out / name, **options))
    equal(load_wav2vec2(wav), load_wav2vec2(out / "chinese-wav2vec2-base"))


def test_a_forward_gives_the_same_numbers(official, converted):
    x, y = seeded.randn("convert.x", (16, 2, 4, 4)), seeded.randn("convert.y", (20, 2, 4, 4))
    inputs = {
        "t": torch.tensor([500.0]),
        "context": [seeded.randn("convert.text", (5, 20)).bfloat16()],
        "seq_len": 8,
        "clip_fea": seeded.randn("convert.clip", (1, 257, 1280)).bfloat16(),
        "y": [y],
        "audio": seeded.randn("convert.audio", (1, 5, 5, 12, 768)).bfloat16(),
        "ref_target_masks": torch.ones(3, 4, 4),
    }
    outputs = [
        load_pretrained(WanModel, folder)([x], **inputs)[0] for folder in (official[0], converted[0].folder)
    ]
    assert torch.isfinite(outputs[0]).all()
    assert torch.equal(*outputs)


def test_bytes_and_manifest(official, converted):
    result, _ = converted
    manifest = json.loads((result.folder / MANIFEST).read_text())
    assert manifest["schema"] == 1
    assert [f["name"] for f in manifest["files"]] == [f.name for f in result.files]
    for file in result.files:
        data = (result.folder / file.name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file.bytes, file.sha256)
        assert len(read_header(result.folder / file.name)) == file.tensors
    dit = [f for f in result.files if f.name.startswith("diffusion")]
    sources = [*official[0].glob("diffusion*.safetensors"), official[0] / "multitalk.safetensors"]
    assert 0.45 < sum(f.bytes for f in dit) / sum(p.stat().st_size for p in sources) < 0.55
    assert len(dit) > 1
    assert all(f.bytes < SHARD + 100_000 or f.tensors == 1 for f in dit)
    index = json.loads((result.folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == WanModel(**DIT).state_dict().keys()
    assert not list(result.folder.rglob("*.part"))


def test_other_libraries_read_the_files(converted):
    result, _ = converted
    for file in result.files:
        assert len(load_file(result.folder / file.name)) == file.tensors


def test_small_files_come_along(converted):
    out = converted[0].folder
    for name in (
        "config.json",
        "google/umt5-xxl/tokenizer.json",
        "chinese-wav2vec2-base/preprocessor_config.json",
    ):
        assert (out / name).is_file(), name


def test_q_k_and_v_lie_side_by_side(converted):
    out = converted[0].folder
    names = [n for f in sorted(out.glob("diffusion*.safetensors")) for n in read_header(f)]
    for part in ("weight", "bias"):
        at = [names.index(f"blocks.3.self_attn.{p}.{part}") for p in "qkv"]
        assert at == [at[0], at[0] + 1, at[0] + 2]
    blocks = [int(n.split(".")[1]) for n in names if n.startswith("blocks.")]
    assert blocks == sorted(blocks)
    assert sorted(names, key=block_order) == names


def test_progress_ends_at_the_total(converted):
    calls = converted[1]
    assert calls[-1][0] == calls[-1][1] > 0
    assert {c[2] for c in calls} == {"convert"}


def test_small_batches_change_nothing(official, converted, tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "BATCH_BYTES", 1000)
    again = convert(official[0], tmp_path / "out", wav2vec_dir=official[1], models=MODELS, shard_bytes=SHARD)
    assert again.files == converted[0].files


def test_output_must_be_empty(official, tmp_path):
    (tmp_path / "something").write_text("x")
    with pytest.raises(FileExistsError, match="not empty"):
        convert(official[0], tmp_path, models=MODELS)


def test_nothing_is_written_if_a_tensor_is_missing(official, tmp_path):
    with pytest.raises(KeyMismatchError, match="audio"):
        only_base = tmp_path / "base"
        only_base.mkdir()
        for path in official[0].iterdir():
            if path.name != "multitalk.safetensors":
                (only_base / path.name).symlink_to(path)
        convert(only_base, tmp_path / "out", models=MODELS)
    assert not (tmp_path / "out").exists()


def test_no_space_is_said_before_the_first_byte(official, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="will be written"):
        convert(official[0], tmp_path / "out", models=MODELS)
    assert not list((tmp_path / "out").iterdir())


def test_a_failure_leaves_no_half_file_under_a_final_name(official, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(official[0], tmp_path / "out", models=MODELS, progress=stop)
    assert not list((tmp_path / "out").iterdir())


def test_command_line_names_the_problem(tmp_path, capsys):
    assert main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert "config.json: no such file" in capsys.readouterr().err


def test_command_line_help(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--wav2vec" in capsys.readouterr().out


def test_fixture_weights_survive_a_round_trip(tmp_path):
    """The seeded VAE of the golden fixtures, written and read back, is still the fixture's."""
    from goldens import config

    torch.save(fill(VideoVAE(**config("vae_tiny")), "vae_tiny").state_dict(), tmp_path / "vae.pth")
    loaded = load_model(lambda: VideoVAE(**config("vae_tiny")), tmp_path / "vae.pth")
    fresh = fill(VideoVAE(**config("vae_tiny")), "vae_tiny")
    equal(loaded, fresh)


def test_sources_are_named_when_missing(official, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in official[0].iterdir():
        if path.name != CONFIG.t5_checkpoint:
            (broken / path.name).symlink_to(path)
    with pytest.raises(CheckpointError, match="models_t5"):
        convert(broken, tmp_path / "out", models=MODELS)
