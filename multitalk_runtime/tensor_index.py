"""Which tensors a model file holds, by name, shape and dtype, without reading one and without torch."""

from __future__ import annotations

import collections
import pickle
import zipfile
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import BinaryIO

__all__ = ["FileProblem", "Tensor", "check_plain", "read_index"]

LFS_MARK = b"version https://git-lfs"
MAX_PICKLE = 64 << 20  # bytes of names and shapes; the real ones are below one MiB
ITEM = {"Float": 4, "Half": 2, "BFloat16": 2, "Double": 8, "Long": 8, "Int": 4, "Short": 2, "Char": 1,
        "Byte": 1, "Bool": 1}  # fmt: skip


class FileProblem(Exception):  # noqa: N818 - it is told to the user as a problem of the file
    """What is wrong with a file, and what to do."""

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(problem)
        self.problem, self.fix = problem, fix


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """`dtype` as safetensors names it (F32, BF16 …), or torch's storage name (Float, Half …)."""

    shape: tuple[int, ...]
    dtype: str


def check_plain(path: Path) -> int:
    """The file's size. Raises FileProblem if it is not there, empty, or only stands for another one."""
    if path.is_symlink() and not path.exists():
        raise FileProblem("the link leads nowhere", "correct the link, or fetch the file")
    if not path.is_file():
        for part in (path.with_name(path.name + ".part"), path.with_name(path.name + ".incomplete")):
            if part.exists():
                msg = f"the download has not ended ({part.name} is there)"
                raise FileProblem(msg, "fetch it again")
        raise FileProblem("no such file", "fetch it")
    size = path.stat().st_size
    if not size:
        raise FileProblem("the file is empty", "fetch it again")
    if size < 1024:
        with path.open("rb") as file:
            if file.read(len(LFS_MARK)) == LFS_MARK:
                raise FileProblem("this is a Git-LFS pointer, not the file", "run `git lfs pull` there")
    return size


def read_index(path: Path) -> dict[str, Tensor]:
    """Tensor names of a `.safetensors`, `.pth` or `.bin` file. Raises FileProblem."""
    check_plain(path)
    return _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:  # checks offsets and length against the header
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return {
                n: Tensor(shape=tuple(s.get_shape()), dtype=str(s.get_dtype())) for n, s in slices.items()
            }
    except (SafetensorError, OSError, ValueError) as error:
        msg = f"not an intact safetensors file ({error})"
        raise FileProblem(msg, "fetch it again") from error


def _pickled(path: Path) -> dict[str, Tensor]:
    try:
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                return _old_format(file)
        with zipfile.ZipFile(path) as archive:
            entry = next((n for n in archive.namelist() if n.endswith("/data.pkl")), None)
            if entry is None:
                raise FileProblem("this zip file holds no tensors", "fetch it again")
            if archive.getinfo(entry).file_size > MAX_PICKLE:
                raise FileProblem("its index is implausibly large", "fetch it again")
            with archive.open(entry) as file:
                reader = _Names(file)
                state = reader.load()
            sizes = {info.filename.rpartition("/")[2]: info.file_size for info in archive.infolist()}
            _check_storages(reader.storages, sizes)
            return _state(state)
    except FileProblem:
        raise
    except Exception as error:  # pickle raises whatever the bytes lead to
        msg = f"its index can't be read ({type(error).__name__}: {error})"
        raise FileProblem(msg, "fetch it again") from error


def _old_format(file: BinaryIO) -> dict[str, Tensor]:
    """Before torch 1.6: four pickles in a row (magic, version, system, state), then the data."""
    for _ in range(3):
        _Names(file).load()
    return _state(_Names(file).load())


def _state(state: object) -> dict[str, Tensor]:
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise FileProblem("this is not a mapping of names to tensors", "is it the right file?")
    return dict(state)


def _check_storages(storages: Mapping[str, int], sizes: Mapping[str, int]) -> None:
    for key, wanted in storages.items():
        if sizes.get(key) != wanted:
            msg = f"the data of tensor {key} has {sizes.get(key, 0)} bytes, not {wanted}"
            raise FileProblem(msg, "fetch it again")


class _Storage:
    """Stands for torch.FloatStorage and its like: only the name counts."""

    def __init__(self, name: str) -> None:
        self.name = name.removesuffix("Storage")


def _rebuild(storage: _Storage, _offset: int, shape: tuple[int, ...], *_: object) -> Tensor:
    return Tensor(shape=tuple(shape), dtype=storage.name)


def _parameter(data: Tensor, *_: object) -> Tensor:
    return data


class _Names(pickle.Unpickler):
    """Reads names and shapes; knows a handful of names and calls nothing of what the file brings."""

    KNOWN = {  # noqa: RUF012 - a constant
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
        ("torch._utils", "_rebuild_tensor"): _rebuild,
        ("torch._utils", "_rebuild_parameter"): _parameter,
    }

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.storages: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.KNOWN:
            return self.KNOWN[module, name]
        if module in ("torch", "torch.storage") and name.removesuffix("Storage") in ITEM:
            return _Storage(name)
        msg = f"refused: it asks for {module}.{name}"
        raise FileProblem(msg, "only tensors are loaded: fetch the published file")

    def persistent_load(self, pid: Any) -> _Storage:
        _, storage, key, _, count = pid[:5]
        self.storages[str(key)] = prod((count, ITEM[storage.name]))
        return storage
