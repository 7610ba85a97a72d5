"""The published files at their real sizes, as holes; and a stand-in for the Hub on loopback."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from multitalk_runtime.model_dirs import ModelDirs
from multitalk_runtime.published import CONFIG, MODELS, published_shapes
from multitalk_runtime.tiny import PREPROCESSOR

if TYPE_CHECKING:
    from collections.abc import Mapping

KEYS = Path(__file__).resolve().parents[1] / "golden" / "keys"
ITEM = {"F32": 4, "BF16": 2}
STORAGE = {"F32": torch.FloatStorage, "BF16": torch.BFloat16Storage}


def keys(name: str) -> dict[str, tuple[int, ...]]:
    """Name → shape of the real network, from the golden lists (which do not come from this code)."""
    content = json.loads((KEYS / f"{name}.json").read_text())
    found = content.get("keys") or content.get("shapes") or {}
    return {k: tuple(v) for k, v in found.items()}


def sparse_safetensors(path: Path, tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
    header: dict[str, Any] = {}
    at = 0
    for name, (shape, dtype) in tensors.items():
        size = prod(shape) * ITEM[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)


class _Storage:
    def __init__(self, key: int, dtype: str, count: int) -> None:
        self.pid = ("storage", STORAGE[dtype], str(key), "cpu", count)


class _Tensor:
    def __init__(self, storage: _Storage, shape: tuple[int, ...]) -> None:
        self.arguments = (storage, 0, shape, (), False, OrderedDict())

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, self.arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, item: object) -> Any:
        return item.pid if isinstance(item, _Storage) else None


def sparse_pth(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, size: int) -> None:
    """What torch.save writes for such tensors, with holes for data, filled up to exactly `size` bytes."""
    sizes = [prod(shape) for shape in shapes.values()]
    state = OrderedDict(
        (name, _Tensor(_Storage(i, dtype, sizes[i]), shape)) for i, (name, shape) in enumerate(shapes.items())
    )
    index = io.BytesIO()
    _Pickler(index, protocol=2).dump(state)
    parts = {f"archive/data/{i}": count * ITEM[dtype] for i, count in enumerate(sizes)}
    _write_zip(path, index.getvalue(), parts, 0)
    rest = size - path.stat().st_size
    assert rest >= 0, (path.name, rest)
    _write_zip(path, index.getvalue(), parts, rest)
    assert path.stat().st_size == size


def _write_zip(path: Path, index: bytes, parts: Mapping[str, int], rest: int) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", index, zipfile.ZIP_DEFLATED)  # torch stores it; room for `rest`
        for name, size in {**parts, "archive/rest": rest}.items():
            info = zipfile.ZipInfo(name)
            info.file_size = info.compress_size = size
            info.CRC = 0
            info.header_offset = archive.fp.tell()
            archive.fp.write(info.FileHeader(zip64=size > 2**31 - 1))
            archive.fp.seek(size, 1)
            archive.filelist.append(info)
            archive.NameToInfo[name] = info
            archive.start_dir = archive.fp.tell()


def write_published(root: Path) -> ModelDirs:
    """All three folders, 92.6 GB long and nearly empty on disk."""
    dirs = ModelDirs.under(root)
    sizes = {file.name: file.size for model in MODELS for file in model.files}
    for folder in (dirs.wan / "google" / "umt5-xxl", dirs.multitalk, dirs.wav2vec):
        folder.mkdir(parents=True)
    (dirs.wan / "config.json").write_text(json.dumps({"_class_name": "WanModel", **CONFIG}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (dirs.wan / "google" / "umt5-xxl" / name).write_text("{}")
    dit = keys("dit_multitalk_i2v_14B")
    audio = {n for n in dit if "audio" in n or "norm_x" in n}
    base = [n for n in dit if n not in audio]
    for part in range(7):
        name = f"diffusion_pytorch_model-{part + 1:05d}-of-00007.safetensors"
        sparse_safetensors(dirs.wan / name, {n: (dit[n], "F32") for n in base[part::7]})
    multitalk = dirs.multitalk / "multitalk.safetensors"
    order = sorted(
        audio, key=lambda n: ("norm_x" in n, n)
    )  # as safetensors writes: wide types first, by name
    sparse_safetensors(multitalk, {n: (dit[n], "BF16" if "norm_x" in n else "F32") for n in order})
    pad_header(multitalk, sizes["multitalk.safetensors"])
    for name, network, dtype in (
        ("models_t5_umt5-xxl-enc-bf16.pth", "t5_umt5_xxl_encoder", "BF16"),
        ("models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth", "clip_xlm_roberta_vit_h_14", "F32"),
        ("Wan2.1_VAE.pth", "vae", "F32"),
    ):
        sparse_pth(dirs.wan / name, keys(network), dtype, sizes[name])
    (dirs.wav2vec / "config.json").write_bytes((KEYS / "chinese_wav2vec2_base_config.json").read_bytes())
    (dirs.wav2vec / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    speech = {f"wav2vec2.{n}": s for n, s in keys("wav2vec2_base").items()} | {
        "quantizer.codevectors": (4, 4)
    }
    sparse_pth(dirs.wav2vec / "pytorch_model.bin", speech, "F32", sizes["pytorch_model.bin"])
    assert set(published_shapes()) == {"dit", "t5", "clip", "vae", "wav2vec"}
    return dirs


def pad_header(path: Path, size: int) -> None:
    """Bring a sparse safetensors file to a size by blanks after its header, which the format allows."""
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        text = file.read(length)
        data = path.stat().st_size - 8 - length
        blanks = size - 8 - length - data
        assert blanks >= 0, blanks
        file.seek(0)
        file.write(struct.pack("<Q", len(text) + blanks) + text + b" " * blanks)
        file.truncate(size)


class Hub(http.server.ThreadingHTTPServer):
    """Answers `/REPO/resolve/REVISION/FILE` as the Hub does, for files of a folder of repositories."""

    daemon_threads = True

    def __init__(self, files: Mapping[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.files = dict(files)
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _HubHandler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        repo, _, rest = self.path.lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        content = self.server.files.get(f"{repo}/{name}")
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", revision)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", revision)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass
