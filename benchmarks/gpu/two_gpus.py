"""A three-pass step on one GPU against the same step on all GPUs of this host, in one run.

    torchrun --nproc-per-node 2 benchmarks/gpu/two_gpus.py --out docs/evidence/gpu/two_gpus.json
    torchrun --nproc-per-node 2 benchmarks/gpu/two_gpus.py --tiny --device cpu --out two_gpus.json   # gloo

One GPU: every rank runs the whole step on its own, at the same time, so that all cards have the same warmth
and power; rank 0's time counts. Hybrid: whole passes side by side, the last by all ranks (performance.md
§3.6). Ulysses: every pass by all ranks. Rounds are interleaved; the velocities of each way are compared
with one GPU's. The pass without speech is absorbed
(2 GB), by every way. NCCL's settings are the environment's and are written into the result.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from measures import StepPasses  # noqa: E402
from setting import Scale, build, error, inputs, scale, timed  # noqa: E402
from sheet import Sheet, device_of, parser, say  # noqa: E402
from torch import Tensor  # noqa: E402
from variants import Bench, named  # noqa: E402
from watch import watched  # noqa: E402

from wan.distributed import BranchParallel, UlyssesParallel, init_from_environment  # noqa: E402
from wan.fuse import join_qkv  # noqa: E402
from wan.modules.runtime import Parallel  # noqa: E402

WAYS = ("one GPU", "hybrid", "Ulysses")
AIM = 1.9


def ways(passes: StepPasses) -> dict[str, Callable[[], list[Tensor]]]:
    """The step by each way. The process groups are made here, once, by all ranks together."""
    model = passes.model
    alone, together, spread = Parallel(), UlyssesParallel(), BranchParallel(model.num_heads)

    def by(parallel: Parallel) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            model.use(parallel=parallel)
            return passes.three()

        return run

    def hybrid() -> list[Tensor]:
        return spread(lambda p: model.use(parallel=p), passes.branches())

    return {"one GPU": by(alone), "hybrid": hybrid, "Ulysses": by(together)}


def transfer(device: torch.device, size: Scale) -> dict[str, Any]:
    """One all-to-all of a rank's q, as Ulysses sends it: GB/s that leave a rank."""
    world = dist.get_world_size()
    count = size.tokens * size.config["dim"] // world // world * world
    send = torch.randn(count, device=device).bfloat16()
    receive = torch.empty_like(send)
    run = lambda: dist.all_to_all_single(receive, send)  # noqa: E731
    for _ in range(3):
        run()
    ms = statistics.median(timed(run, device) for _ in range(10))
    leaves = send.nbytes * (world - 1) / world
    return {"mb": round(send.nbytes / 1e6, 1), "ms": round(ms, 3), "gb_s": round(leaves / ms / 1e6, 1)}


def compare(found: dict[str, list[Tensor]]) -> dict[str, Any]:
    """Relative distance of each way's velocities to one GPU's, the worst of the three passes."""
    want = found["one GPU"]
    out = {}
    for name, got in found.items():
        if name != "one GPU":
            worst = max(error(g, w) for g, w in zip(got, want, strict=True))
            same = all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
            out[name] = {"distance": worst, "bit_for_bit": same}
    return out


def measure(sheet: Sheet, size: Scale, device: torch.device, rank: int, variant: str, repeats: int) -> None:
    model = build(size.config, device, torch.bfloat16)
    join_qkv(model)
    bench = Bench(model, size, device)
    model.runtime = replace(bench.runtime(named(variant)), absorb_silence=True)
    passes = StepPasses(model, inputs(model, size, device, torch.bfloat16))
    steps = ways(passes)
    dist.barrier()
    found = {}
    for name in WAYS:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        found[name] = steps[name]()
        say(f"rank {rank}: {name} warm")
        if device.type == "cuda":
            peak = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
            sheet.data.setdefault("peak_gib", {})[name] = peak
    sheet["results"] = compare(found)
    del found
    sheet["transfer"] = transfer(device, size)
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    for turn in range(repeats):
        for name in WAYS:
            dist.barrier()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            rounds[name].append(watched(steps[name], device))
        sheet["rounds"] = rounds
        say(
            f"rank {rank} round {turn + 1}: " + ", ".join(f"{n} {r[-1]['ms']:.0f}" for n, r in rounds.items())
        )
    medians = {name: statistics.median(r["ms"] for r in rows) for name, rows in rounds.items()}
    sheet["ms"] = {name: round(ms, 1) for name, ms in medians.items()}
    sheet["speedup"] = {n: round(medians["one GPU"] / medians[n], 3) for n in WAYS if n != "one GPU"}


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=3, help="timed rounds (default 3)")
    options.add_argument("--variant", default="fused", help="which of forward.py's variants (default fused)")
    args = options.parse_args()
    device_of(args, options)
    size = scale(tiny=args.tiny, repeats=args.repeats)
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        options.error("start it with torchrun --nproc-per-node 2, on a host with that many GPUs")
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        torch.set_num_threads(1)
    with init_from_environment(timeout_s=300) as launch, torch.inference_mode():
        rank = launch.rank
        out = args.out if rank == 0 else args.out.with_name(f"{args.out.stem}.rank{rank}{args.out.suffix}")
        sheet = Sheet(out, "two_gpus.py", launch.device, args.budget_s)
        sheet.data |= about(args, size, launch.size)
        measure(sheet, size, launch.device, rank, args.variant, args.repeats)
        dist.barrier()
        if rank == 0:
            print({k: sheet.data.get(k) for k in ("ms", "speedup", "results", "transfer", "peak_gib")})
    return 0


def about(args: argparse.Namespace, size: Scale, world: int) -> dict[str, Any]:
    nccl = {k: v for k, v in os.environ.items() if k.startswith(("NCCL_", "NVSHMEM_", "TORCH_SYMM_MEM"))}
    version = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None
    return {
        "variant": args.variant,
        "world": world,
        "backend": dist.get_backend(),
        "nccl": {"version": version, "environment": nccl},
        "size": {"tokens": size.tokens, "latent": size.latent, "config": size.config},
    }


if __name__ == "__main__":
    raise SystemExit(main())
