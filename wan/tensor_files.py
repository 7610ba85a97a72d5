"""Reading tensors from files: safetensors by threaded reads, `.pth`/`.bin` without running what is in them.

A safetensors file is 8 bytes of header length, a JSON header (name → dtype, shape, data_offsets), then the
data. Reading it through a memory map with one thread is bound by page-fault latency (performance.md §5.1),
so here several threads read pieces straight to where they belong: into the final tensor if nothing has to be
cast, else through a small buffer (pinned for CUDA) from which the piece is cast and copied.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import threading
import zipfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["CheckpointError", "TensorEntry", "read_header", "read_pickle", "read_safetensors"]

Progress = Callable[[int, int, str], None]
"""progress(done bytes, all bytes, stage)."""
DtypeRule = torch.dtype | Callable[[str, torch.dtype], torch.dtype] | None
"""The dtype wanted: one for all, a function of (name, dtype in the file), or None for what is in the file.

It applies to floating-point tensors only.
"""

PIECE_BYTES = 32 << 20
MAX_HEADER_BYTES = 100 << 20  # the limit of the format itself
THREADS = 8
LFS_MARK = b"version https://git-lfs"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class CheckpointError(Exception):
    """A model file or folder that can't be used; the message names the file and what to do."""

    def __init__(self, path: str | os.PathLike[str], problem: str, fix: str) -> None:
        super().__init__(f"{path}: {problem}. {fix}")
        self.path, self.problem, self.fix = Path(path), problem, fix


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Where one tensor lies: bytes [start, stop) of the file at `path`."""

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    def named(self, name: str) -> TensorEntry:
        """The same bytes under another name."""
        return replace(self, name=name)


def check_file(path: Path) -> int:
    """The size of the file; CheckpointError if it is missing, empty or a Git-LFS pointer."""
    if not path.is_file():
        raise CheckpointError(path, "no such file", "Download it, or correct the folder")
    size = path.stat().st_size
    if size == 0:
        raise CheckpointError(path, "the file is empty", "Download it again")
    if size < 1024:
        with path.open("rb") as file:
            if file.read(len(LFS_MARK)) == LFS_MARK:
                raise CheckpointError(
                    path, "this is a Git-LFS pointer, not the file", "Run `git lfs pull` there"
                )
    return size


def _corrupt(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(path, problem, "The file is truncated or corrupt: download it again")


def read_header(path: str | os.PathLike[str]) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file in the order of their data; reads the header only.

    Raises CheckpointError for a file that is missing, truncated, or not a well-formed safetensors file.
    """
    path = Path(path)
    size = check_file(path)

    with path.open("rb") as file:
        head = file.read(8)
        if len(head) < 8:
            raise _corrupt(path, f"{size} bytes are too few for a safetensors file")
        (length,) = struct.unpack("<Q", head)
        if length > MAX_HEADER_BYTES:
            raise _corrupt(path, f"this is not a safetensors file (its header would have {length} bytes)")
        text = file.read(length)
    if len(text) < length:
        raise _corrupt(path, f"the header should have {length} bytes, the file has {len(text)} of them")
    try:
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        entries = [_entry(path, name, spec, 8 + length) for name, spec in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _corrupt(path, f"the header can't be read ({type(error).__name__}: {error})") from error
    entries.sort(key=lambda entry: entry.start)
    end = 8 + length
    for entry in entries:
        if entry.start != end:
            raise _corrupt(path, f"the data of {entry.name!r} starts at byte {entry.start}, expected {end}")
        end = entry.stop
    if end != size:
        raise _corrupt(path, f"the header describes {end} bytes, the file has {size}")
    return {entry.name: entry for entry in entries}


def _entry(path: Path, name: str, spec: dict[str, Any], base: int) -> TensorEntry:
    start, stop = spec["data_offsets"]
    if spec["dtype"] not in DTYPES:
        msg = f"dtype {spec['dtype']} of {name!r} is unknown"
        raise ValueError(msg)
    dtype, shape = DTYPES[spec["dtype"]], tuple(spec["shape"])
    if stop - start != prod(shape) * dtype.itemsize:
        msg = f"{name!r} has {stop - start} bytes, {dtype} {list(shape)} needs {prod(shape) * dtype.itemsize}"
        raise ValueError(msg)
    return TensorEntry(name=name, path=path, dtype=dtype, shape=shape, start=base + start, stop=base + stop)


def target_dtype(rule: DtypeRule, name: str, dtype: torch.dtype) -> torch.dtype:
    """What a tensor stored as `dtype` becomes under `rule`."""
    if rule is None or not dtype.is_floating_point:
        return dtype
    return rule if isinstance(rule, torch.dtype) else rule(name, dtype)


def read_safetensors(
    entries: Iterable[TensorEntry],
    *,
    dtype: DtypeRule = None,
    device: str | torch.device = "cpu",
    threads: int = THREADS,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Read the tensors that `read_header` described, cast and on `device`. Peak extra memory: threads · 32
    MiB.

    Raises CheckpointError if a file ends early. An exception of `progress` stops the reading and is passed
    on.
    """
    entries = sorted(entries, key=lambda e: (str(e.path), e.start))
    if not entries:
        return {}
    device = torch.device(device)
    out = {
        e.name: torch.empty(e.shape, dtype=target_dtype(dtype, e.name, e.dtype), device=device)
        for e in entries
    }
    total = sum(e.nbytes for e in entries)
    work = [(e, at) for e in entries for at in range(0, e.nbytes, PIECE_BYTES)]
    files = {path: os.open(path, os.O_RDONLY) for path in {e.path for e in entries}}
    meter = _Meter(total, progress)
    staging = threading.local()

    inference = torch.is_inference_mode_enabled()  # threads don't inherit it, and `out` is of that kind

    def read(piece: tuple[TensorEntry, int]) -> None:
        with torch.inference_mode(inference):
            read_piece(piece)

    def read_piece(piece: tuple[TensorEntry, int]) -> None:
        entry, at = piece
        meter.check()
        size = min(PIECE_BYTES, entry.nbytes - at)
        item = entry.dtype.itemsize
        target = out[entry.name].view(-1)[at // item : (at + size) // item]
        direct = device.type == "cpu" and target.dtype == entry.dtype
        if direct:
            raw = target.view(torch.uint8)
        else:
            if not hasattr(staging, "buffer"):
                staging.buffer = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
            raw = staging.buffer[:size]
        _read_into(files[entry.path], raw, entry, at)
        if not direct:
            # Cast on the device (on a GPU faster than on the host), and wait: the buffer is used again.
            target.copy_(raw.view(entry.dtype).to(device))
        meter.add(size)

    try:
        with ThreadPoolExecutor(max_workers=max(1, min(threads, len(work)))) as pool:
            futures = [pool.submit(read, piece) for piece in work]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                meter.stop()  # the pieces still queued return at once
                raise
    finally:
        for descriptor in files.values():
            os.close(descriptor)
    return out


class _Meter:
    """Counts bytes from several threads, reports them, and tells the threads when to stop."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress = total, progress
        self._done, self._stopped, self._lock = 0, False, threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._progress is not None:
                self._progress(self._done, self._total, "load")

    def stop(self) -> None:
        self._stopped = True

    def check(self) -> None:
        if self._stopped:
            msg = "reading was stopped"
            raise InterruptedError(msg)


def _read_into(descriptor: int, raw: Tensor, entry: TensorEntry, at: int) -> None:
    view = memoryview(raw.numpy())
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], entry.start + at + done)
        if count == 0:
            raise CheckpointError(entry.path, f"the file ends inside {entry.name!r}", "Download it again")
        done += count


