"""Every measurement of this folder, the most important first, in a bounded time.

    python benchmarks/gpu/all.py --into docs/evidence/gpu --budget-s 540                  # one GPU
    python benchmarks/gpu/all.py --into OUT --budget-s 540 --parts forward attention
    python benchmarks/gpu/all.py --into OUT --budget-s 540 --parts vae load job
    python benchmarks/gpu/all.py --into OUT --budget-s 300 --parts two_gpus               # two GPUs
    python benchmarks/gpu/all.py --into /tmp/x --tiny --device cpu                        # no card: tests it

Each part is a process of its own (a crash or a hang ends that part alone) and is told how much time it may
take; what is left of it goes to the next. A part that runs over is stopped; what it had measured by then is
on disk. `all.json` says how each ended.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ROUND = ("plain, flash", "tuned, flash", "tuned, cuDNN", "fused", "fused, absorbed", "fused, two speakers")
TRIED = ("fused, cuDNN", "fused, absorbed, cross kernel", "fused, cross kernel")


@dataclass(frozen=True, kw_only=True)
class Part:
    """A script, its arguments (at tiny size: `tiny`), and the share of the time left that it may take."""

    name: str
    script: str
    args: tuple[str, ...] = ()
    tiny: tuple[str, ...] = ()
    share: float = 1.0
    processes: int = 1
    budgeted: bool = True  # whether it knows --budget-s


def parts(fast: list[str]) -> list[Part]:
    forward = ("--only", *ROUND, *TRIED, *fast)
    return [
        Part(name="forward", script="gpu/forward.py", args=forward, tiny=("--repeats", "1"), share=0.72),
        Part(name="attention", script="gpu/attention.py", share=0.4),
        Part(
            name="vae",
            script="wan_vae.py",
            args=("--size", "640x640", "--repeats", "3"),
            tiny=("--size", "32x32", "--repeats", "1", "--frames", "9"),
            share=0.45,
            budgeted=False,
        ),
        Part(
            name="job",
            script="gpu/job.py",
            args=("--jobs", "1"),
            tiny=("--steps", "1", "--jobs", "1"),
            share=0.8,
        ),
        Part(name="two_gpus", script="gpu/two_gpus.py", tiny=("--repeats", "1"), share=0.7, processes=2),
        Part(name="load", script="gpu/load.py"),
    ]


def command(part: Part, into: Path, budget: float, *, tiny: bool, device: str) -> list[str]:
    python = [sys.executable]
    if part.processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(part.processes)]
    out = [*python, str(ROOT / "benchmarks" / part.script), "--out", str(into / f"{part.name}.json")]
    out += [*(part.tiny if tiny else part.args), "--device", device]
    if part.budgeted:
        out += ["--budget-s", f"{budget:.0f}"]
    return out + (["--tiny"] if tiny else [])


def run(part: Part, into: Path, budget: float, *, tiny: bool, device: str) -> dict[str, object]:
    """One part in a session of its own; past its budget first told to end, then ended."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    env |= {"PYTHONUNBUFFERED": "1"}
    begin = time.monotonic()
    with (into / f"{part.name}.log").open("wb") as log:
        arguments = command(part, into, budget - 10 if not tiny else budget, tiny=tiny, device=device)
        with subprocess.Popen(
            arguments, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True
        ) as p:
            try:
                code: int | str = p.wait(timeout=budget)
            except subprocess.TimeoutExpired:
                os.killpg(p.pid, signal.SIGTERM)
                try:
                    p.wait(timeout=5)
                except subprocess.TimeoutExpired:
                    os.killpg(p.pid, signal.SIGKILL)
                code = "stopped: out of time"
    written = (into / f"{part.name}.json").exists()
    return {"part": part.name, "exit": code, "s": round(time.monotonic() - begin, 1), "json": written}


def main() -> int:
    names = [p.name for p in parts([])]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--into", type=Path, required=True, help="folder for the JSON files and logs")
    parser.add_argument("--budget-s", type=float, default=540, help="seconds for everything (default 540)")
    parser.add_argument("--parts", nargs="+", choices=names, help="default: all that fit the GPUs here")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: tests the scripts, not the card")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    args = parser.parse_args()
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here; --tiny --device cpu runs the scripts without one")
    if args.device == "cpu" and not args.tiny:
        parser.error("a CPU runs the scripts at --tiny sizes only")
    sys.path[:0] = [str(HERE), str(ROOT)]
    from variants import VARIANTS

    end = time.monotonic() + args.budget_s
    args.into.mkdir(parents=True, exist_ok=True)
    gpus = torch.cuda.device_count() if args.device == "cuda" else 2
    chosen = [
        p for p in parts([v.name for v in VARIANTS if v.lossy]) if not args.parts or p.name in args.parts
    ]
    found: list[dict[str, object]] = []
    for number, part in enumerate(chosen):
        left = end - time.monotonic()
        # the last one gets all that is left
        budget = left if number == len(chosen) - 1 else left * part.share
        if part.processes > gpus:
            row: dict[str, object] = {"part": part.name, "exit": f"left out: {gpus} GPU here, it needs 2"}
        elif budget < 20 and not args.tiny:
            row = {"part": part.name, "exit": f"left out: {left:.0f} s left"}
        else:
            row = run(part, args.into, budget, tiny=args.tiny, device=args.device)
        found.append(row)
        print(json.dumps(row), flush=True)
        (args.into / "all.json").write_text(json.dumps({"schema": 1, "parts": found}, indent=1) + "\n")
    for row in found:
        log = args.into / f"{row['part']}.log"
        if log.exists():
            print(f"\n===== {row['part']}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-45:]))
    return 0 if all(row.get("exit") == 0 for row in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
