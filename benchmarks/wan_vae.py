"""The VAE: encoding a clip as MultiTalk gives it, decoding in fp32 and in bf16; time, memory, error.

    python benchmarks/wan_vae.py --out vae.json                                # a GPU; 480x832, 640x640
    python benchmarks/wan_vae.py --device cpu --size 64x64 --repeats 1         # official widths, minutes
    python benchmarks/wan_vae.py --device cpu --size 32x32 --tiny --repeats 1  # tests the script

Random weights of the official widths. "Any video" moves in every frame; the clips are one known frame, or
25, and grey behind, encoded whole ("plain") and as the code does it, still parts once ("reuse"): their
latents must be the same bit for bit, or the script ends with 1 (the figures are written nevertheless).
Convolutions are counted while the case runs.
Errors are against fp32 without TF32, by PyTorch's eager operations in contiguous memory; MS-SSIM and PSNR
take a range of 2. The fp32 cases themselves use TF32 on a GPU, as PyTorch does by default.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from wan.modules.vae import VideoVAE, WanVAE
from wan.modules.vae_layers import norm_silu_eager

SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang, Simoncelli and Bovik 2003
AIMS = {"encode": 900, "decode": 1200}  # ms on one H200, issue 5
KNOWN = (1, 25)


def seeded_vae(device: str, *, tiny: bool = False) -> WanVAE:
    torch.manual_seed(0)
    with torch.device(device):
        model = VideoVAE(dim=8) if tiny else VideoVAE()
    for name, p in model.named_parameters():
        scale = 0.05 if name.endswith("bias") else p[0].numel() ** -0.5 if p.ndim > 1 else 0.0
        p.data = torch.randn_like(p) * scale + (1.0 if name.endswith("gamma") else 0.0)
    return WanVAE(model=model, device=device)


def ms_ssim(a: Tensor, b: Tensor, data_range: float = 2.0) -> float:
    """Mean multi-scale structural similarity of the frames of two videos [3, T, H, W].

    Window 11, σ 1.5, five scales, or as many as the window fits into (then their weights are made to sum to
    one).
    """
    grid = torch.arange(11, device=a.device, dtype=torch.float32) - 5
    line = torch.exp(-(grid**2) / (2 * 1.5**2))
    line = (line / line.sum()).view(1, 1, -1)
    levels = sum(min(a.shape[-2:]) // 2**i >= 11 for i in range(len(SCALE_WEIGHTS)))
    weights = torch.tensor(SCALE_WEIGHTS[:levels], dtype=torch.float64)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2

    def blur(x: Tensor) -> Tensor:
        return functional.conv2d(functional.conv2d(x, line.unsqueeze(2)), line.unsqueeze(3))

    def frame(x: Tensor, y: Tensor) -> Tensor:
        total = torch.ones(3, dtype=torch.float64)
        for level in range(levels):
            mx, my = blur(x), blur(y)
            sxx, syy, sxy = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
            value = (2 * sxy + c2) / (sxx + syy + c2)
            if level == levels - 1:
                value = value * (2 * mx * my + c1) / (mx * mx + my * my + c1)
            total *= value.double().mean((1, 2, 3)).clamp_min(0).cpu() ** (weights[level] / weights.sum())
            x, y = functional.avg_pool2d(x, 2), functional.avg_pool2d(y, 2)
        return total.mean()

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        frames = [
            frame(x.unsqueeze(1), y.unsqueeze(1)) for x, y in zip(a.unbind(1), b.unbind(1), strict=True)
        ]
    return float(torch.stack(frames).mean())


def psnr(a: Tensor, b: Tensor, data_range: float = 2.0) -> float:
    mse = float((a.double() - b.double()).square().mean())
    return float("inf") if mse == 0 else 10 * torch.log10(torch.tensor(data_range**2 / mse)).item()


def convolutions(run: Callable[[], Tensor]) -> int:
    """The operations of all convolutions that `run` really does."""
    with FlopCounterMode(display=False) as counter:
        run()
    by_operation = counter.get_flop_counts()["Global"]
    return sum(count for op, count in by_operation.items() if "convolution" in str(op))


def timed(run: Callable[[], Tensor], device: str) -> tuple[float, float]:
    """(milliseconds, GiB above what was allocated before)."""
    base = 0
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
    begin = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    milliseconds = (time.perf_counter() - begin) * 1e3
    return milliseconds, (torch.cuda.max_memory_allocated() - base) / 2**30 if device == "cuda" else 0.0


def clip(known: int, shape: tuple[int, ...], device: str) -> Tensor:
    """`known` random frames and grey behind them, as `wan.pipeline_steps.encode` has it."""
    video = torch.zeros(shape, device=device)
    video[:, :known] = torch.randn((shape[0], known, *shape[2:]), device=device).clamp_(-1, 1)
    return video


def cases(vae: WanVAE, shape: tuple[int, ...], latents: Tensor, chunk: int) -> list[dict[str, Any]]:
    """What is timed, in turn: a name, an input, and how to run it."""
    device = str(vae.device)
    moving = torch.randn(shape, device=device).clamp_(-1, 1)
    found = [{"name": "encode fp32, any video", "run": lambda: vae.encode([moving], chunk)[0]}]
    for known in KNOWN:
        if known >= shape[1]:
            continue
        video = clip(known, shape, device)
        for reuse in (False, True):
            name = f"encode fp32, {known} known frame{'s' * (known > 1)}, {'reuse' if reuse else 'plain'}"
            run = partial(lambda v, r: vae.encode([v], chunk, reuse=r)[0], video, reuse)
            found.append({"name": name, "run": run, "known": known, "reuse": reuse})
    for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        run = partial(lambda d: vae.decode([latents], chunk, d)[0], dtype)
        found.append({"name": f"decode {short}", "run": run})
    return found


def measure(vae: WanVAE, size: tuple[int, int], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one size."""
    shape, device = (3, options.frames, *size), options.device
    torch.manual_seed(1)
    vae.model.use(channels_last=False, norm_silu=norm_silu_eager)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        latents = vae.encode([torch.randn(shape, device=device).clamp_(-1, 1)])[0]
        reference = vae.decode([latents])[0]
    if device == "cuda":
        from wan.kernels import rms_norm_silu

        vae.model.use(channels_last=True, norm_silu=rms_norm_silu)
    rows, todo = [], cases(vae, shape, latents, options.chunk)
    plain: dict[int, tuple[Tensor, int]] = {}
    for case in todo:
        out = case["run"]()  # also plans and compiles
        row = {"size": f"{size[0]}x{size[1]}", "case": case["name"], "conv_tflop": 0.0, "ms": []}
        flops = convolutions(case["run"])
        row["conv_tflop"] = round(flops / 1e12, 4)
        if case["name"].startswith("decode"):
            row |= {"ms_ssim": round(ms_ssim(out, reference), 6), "psnr_db": round(psnr(out, reference), 2)}
        elif "known" in case and not case["reuse"]:
            plain[case["known"]] = out, flops
        elif "known" in case:
            want, all_of_it = plain.pop(case["known"])
            same = torch.equal(out.view(torch.int32), want.view(torch.int32))
            off = float((out - want).norm() / want.norm())
            row |= {"same_bits": same, "distance": off, "conv_share": round(flops / all_of_it, 4)}
        rows.append(row)
        say(f"{row['size']} {case['name']}: ready")
    for _ in range(options.repeats):
        for case, row in zip(todo, rows, strict=True):
            milliseconds, gib = timed(case["run"], device)
            row["ms"].append(round(milliseconds, 1))
            row["extra_gib"] = round(gib, 2)
    for row in rows:
        row["median_ms"] = round(statistics.median(row["ms"]), 1)
    whole = {row["case"]: row["median_ms"] for row in rows}
    for row in rows:
        if row["case"].endswith("reuse"):
            row["of_plain"] = round(row["median_ms"] / whole[row["case"].replace("reuse", "plain")], 3)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    head = "| size | case | ms | of plain | conv TFLOP | share | GiB | MS-SSIM | PSNR dB |"
    lines = [head, "|---|---|---:|---:|---:|---:|---:|---:|---:|"]
    keys = ("size", "case", "median_ms", "of_plain", "conv_tflop", "conv_share", "extra_gib")
    lines += [
        "| " + " | ".join(str(row.get(key, "")) for key in (*keys, "ms_ssim", "psnr_db")) + " |"
        for row in rows
    ]
    return "\n".join(lines)


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) % 8 == int(width) % 8 == 0):
        msg = f"{text!r} is not HEIGHTxWIDTH in multiples of 8, such as 480x832"
        raise argparse.ArgumentTypeError(msg)
    return int(height), int(width)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=size, nargs="+", default=[(480, 832), (640, 640)], metavar="HxW")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--chunk", type=int, default=1, help="latents at a time")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a twelfth of the width")
    parser.add_argument("--out", type=Path, help="write JSON here")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here: --device cpu --size 64x64 measures the ratios on a CPU")
    vae = seeded_vae(options.device, tiny=options.tiny)
    rows = [row for one in options.size for row in measure(vae, one, options)]
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else None
    facts = {"gpu": gpu, "torch": torch.__version__, "threads": torch.get_num_threads()}
    facts |= {"frames": options.frames, "chunk": options.chunk, "tiny": options.tiny}
    if options.out:
        options.out.write_text(json.dumps({"schema": 1, "facts": facts, "rows": rows}, indent=1) + "\n")
    print(json.dumps(facts))
    print(table(rows))
    if gpu:
        print(
            f"aims on one H200: encode of a clip ≤ {AIMS['encode']} ms, decode ≤ {AIMS['decode']} ms (bf16)"
        )
    changed = [row["case"] for row in rows if row.get("same_bits") is False]
    for name in changed:
        say(f"{name}: the latents differ from the plain encode's")
    return 1 if changed else 0


if __name__ == "__main__":
    raise SystemExit(main())
