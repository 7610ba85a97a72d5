"""Loading: the numbers arrive, nothing is initialised at random, and every bad file or tensor is named."""

import json
import pickle
import struct

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from wan import loading, tensor_files
from wan.loading import CheckpointError, KeyMismatchError, load_model, load_pretrained
from wan.tensor_files import read_header, read_safetensors


class Net(nn.Module):
    def __init__(self, in_dim: int = 6, dim: int = 8, num_layers: int = 2, weight_init: bool = True) -> None:
        super().__init__()
        assert not weight_init or in_dim != 99
        self.patch_embedding = nn.Linear(in_dim, dim)
        self.blocks = nn.ModuleList(nn.Linear(dim, dim) for _ in range(num_layers))
        self.norm_x = nn.LayerNorm(dim)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("steps", torch.arange(4))


@pytest.fixture
def state():
    torch.manual_seed(0)
    return {k: torch.randn(v.shape) if v.is_floating_point() else v for k, v in Net().state_dict().items()}


@pytest.fixture
def file(tmp_path, state):
    path = tmp_path / "net.safetensors"
    save_file(state, path)
    return path


def same(model, state, dtype=torch.float32):
    found = model.state_dict()
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor.to(dtype) if tensor.is_floating_point() else tensor), name


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_numbers_arrive(tmp_path, state, suffix, dtype):
    path = tmp_path / f"net{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    model = load_model(Net, path, dtype=dtype)
    same(model, state, dtype or torch.float32)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_old_pickle_format_and_wrapped_state_dict(tmp_path, state):
    torch.save({"state_dict": state}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    same(load_model(Net, tmp_path / "old.pth"), state)


@pytest.mark.parametrize("piece", [8, 24, 1 << 20])
@pytest.mark.parametrize("threads", [1, 5])
def test_any_piece_size_and_thread_count(file, state, monkeypatch, piece, threads):
    monkeypatch.setattr(tensor_files, "PIECE_BYTES", piece)
    for dtype in (None, torch.float16):
        read = read_safetensors(read_header(file).values(), dtype=dtype, threads=threads)
        for name, tensor in state.items():
            wanted = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
            assert torch.equal(read[name], wanted), name


def test_in_inference_mode(file, state):
    with torch.inference_mode():
        read = read_safetensors(read_header(file).values(), dtype=torch.float64, threads=2)
    assert all(torch.equal(read[name], t.double()) for name, t in state.items())


def test_dtype_may_depend_on_the_name(file, state):
    rule = lambda name, dtype: torch.float64 if name.startswith("norm_x") else torch.bfloat16  # noqa: E731
    model = load_model(Net, file, dtype=rule)
    assert model.norm_x.weight.dtype == torch.float64
    assert model.blocks[0].weight.dtype == torch.bfloat16
    assert model.steps.dtype == torch.int64


def test_nothing_is_initialised(file, monkeypatch):
    def refuse(tensor, *args, **kwargs):
        assert tensor.is_meta, "a parameter was initialised in memory"
        return tensor

    monkeypatch.setattr(nn.init, "kaiming_uniform_", refuse)
    monkeypatch.setattr(nn.init, "uniform_", refuse)
    load_model(Net, file)


def test_the_tensors_are_the_parameters(state):
    model = loading.assign(loading.build_on_meta(Net), state)
    assert model.blocks[0].weight.data_ptr() == state["blocks.0.weight"].data_ptr()


def test_missing_unexpected_and_misshaped_are_listed(tmp_path, state):
    del state["blocks.1.bias"]
    state["blocks.7.weight"] = torch.zeros(2)
    state["patch_embedding.weight"] = torch.zeros(8, 5)
    save_file(state, tmp_path / "net.safetensors")
    with pytest.raises(KeyMismatchError) as caught:
        load_model(Net, tmp_path / "net.safetensors")
    error = caught.value
    assert error.missing == ("blocks.1.bias",)
    assert error.unexpected == ("blocks.7.weight",)
    assert error.misshaped == {"patch_embedding.weight": ((8, 5), (8, 6))}
    for part in ("net.safetensors", "blocks.1.bias", "blocks.7.weight", "file [8, 5], model [8, 6]"):
        assert part in str(error)


def test_long_lists_are_cut_in_the_message_only(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "net.safetensors")
    with pytest.raises(KeyMismatchError, match="and 188 more") as caught:
        load_model(lambda: Net(num_layers=101), tmp_path / "net.safetensors")
    assert len(caught.value.missing) == 208


def test_names_are_checked_before_any_weight_is_read(tmp_path, state, monkeypatch):
    del state["scale"]
    save_file(state, tmp_path / "net.safetensors")
    monkeypatch.setattr(tensor_files, "_read_into", lambda *a: pytest.fail("read weights of a wrong file"))
    with pytest.raises(KeyMismatchError):
        load_model(Net, tmp_path / "net.safetensors")


def test_a_table_without_memory_is_noticed(file):
    class WithTable(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.ones(3), persistent=False)

    with pytest.raises(RuntimeError, match="without memory after loading: table"):
        load_model(WithTable, file)


# ---- bad files, each named ----


def damage(path, how):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    last = max((k for k in header if k != "__metadata__"), key=lambda k: header[k]["data_offsets"][1])
    if how == "empty":
        return b""
    if how == "few bytes":
        return data[:5]
    if how == "cut in the header":
        return data[: 8 + length // 2]
    if how == "cut in the data":
        return data[:-4]
    if how == "too long":
        return data + b"\0"
    if how == "not safetensors":
        return b"PK\x03\x04" + b"\xff" * 4096
    if how == "header is no JSON":
        return data[:8] + b"{" * length + data[8 + length :]
    if how == "lfs":
        return b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    if how == "unknown dtype":
        header[last]["dtype"] = "F6_X"
    if how == "wrong size":
        header[last]["shape"] = [3, *header[last]["shape"]]
    if how == "gap":
        header[last]["data_offsets"] = [n + 8 for n in header[last]["data_offsets"]]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("empty", "the file is empty"),
        ("few bytes", "5 bytes are too few"),
        ("cut in the header", "the header should have"),
        ("cut in the data", "the header describes"),
        ("too long", "the header describes"),
        ("not safetensors", "not a safetensors file"),
        ("header is no JSON", "header can't be read"),
        ("lfs", "Git-LFS pointer"),
        ("unknown dtype", "dtype F6_X of"),
        ("wrong size", "bytes, torch"),
        ("gap", "starts at byte"),
    ],
)
def test_bad_safetensors_are_named(file, how, message):
    file.write_bytes(damage(file, how))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(Net, file)
    assert str(file) in str(caught.value)
    assert caught.value.fix


