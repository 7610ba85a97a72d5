"""Loading converted weights from the local disk to the GPU, against what the disk itself gives in the same
run.

    python benchmarks/gpu/load.py --out load.json                 # as many of the 40 blocks as time allows
    python benchmarks/gpu/load.py --tiny --device cpu --out load.json

Writes a converted checkpoint, drops it from the page cache, and reads it in turn with O_DIRECT (1 and 8
readers: the disk) and with `load_pretrained` (cold: what a start of a worker does). `read_from_disk` is how
much of the bytes the kernel really fetched (/proc/self/io), so that a warm cache can't pass for a fast
disk.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import torch  # noqa: E402
from setting import REAL, TINY, build  # noqa: E402
from sheet import Sheet, device_of, parser, say  # noqa: E402

from wan.loading import load_pretrained  # noqa: E402
from wan.modules.multitalk_model import WanModel  # noqa: E402
from wan.shards import Item, block_order, header, shards  # noqa: E402

PIECE = 16 << 20
AIM = 0.8


def write_checkpoint(model: WanModel, config: dict[str, int], folder: Path, limit: int) -> int:
    """The model as `wan.convert` lays it out, in files of at most `limit` bytes, on the disk when it
    returns.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "i2v"} | config))
    state = model.state_dict()
    names = sorted(state, key=block_order)
    items = [Item(name=n, dtype=state[n].dtype, source=state[n]) for n in names]
    total = 0
    for plan in shards(items, limit):
        with (folder / plan.name).open("wb", buffering=0) as file:
            total += file.write(header(plan.items))
            for item in plan.items:
                view = memoryview(item.source.contiguous().cpu().view(-1).view(torch.uint8).numpy())
                done = 0
                while done < len(view):
                    done += file.write(view[done : done + (1 << 30)])
                total += len(view)
            os.fsync(file.fileno())
    return total


def forget(files: list[Path]) -> None:
    """Out of the page cache: only clean pages go, and the files were synced."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def direct_read(files: list[Path], readers: int) -> None:
    """Every byte of the files past the page cache, `readers` pieces at a time."""
    work = [(p, at) for p in files for at in range(0, p.stat().st_size, PIECE)]
    descriptors = {p: os.open(p, os.O_RDONLY | os.O_DIRECT) for p in files}
    buffers: dict[int, mmap.mmap] = {}  # page-aligned, as O_DIRECT wants them

    def read(index: int) -> None:
        buffer = buffers.setdefault(index, mmap.mmap(-1, PIECE))
        for path, at in work[index::readers]:
            os.preadv(descriptors[path], [buffer], at)

    try:
        with ThreadPoolExecutor(max_workers=readers) as pool:
            list(pool.map(read, range(readers)))
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def fetched() -> int:
    """Bytes that the kernel has read from storage for this process."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))
    except (OSError, StopIteration):
        return 0


def clocked(what: str, size: int, run: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    before, begin = fetched(), time.perf_counter()
    try:
        run()
    except OSError as error:
        return {"what": what, "failed": f"{type(error).__name__}: {error}"}
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - begin
    row = {"what": what, "s": round(seconds, 3), "gb_s": round(size / seconds / 1e9, 3)}
    row["read_from_disk"] = round((fetched() - before) / size, 3)
    say(str(row))
    return row


def affordable(folder: Path, budget_s: float) -> int:
    """How many of the 40 blocks can be written in the time and on the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    probe, data = folder / "probe", os.urandom(1 << 20) * 512
    begin = time.perf_counter()
    with probe.open("wb", buffering=0) as file:
        file.write(data)
        os.fsync(file.fileno())
    rate = len(data) / (time.perf_counter() - begin)
    probe.unlink()
    room = shutil.disk_usage(folder).free - (4 << 30)
    block = 0.95e9
    count = int(min(REAL["num_layers"], rate * budget_s / block, room / block))
    say(f"the disk writes {rate / 1e9:.2f} GB/s and has {room / 1e9:.0f} GB: {count} blocks")
    return max(2, count)


def measure(sheet: Sheet, folder: Path, config: dict[str, int], device: torch.device, limit: int) -> None:
    sheet["disk"] = {"folder": str(folder), "free_gb": round(shutil.disk_usage(folder).free / 1e9, 1)}
    model = build(config, device, torch.bfloat16)
    checkpoint = folder / "checkpoint"
    begin = time.perf_counter()
    size = write_checkpoint(model, config, checkpoint, limit)
    sheet["written"] = {"blocks": config["num_layers"], "gb": round(size / 1e9, 3)}
    sheet["written"]["gb_s"] = round(size / (time.perf_counter() - begin) / 1e9, 3)
    say(f"written: {sheet['written']}")
    files = sorted(checkpoint.glob("*.safetensors"))
    loaded: list[WanModel] = []

    def load() -> None:
        loaded[:] = [load_pretrained(WanModel, checkpoint, device=device)]

    rows: list[dict[str, Any]] = []
    sheet["rows"] = rows
    order = [("O_DIRECT, 1 reader", 1), ("O_DIRECT, 8 readers", 8), ("load, cold", 0)]
    for _ in range(2):
        for what, readers in order:
            forget(files)
            loaded.clear()
            run = load if not readers else lambda r=readers: direct_read(files, r)
            rows.append(clocked(what, size, run, device))
            sheet.save()
            if sheet.left < 40:
                break
    rows.append(clocked("load, warm", size, load, device))
    twin = loaded[0].state_dict()
    sheet["same_numbers"] = all(torch.equal(v, twin[k]) for k, v in model.state_dict().items())
    best = {}
    for row in rows:
        kind = "disk" if row["what"].startswith("O_DIRECT") else row["what"]
        best[kind] = max(best.get(kind, 0.0), row.get("gb_s", 0.0))
    cold = [r["gb_s"] for r in rows if r["what"] == "load, cold"]
    share = round(best["load, cold"] / best["disk"], 3) if best.get("disk") and cold else None
    sheet["best_gb_s"] = best
    sheet["share_of_disk"] = share


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk meant")
    options.add_argument("--blocks", type=int, help="of 40 (default: what 45 s of writing allow)")
    args = options.parse_args()
    device = device_of(args, options)
    folder = args.folder / f"mt-load-{os.getpid()}"
    sheet = Sheet(args.out, "load.py", device, args.budget_s)
    try:
        folder.mkdir(parents=True)
        if args.tiny:
            config, limit = TINY, 4 << 20
        else:
            blocks = args.blocks or affordable(folder, 45 if args.budget_s is None else args.budget_s / 4)
            config, limit = REAL | {"num_layers": blocks}, 5 << 30
        with torch.inference_mode():
            measure(sheet, folder, config, device, limit)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print({k: sheet.data.get(k) for k in ("written", "best_gb_s", "share_of_disk", "same_numbers")})
    for row in sheet["rows"]:
        print(row)
    return 0 if sheet["same_numbers"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
