"""The published checkpoint at its real size, as sparse files: headers are read, no weight is."""

import json
import struct
from math import prod

import pytest
import torch
from goldens import keys

from wan.configs import WAN_CONFIGS
from wan.convert import collect
from wan.loading import CheckpointError, build_from_config, check_keys, config_arguments, dit_files
from wan.modules.clip import feature_tower
from wan.modules.multitalk_model import WanModel
from wan.shards import block_order, shards
from wan.tensor_files import DTYPES, read_header

CONFIG = {
    "_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": 5120, "eps": 1e-06, "ffn_dim": 13824,
    "freq_dim": 256, "in_dim": 36, "model_type": "i2v", "num_heads": 40, "num_layers": 40, "out_dim": 16,
    "text_len": 512,
}  # fmt: skip


def sparse(path, tensors):
    """A safetensors file whose data is a hole: name → (shape, dtype name)."""
    header, at = {}, 0
    for name, (shape, dtype) in tensors.items():
        size = prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return at


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("Wan2.1-I2V-14B-480P")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    audio, base = {}, {}
    for name, shape in keys("dit_multitalk_i2v_14B").items():
        group = audio if any(p in name for p in ("audio", "norm_x")) else base
        group[name] = (shape, "BF16" if "norm_x" in name else "F32")
    names = list(base)
    bytes_base = 0
    for part in range(7):
        chosen = {n: base[n] for n in names[part::7]}
        bytes_base += sparse(folder / f"diffusion_pytorch_model-{part + 1:05d}-of-00007.safetensors", chosen)
    return folder, bytes_base, sparse(folder / "multitalk.safetensors", audio), len(audio)


@pytest.fixture(scope="module")
def model(published):
    return build_from_config(WanModel, config_arguments(WanModel, published[0]))


def test_published_sizes(published):
    """The bytes that the specification derives from the published file sizes (§0.10, §4.1)."""
    _, base, audio, count = published
    assert count == 330
    assert base == 65_579_515_136
    assert audio == 9_947_889_040 - 36_240  # the file less its header


def test_the_model_and_the_files_agree(published, model):
    folder = published[0]
    files = dit_files(folder)
    assert len(files) == 8
    found = {n: e.shape for f in files for n, e in read_header(f).items()}
    check_keys(folder, found, {n: tuple(t.shape) for n, t in model.state_dict().items()})
    assert len(found) == 1633
    assert sum(p.numel() for p in model.parameters()) == 18_882_046_784


def test_a_truncated_shard_of_real_size_is_named(published, tmp_path):
    source = published[0] / "diffusion_pytorch_model-00003-of-00007.safetensors"
    with source.open("rb") as file:
        head = file.read(1 << 20)
    broken = tmp_path / source.name
    with broken.open("wb") as file:
        file.write(head)
        file.truncate(source.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="00003-of-00007"):
        read_header(broken)


def test_the_converted_checkpoint_is_51_gigabytes(published, model):
    folder = published[0]
    dtype = WAN_CONFIGS["multitalk-14B"].param_dtype
    plans = list(shards(collect(dit_files(folder), model, dtype=dtype, order=block_order), 5 << 30))
    dit = sum(p.nbytes for p in plans)
    assert dit == 2 * 18_882_046_784
    assert all(p.nbytes <= 5 << 30 for p in plans)
    with torch.device("meta"):
        clip = sum(p.numel() for p in feature_tower().parameters())
    count = {
        n: sum(prod(s) for s in keys(n).values()) for n in ("t5_umt5_xxl_encoder", "vae", "wav2vec2_base")
    }
    others = 2 * count["t5_umt5_xxl_encoder"] + 2 * clip + 4 * count["vae"] + 4 * count["wav2vec2_base"]
    assert 51.0e9 < dit + others < 51.5e9