def test_a_file_that_shrinks_while_it_is_read(file):
    entries = read_header(file).values()
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(CheckpointError, match="the file ends inside"):
        read_safetensors(entries)


def test_truncated_pickle_is_named(tmp_path, state):
    path = tmp_path / "net.pth"
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(CheckpointError, match=r"net.pth"):
        load_model(Net, path)


class Evil:
    def __reduce__(self):
        return (print, ("code from a checkpoint ran",))


def test_code_in_a_pickle_does_not_run(tmp_path, capsys):
    path = tmp_path / "evil.pth"
    torch.save({"a": Evil()}, path)
    with pytest.raises(CheckpointError, match="weights-only"):
        load_model(Net, path)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"plain.pth"):
        load_model(Net, tmp_path / "plain.pth")
    assert "ran" not in capsys.readouterr().out


def test_pickle_that_is_no_state_dict(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="not a state dict"):
        load_model(Net, tmp_path / "list.pth")


def test_missing_file_and_its_converted_twin(tmp_path, file, state):
    with pytest.raises(CheckpointError, match=r"other\.pth: no such file \(nor other\.safetensors\)"):
        load_model(Net, tmp_path / "other.pth")
    same(load_model(Net, tmp_path / "net.pth"), state)  # net.safetensors stands in for net.pth


# ---- checkpoint folders ----


def shards(folder, state, index=True):
    base = [k for k in state if not k.startswith("norm_x")]
    parts = {
        "diffusion_pytorch_model-00001-of-00002.safetensors": [k for k in base if "blocks" not in k],
        "diffusion_pytorch_model-00002-of-00002.safetensors": [k for k in base if "blocks" in k],
    }
    for name, names in parts.items():
        save_file({k: state[k] for k in names}, folder / name)
    if index:
        weight_map = {k: name for name, names in parts.items() for k in names}
        path = folder / "diffusion_pytorch_model.safetensors.index.json"
        path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"_class_name": "WanModel", "in_dim": 6, "dim": 8, "num_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))
    return {k: v for k, v in state.items() if k.startswith("norm_x")}


@pytest.fixture
def folder(tmp_path, state):
    path = tmp_path / "Wan"
    path.mkdir()
    audio = shards(path, state)
    save_file(audio, path / "multitalk.safetensors")
    return path


def test_shards_and_audio_weights_merge(folder, state):
    same(load_pretrained(Net, folder, dtype=torch.float32), state)
    model = load_pretrained(Net, folder)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_audio_weights_from_another_folder(folder, state, tmp_path):
    other = tmp_path / "MeiGen"
    other.mkdir()
    (folder / "multitalk.safetensors").rename(other / "multitalk.safetensors")
    before = sorted(p.name for p in folder.iterdir())
    same(load_pretrained(Net, folder, extra=[other], dtype=torch.float32), state)
    same(load_pretrained(Net, folder, extra=[other / "multitalk.safetensors"], dtype=torch.float32), state)
    assert sorted(p.name for p in folder.iterdir()) == before
    with pytest.raises(KeyMismatchError, match=r"norm_x.weight"):
        load_pretrained(Net, folder)
    with pytest.raises(CheckpointError, match="no such file"):
        load_pretrained(Net, folder, extra=[tmp_path / "nowhere" / "multitalk.safetensors"])


def test_index_of_multitalk_may_name_its_own_file(folder, state):
    path = folder / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= {"norm_x.weight": "multitalk.safetensors", "norm_x.bias": "multitalk.safetensors"}
    path.write_text(json.dumps(index))
    same(load_pretrained(Net, folder, dtype=torch.float32), state)


def test_model_without_audio_ignores_the_audio_file(folder):
    class Plain(Net):
        def __init__(self, in_dim=6, dim=8, num_layers=2):
            super().__init__(in_dim, dim, num_layers)
            del self.norm_x

    load_pretrained(Plain, folder)


def test_missing_shard_is_named(folder):
    (folder / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00002.*index.json names it"):
        load_pretrained(Net, folder)


def test_the_same_tensor_in_two_files_is_an_error(folder, state):
    save_file({"scale": state["scale"]}, folder / "diffusion_pytorch_model-old.safetensors")
    with pytest.raises(CheckpointError, match="'scale' is there twice"):
        load_pretrained(Net, folder)


def test_config_values_and_overrides(folder, state):
    with pytest.raises(KeyMismatchError) as caught:
        load_pretrained(Net, folder, num_layers=3)
    assert caught.value.missing == ("blocks.2.weight", "blocks.2.bias")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_pretrained(Net, folder)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_bad_config_is_named(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_pretrained(Net, folder)


def test_no_folder_and_empty_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        loading.dit_files(tmp_path / "no")
    with pytest.raises(CheckpointError, match="there is no diffusion_pytorch_model"):
        loading.dit_files(tmp_path)


# ---- progress ----


def test_progress_counts_all_bytes(file):
    calls = []
    load_model(Net, file, progress=lambda *call: calls.append(call))
    total = sum(e.nbytes for e in read_header(file).values())
    assert calls[-1] == (total, total, "load")
    assert [c[0] for c in calls] == sorted(c[0] for c in calls)


def test_progress_can_stop_the_loading(file):
    class Stop(Exception):  # noqa: N818
        pass

    def stop(*_):
        raise Stop

    with pytest.raises(Stop):
        load_model(Net, file, progress=stop)


# ---- wav2vec2 folders ----


@pytest.mark.parametrize("naming", ["new", "old"])
def test_wav2vec2_folder_under_both_namings(tmp_path, naming):
    from goldens import config, error, fill, index, load

    from wan.modules.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model

    model = fill(Wav2Vec2Model(Wav2Vec2Config.from_dict(config("wav2vec2"))), "wav2vec2")
    names = dict(model.state_dict())
    if naming == "old":
        new_names = "parametrizations.weight.original0", "parametrizations.weight.original1"
        swap = dict(zip(new_names, ("weight_g", "weight_v"), strict=True))
        for new, old in swap.items():
            names = {("wav2vec2." + k if new in k else k).replace(new, old): v for k, v in names.items()}
        names = {k if k.startswith("wav2vec2.") else f"wav2vec2.{k}": v for k, v in names.items()}
        names |= {"quantizer.codevectors": torch.zeros(1), "project_q.weight": torch.zeros(2, 2)}
        torch.save(names, tmp_path / "pytorch_model.bin")
    else:
        save_file(names, tmp_path / "model.safetensors")
    sizes = {k: list(v) if isinstance(v, tuple) else v for k, v in config("wav2vec2").items()}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    loaded = loading.load_wav2vec2(tmp_path)
    golden = load("wav2vec2")
    embedding = loaded.embed(golden["wav"], index("wav2vec2")["seq_len"])
    assert error(embedding, golden["audio_embedding"]) < 1e-5


def test_wav2vec2_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"none of model\.safetensors"):
        loading.load_wav2vec2(tmp_path)
