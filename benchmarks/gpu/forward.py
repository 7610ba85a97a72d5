"""Measure the DiT on this GPU: correct first, then every variant in turn, as ratios; one table and one JSON.

    python benchmarks/gpu/forward.py --out docs/evidence/gpu/forward.json    # real width, minutes on an H200
    python benchmarks/gpu/forward.py --tiny --device cpu --out forward.json  # tests the script, in seconds
    python benchmarks/gpu/forward.py --list                                  # the variants

Correct: two blocks of the real width at the full token count against the same two blocks in fp32 (no TF32). A
variant counts only if its error is at most 1.10 times that of "tuned, flash", which rounds where the
reference rounds; of the fast tier, which is lossy, the error is reported. Each row of a round has the SM
clock and the power during it, and how long the host took to launch it. The JSON is written after every
step.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import torch  # noqa: E402
from ceilings import ceilings  # noqa: E402
from measures import breakdown, correctness, plain_parts, small, step, timings  # noqa: E402
from setting import Scale, build, facts, forward_pflop, scale  # noqa: E402
from sheet import Sheet, device_of, parser, say  # noqa: E402
from variants import ABSORBED, EXACT, FAST, VARIANTS, Bench, Variant  # noqa: E402

from wan.fuse import join_qkv  # noqa: E402

STEPS = ("step", "small", "kernels", "ceilings", "plain_parts")


def kernels(device: torch.device, size: Scale) -> list[dict[str, Any]]:
    """Every Triton kernel at the model's size: error against fp64 beside its reference's, time, share of the
    copy rate.
    """
    if device.type != "cuda":
        return []
    from kernel_cases import cases

    return cases(device, size.tokens)


def of_the_model(
    sheet: Sheet, size: Scale, device: torch.device, variants: list[Variant], skip: set[str]
) -> None:
    """What needs the whole model on the card, the most important first."""
    model = build(size.config, device, torch.bfloat16)
    sheet["parameters"] = sum(p.numel() for p in model.parameters())
    say(f"{sheet['parameters'] / 1e9:.2f} B parameters, {join_qkv(model)} blocks joined")
    sheet.step("correctness", lambda: correctness(model, size, device, variants))
    gc.collect()

    def rounds() -> list[dict[str, Any]]:
        bench = Bench(model, size, device)
        timings(bench, variants, sheet, size.repeats)
        profiled = [n for n in (EXACT, ABSORBED, FAST) if n in {v.name for v in variants}]
        return [row for row in (breakdown(bench, n) for n in profiled) if row]

    sheet.step("breakdown", rounds)
    gc.collect()
    if "step" not in skip:
        sheet.step("step", lambda: step(Bench(model, size, device), 1), need_s=110)
    if "plain_parts" not in skip:
        sheet.step("plain_parts", lambda: plain_parts(model, size, device), need_s=10)


def measure(sheet: Sheet, size: Scale, device: torch.device, variants: list[Variant], skip: set[str]) -> None:
    of_the_model(sheet, size, device, variants, skip)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    later = {
        "small": (lambda: small(device, device.type != "cuda"), 10),
        "kernels": (lambda: kernels(device, size), 25),
        "ceilings": (lambda: ceilings(device, size), 25),
    }
    for name, (function, need) in later.items():
        if name not in skip:
            sheet.step(name, function, need_s=need)
    sheet["facts_after"] = facts(device)


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=2, help="timed rounds over all variants (default 2)")
    options.add_argument("--only", nargs="*", help="variants to measure (default: those of --list without *)")
    options.add_argument("--skip", nargs="*", default=[], choices=STEPS, help="steps to leave out")
    options.add_argument("--list", action="store_true", help="name the variants and exit")
    if "--list" in sys.argv:
        for v in VARIANTS:
            print(f"{v.name:44s}{' ' if v.default else '*'} {v.tier:10s} {v.what}")
        return 0
    args = options.parse_args()
    device = device_of(args, options)
    unknown = set(args.only or ()) - {v.name for v in VARIANTS}
    if unknown:
        options.error(f"no variant {', '.join(sorted(unknown))}; --list names them")
    variants = [v for v in VARIANTS if (v.name in args.only if args.only else v.default)]
    size = scale(tiny=args.tiny, repeats=args.repeats)
    sheet = Sheet(args.out, "forward.py", device, args.budget_s)
    sheet.data |= {
        "size": {"config": size.config, "latent": size.latent, "tokens": size.tokens, "frames": size.frames},
        "pflop": forward_pflop(size.config, size.tokens),
    }
    with torch.inference_mode():
        measure(sheet, size, device, variants, set(args.skip))
    table(sheet.data)
    wrong = [r for r in sheet.data.get("correctness", []) if not r.get("ok", True)]
    return 1 if wrong or sheet.data.get("failed") else 0


def table(result: dict[str, Any]) -> None:
    """What was found, for people: rows without a figure are absent."""
    errors = {(r["variant"], r["people"]): r for r in result.get("correctness", []) if "error" in r}
    heads = ("variant", "ms", "plain", "TF/s", "GiB", "error", "ratio")
    print("{:44s} {:>8s} {:>6s} {:>6s} {:>6s} {:>8s} {:>6s}  clocks".format(*heads))
    for row in result.get("variants", []):
        e = errors.get((row["variant"], row["people"]), {})
        ratio = "" if row["of_plain"] is None else f"{row['of_plain']:.3f}"
        last = {
            k: v for k, v in row["rounds"][-1].items() if k in ("launch_ms", "sm_mhz", "watts", "held_by")
        }
        print(
            f"{row['variant']:44s} {row['median_ms']:8.1f} {ratio:>6s} {row['model_tflops']:6.1f} "
            f"{row['peak_gib'] or 0:6.1f} {e.get('error', 0):8.5f} {e.get('ratio', 0):6.3f}  {last}"
            + (f" to exact {row['error_to_exact']:.4f}" if "error_to_exact" in row else "")
        )
    for name in ("step", "small", "plain_parts", "ceilings", "failed", "left_out"):
        if result.get(name):
            print(f"{name}: {result[name]}")
    for part in result.get("breakdown", []):
        print(f"{part['variant']}: busy {part['busy_ms']} ms of {part['unprofiled']} ({part['profiled']})")
        for row in part["kernels"][:16]:
            print(f"{row['ms']:9.1f} ms {row['calls']:5d} x {row['kernel']}")
    for row in result.get("kernels") or []:
        if "failed" in row:
            print(f"{row['kernel']:20s} failed: {row['failed']}")
            continue
        print(f"{row['kernel']:20s} {row['ms']:6.3f} ms, {row['tb_s']:4.2f} TB/s", end="")
        print(
            f", eager {row['eager_ms']:6.3f} ms, error {row['error']:.1e}, its {row['reference_error']:.1e}"
        )


if __name__ == "__main__":
    raise SystemExit(main())