def read_pickle(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a `.pth`/`.pt`/`.bin` file, memory-mapped where its format allows; never runs code from
    it.

    Raises CheckpointError for a file that is missing, truncated, holds more than tensors, or is not a state
    dict.
    """
    path = Path(path)
    check_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        fix = "Only tensors are loaded: get the original file, or its safetensors version"
        first_line = str(error).strip().partition("\n")[0]
        raise CheckpointError(path, f"refused by the weights-only loader ({first_line})", fix) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise _corrupt(path, f"can't be read ({type(error).__name__}: {first_line})") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(
            path, "this is not a state dict (a mapping of names to tensors)", "Is it the right file?"
        )
    return dict(state)


def move(
    state: Mapping[str, Tensor],
    *,
    dtype: DtypeRule = None,
    device: str | torch.device = "cpu",
    threads: int = THREADS,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Cast and copy memory-mapped tensors in several threads, so that page faults overlap. New memory
    throughout.
    """
    meter = _Meter(sum(t.nbytes for t in state.values()), progress)

    def one(item: tuple[str, Tensor]) -> tuple[str, Tensor]:
        name, tensor = item
        copy = tensor.to(device, target_dtype(dtype, name, tensor.dtype), copy=True)
        meter.add(tensor.nbytes)
        return name, copy

    with ThreadPoolExecutor(max_workers=max(1, threads)) as pool:
        return dict(pool.map(one, state.items()))
