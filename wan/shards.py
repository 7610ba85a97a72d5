"""Files of a converted checkpoint: which tensors lie in which, in what order, and how one is written.

Tensors lie in the order in which a model is computed, q, k and v of an attention side by side, so that
reading goes through a file once and the three can be read as one matrix.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan.tensor_files import DTYPES, TensorEntry, move, read_safetensors

BATCH_BYTES = 512 << 20  # read, cast and written at a time
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class ConvertedFile:
    """One written file: its name in the output folder, bytes, SHA-256 and number of tensors."""

    name: str
    bytes: int
    sha256: str
    tensors: int


@dataclass(frozen=True, kw_only=True)
class Item:
    """One tensor to write: its name and dtype there, and where it comes from."""

    name: str
    dtype: torch.dtype
    source: TensorEntry | Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.source.shape)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One file to write."""

    name: str
    items: tuple[Item, ...] = field(repr=False)

    @property
    def nbytes(self) -> int:
        return sum(item.nbytes for item in self.items)


def block_order(name: str) -> tuple[Any, ...]:
    """Sort key: what comes before the blocks, the blocks by number, the rest; q, k and v of one attention
    together.
    """
    parts = name.split(".")
    if parts[0] != "blocks":
        return (2 if parts[0] == "head" else 0, 0, "", "", name)
    # within an attention: all weights q k v …, then all biases: then q, k and v can be read as one matrix
    projection = {"q": "0", "k": "1", "v": "2", "k_img": "3", "v_img": "4"}.get(parts[-2], f"9{parts[-2]}")
    return (1, int(parts[1]), ".".join(parts[2:-2]), "0" if parts[-1] == "weight" else "1", projection)


def shards(items: Iterable[Item], limit: int) -> Iterator[Plan]:
    """Cut the DiT into files of at most `limit` bytes (a larger tensor gets its own)."""
    groups: list[list[Item]] = [[]]
    size = 0
    for item in items:
        if groups[-1] and size + item.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += item.nbytes
    for number, group in enumerate(groups, 1):
        name = f"diffusion_pytorch_model-{number:05d}-of-{len(groups):05d}.safetensors"
        yield Plan(name=name, items=tuple(group))


def write(folder: Path, plan: Plan, count: Callable[[int], None]) -> ConvertedFile:
    """Write one file as `NAME.part`, then give it its name; while one batch is written, the next is read."""
    path = folder / plan.name
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    digest = hashlib.sha256()
    try:
        with part.open("wb") as file, ThreadPoolExecutor(max_workers=1) as ahead:

            def put(data: bytes | memoryview) -> None:
                file.write(data)
                digest.update(data)

            put(header(plan.items))
            pending = [ahead.submit(read_batch, batch) for batch in batches(plan.items)[:1]]
            for number, batch in enumerate(batches(plan.items)):
                tensors = pending.pop().result()
                pending = [
                    ahead.submit(read_batch, later) for later in batches(plan.items)[number + 1 : number + 2]
                ]
                for item in batch:
                    put(memoryview(tensors.pop(item.name).reshape(-1).view(torch.uint8).numpy()))
                    count(item.nbytes)
            file.flush()
            os.fsync(file.fileno())
        size = part.stat().st_size
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return ConvertedFile(name=plan.name, bytes=size, sha256=digest.hexdigest(), tensors=len(plan.items))


def header(items: Sequence[Item]) -> bytes:
    """The length and JSON header of a safetensors file that holds the items in this order."""
    spec: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for item in items:
        offsets = [at, at + item.nbytes]
        spec[item.name] = {"dtype": DTYPE_NAMES[item.dtype], "shape": item.shape, "data_offsets": offsets}
        at += item.nbytes
    text = json.dumps(spec, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    return struct.pack("<Q", len(text)) + text


def batches(items: Sequence[Item]) -> list[list[Item]]:
    """Groups of at most `BATCH_BYTES` (a larger tensor alone)."""
    groups: list[list[Item]] = []
    size = 0
    for item in items:
        if not groups or size + item.nbytes > BATCH_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += item.nbytes
    return groups


def read_batch(items: Sequence[Item]) -> dict[str, Tensor]:
    """The items' tensors, cast."""
    dtypes = {item.name: item.dtype for item in items}
    rule = lambda name, _: dtypes[name]  # noqa: E731
    entries = [i.source.named(i.name) for i in items if isinstance(i.source, TensorEntry)]
    tensors = {i.name: i.source for i in items if isinstance(i.source, Tensor)}
    return read_safetensors(entries, dtype=rule) | move(tensors, dtype=rule)
