"""Loading the real-width DiT: official layout (fp32 shards) against the converted one, and torch's own
reader.

    python benchmarks/wan_loading.py --blocks 6 --folder /tmp/ckpt

Writes a checkpoint with that many of the 40 blocks, converts its DiT, and loads both to the GPU (or CPU).
Files are in the page cache, so the figures are of the software, not of the disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from wan.convert import collect
from wan.loading import build_from_config, config_arguments, dit_files, load_pretrained
from wan.modules.multitalk_model import WanModel
from wan.shards import block_order, shards, write

SIZES = {"model_type": "i2v", "in_dim": 36, "dim": 5120, "ffn_dim": 13824, "num_heads": 40}


def official(folder: Path, blocks: int) -> None:
    """fp32 shards and multitalk.safetensors, random numbers."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SIZES | {"num_layers": blocks}))
    model = build_from_config(WanModel, config_arguments(WanModel, folder))
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        audio = "audio" in name or "norm_x" in name
        block = int(name.split(".")[1]) // 3 if name.startswith("blocks.") else 0
        file = "multitalk" if audio else f"diffusion_pytorch_model-{block:05d}"
        parts.setdefault(file, {})[name] = torch.empty(tensor.shape).uniform_(-1, 1)
    for file, tensors in parts.items():
        save_file(tensors, folder / f"{file}.safetensors")


def converted(source: Path, folder: Path) -> None:
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    model = build_from_config(WanModel, config_arguments(WanModel, source))
    for plan in shards(collect(dit_files(source), model, dtype=torch.bfloat16, order=block_order), 5 << 30):
        write(folder, plan, lambda _: None)


def timed(what: str, folder: Path, run) -> None:
    begin = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    row = {
        "what": what,
        "gb": round(size / 1e9, 2),
        "s": round(seconds, 2),
        "gb_s": round(size / seconds / 1e9, 2),
    }
    print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 8])
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.empty(1, device=device)
    a, b = options.folder / "official", options.folder / "converted"
    official(a, options.blocks)
    timed("convert", a, lambda: converted(a, b))
    for threads in options.threads:
        for name, folder in (("official", a), ("converted", b)):
            run = lambda f=folder, t=threads: load_pretrained(WanModel, f, device=device, threads=t)  # noqa: E731
            timed(f"{name} to {device}, {threads} threads", folder, run)

    def plain(folder: Path) -> None:
        state = {k: v for f in dit_files(folder) for k, v in load_file(f).items()}
        {k: v.to(torch.bfloat16).to(device) for k, v in state.items()}

    timed(f"official to {device}, safetensors.load_file then cast", a, lambda: plain(a))
    timed(f"converted to {device}, safetensors.load_file", b, lambda: plain(b))
    x, y = (load_pretrained(WanModel, f, device=device) for f in (a, b))
    same = all(
        torch.equal(p, q) for p, q in zip(x.state_dict().values(), y.state_dict().values(), strict=True)
    )
    print(json.dumps({"same numbers": same}))
    shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
