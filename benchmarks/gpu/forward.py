"""Measure the DiT on this GPU: correct first, then every variant in turn, as ratios; one table and one JSON.

    python benchmarks/gpu/forward.py --out docs/evidence/gpu/forward.json    # real width, minutes on an H200
    python benchmarks/gpu/forward.py --tiny --device cpu --out forward.json  # tests the script, in seconds

Correct: two blocks of the real width at the full token count against the same two blocks in fp32 (no TF32). A
variant counts only if its error is at most 1.10 times that of "tuned, flash", which rounds where the
reference rounds.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import shlex
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import torch  # noqa: E402
from plain import WithMapAndFlushes, flush, plain_ops  # noqa: E402
from setting import (  # noqa: E402
    Scale,
    build,
    error,
    facts,
    first_layers,
    forward_pflop,
    inputs,
    peak_gib,
    scale,
    timed,
)
from variants import EXACT, VARIANTS, Variant, prepare, runtime  # noqa: E402

from wan.fuse import join_qkv  # noqa: E402
from wan.modules.multitalk_model import StepShare, WanModel  # noqa: E402

TOLERANCE = 1.10
YARDSTICK = "tuned, flash"
BASE = "plain, flash"


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def ceilings(device: torch.device, size: Scale) -> dict[str, Any]:
    """What this card gives to a large copy, to each linear of the model and to attention: measured, random
    data.
    """
    if device.type != "cuda":
        return {}
    generator = torch.Generator(device).manual_seed(5)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

    def best(function: Any, repeats: int = 10) -> float:
        for _ in range(3):
            function()
        return statistics.median(timed(function, device) for _ in range(repeats))

    out: dict[str, Any] = {"copy_tb_s": copy_rate(randn(2 * 2**30), best)}
    d, f, tokens = size.config["dim"], size.config["ffn_dim"], size.tokens
    for inner, outer in ((d, 3 * d), (d, d), (d, f), (f, d)):
        x, w, b = randn(tokens, inner), randn(outer, inner), randn(outer)
        ms = best(lambda: torch.nn.functional.linear(x, w, b))  # noqa: B023
        out[f"linear_{inner}_{outer}_tflops"] = round(2 * tokens * inner * outer / ms / 1e9, 1)
    from wan.attention_backends import AttentionBackend

    q, k, v = (randn(1, tokens, size.config["num_heads"], d // size.config["num_heads"]) for _ in range(3))
    for name in ("cudnn", "flash"):
        attend = AttentionBackend(name=name)
        ms = best(lambda: attend(q, k, v), 5)  # noqa: B023
        out[f"attention_{name}_tflops"] = round(4 * tokens * tokens * d / ms / 1e9, 1)
    heads_first = [
        t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)
    ]  # [B, N, L, D] in memory
    ms = best(lambda: AttentionBackend(name="cudnn")(*heads_first), 5)
    out["attention_cudnn_heads_first_tflops"] = round(4 * tokens * tokens * d / ms / 1e9, 1)
    for keys in (512, 257):
        short = [randn(1, keys, size.config["num_heads"], d // size.config["num_heads"]) for _ in range(2)]
        for name in ("cudnn", "flash"):
            ms = best(lambda: AttentionBackend(name=name)(q, *short), 5)  # noqa: B023
            out[f"cross_{keys}_{name}_ms"] = round(ms, 3)
    return out


def copy_rate(source: torch.Tensor, best: Any) -> float:
    """TB/s of a device-to-device copy, bytes read plus bytes written."""
    target = torch.empty_like(source)
    return round(2 * source.nbytes / best(lambda: target.copy_(source)) / 1e9, 3)


def correctness(model: WanModel, size: Scale, device: torch.device) -> list[dict[str, Any]]:
    """Two blocks of every variant against the same two in fp32, at the full token count."""
    small = first_layers(model, 2, size.config)
    wide = first_layers(model, 2, size.config)
    for name, child in list(wide.named_children()):
        setattr(wide, name, copy.deepcopy(child).float())
    rows = []
    for people in (1, 2):
        call = inputs(model, size, device, model.dtype, people, seed=100 + people)
        want = wide(**{k: _float(v) for k, v in call.items()})
        known = {}
        for variant in (v for v in VARIANTS if v.people == people or (people == 2 and v.name == YARDSTICK)):
            forward, _ = prepare(variant, small, size, device, call)
            got = forward()
            known[variant.name] = error(got, want)
            del forward, got
            rows.append({"variant": variant.name, "people": people, "error": known[variant.name]})
            say(f"{variant.name:22s} {people} speaker(s): error {known[variant.name]:.5f} against fp32")
        for row in rows:
            if row["people"] == people:
                yardstick = known[YARDSTICK]
                row["ratio"] = round(row["error"] / yardstick, 4)
                row["ok"] = row["error"] <= TOLERANCE * yardstick
    return rows


def _float(value: Any) -> Any:
    if isinstance(value, list):
        return [_float(v) for v in value]
    return value.float() if isinstance(value, torch.Tensor) else value


def timings(
    model: WanModel, size: Scale, device: torch.device, variants: list[Variant]
) -> list[dict[str, Any]]:
    """All variants interleaved: one warm-up and one peak-memory pass each, then `repeats` rounds over all of
    them.
    """
    calls = {n: inputs(model, size, device, model.dtype, n) for n in (1, 2)}
    pflop = forward_pflop(size.config, size.tokens, text=model.text_len)
    weights = sum(p.nbytes for p in model.parameters())
    forwards, rows = {}, []
    for variant in variants:
        held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        forward, chosen = prepare(variant, model, size, device, calls[variant.people])
        peak = peak_gib(forward, device, beside=held - weights)  # without what the variants before it keep
        forwards[variant.name] = forward
        q = torch.empty(1, 1, model.num_heads, model.dim // model.num_heads, dtype=model.dtype, device=device)
        rows.append(
            {
                "variant": variant.name,
                "tier": variant.tier,
                "what": variant.what,
                "people": variant.people,
                "kernel": chosen.attention.kernel_for(q),
                "ops": chosen.ops.name,
                "peak_gib": peak,
                "ms": [],
            }
        )
        say(f"{variant.name:22s} warm, peak {peak} GiB")
    for turn in range(size.repeats):
        for row in rows:
            row["ms"].append(round(timed(forwards[row["variant"]], device), 2))
        say(f"round {turn + 1} of {size.repeats}: " + ", ".join(f"{r['ms'][-1]:.0f}" for r in rows))
    base = next((statistics.median(r["ms"]) for r in rows if r["variant"] == BASE), None)
    for row in rows:
        row["median_ms"] = round(statistics.median(row["ms"]), 2)
        row["model_tflops"] = round(pflop * 1e6 / row["median_ms"], 1)
        row["of_plain"] = None if base is None else round(row["median_ms"] / base, 4)
    return rows


def step(model: WanModel, size: Scale, device: torch.device) -> dict[str, Any]:
    """A three-pass step with everything shared against single forwards of the same variant, interleaved."""
    variant = next(v for v in VARIANTS if v.name == EXACT)
    call = inputs(model, size, device, model.dtype)
    model.runtime = runtime(variant, model, size, device)
    latents = torch.cat((call["x"][0], call["y"][0]))[None]
    moment = model.embed_time(call["t"])
    texts = [
        model.embed_text([c], call["clip_fea"], keep=True)
        for c in (call["context"][0], call["context"][0] * 0.5)
    ]
    audios = [model.embed_audio(call["audio"] * factor, keep=True) for factor in (1.0, 0.0)]
    passes = ((0, 0), (1, 0), (1, 1))

    def one(text: int = 0, audio: int = 0, share: StepShare | None = None) -> torch.Tensor:
        return model.predict(latents, moment, texts[text], audios[audio], share=share)

    def three() -> list[torch.Tensor]:
        share = StepShare()
        return [one(t, a, share) for t, a in passes]

    same = all(torch.equal(got, one(t, a)) for got, (t, a) in zip(three(), passes, strict=True))
    singles, steps = [], []
    for _ in range(size.repeats):
        singles.append(timed(one, device))
        steps.append(timed(three, device))
    single, whole = statistics.median(singles), statistics.median(steps)
    out = {"forward_ms": round(single, 2), "step_ms": round(whole, 2), "forwards": round(whole / single, 4)}
    return out | {"same_as_single_passes": same}


def plain_parts(model: WanModel, size: Scale, device: torch.device) -> dict[str, float]:
    """What the plain variant spends beyond the tuned one, part by part, in ms."""
    if device.type != "cuda":
        return {}
    heads, head = model.num_heads, model.dim // model.num_heads
    q, k = (torch.randn(heads, size.tokens, head, device=device, dtype=torch.bfloat16) for _ in range(2))
    x, w = torch.randn(1, size.tokens, model.dim, device=device, dtype=torch.bfloat16), q.new_ones(model.dim)
    cpu, gpu = (plain_ops(size.grid, head, cpu_tables=on).rms_norm_rope for on in (True, False))
    jobs = {
        "rotation_cpu_table_ms": partial(cpu, x, w, w, w),
        "rotation_gpu_table_ms": partial(gpu, x, w, w, w),
        "map_with_flushes_ms": partial(WithMapAndFlushes(size.grid).reference_map, q, k),
        "flush_ms": flush,
    }
    out = {}
    for name, job in jobs.items():
        job()
        out[name] = round(statistics.median(timed(job, device) for _ in range(3)), 2)
    return out


def breakdown(model: WanModel, size: Scale, device: torch.device) -> list[dict[str, Any]]:
    """GPU time of one exact forward by kernel, longest first."""
    if device.type != "cuda":
        return []
    variant = next(v for v in VARIANTS if v.name == EXACT)
    forward, _ = prepare(variant, model, size, device, inputs(model, size, device, model.dtype))
    forward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        forward()
        torch.cuda.synchronize(device)
    rows = [
        {"kernel": e.key[:90], "calls": e.count, "ms": round(e.self_device_time_total / 1e3, 2)}
        for e in profile.key_averages()
    ]
    return sorted((r for r in rows if r["ms"] >= 1), key=lambda r: -r["ms"])


def kernels(device: torch.device, size: Scale) -> list[dict[str, Any]]:
    """Every Triton kernel at the model's size: error against fp64 beside its reference's, time, share of the
    copy rate.
    """
    if device.type != "cuda":
        return []
    from kernel_cases import cases

    return cases(device, size.tokens)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds over all variants (default 3)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: to test the script, not the card")
    parser.add_argument("--device", default="cuda", help="cuda (default) or cpu with --tiny")
    parser.add_argument("--only", nargs="*", help="variants to time (default: all)")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here; --tiny --device cpu runs the script without one")
    size = scale(tiny=args.tiny, repeats=args.repeats)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    started = time.time()
    result: dict[str, Any] = {
        "schema": 1,
        "command": shlex.join(["python", "benchmarks/gpu/forward.py", *sys.argv[1:]]),
        "when": time.strftime("%Y-%m-%d", time.gmtime()),
        "facts": facts(device),
        "size": {"config": size.config, "latent": size.latent, "tokens": size.tokens, "frames": size.frames},
        "pflop": forward_pflop(size.config, size.tokens),
    }

    def save() -> None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")

    with torch.inference_mode():
        result["kernels"] = kernels(device, size)
        save()
        result["ceilings"] = ceilings(device, size)
        say(f"ceilings {result['ceilings']}")
        gc.collect()
        model = build(size.config, device, torch.bfloat16)
        result["parameters"] = sum(p.numel() for p in model.parameters())
        say(f"{result['parameters'] / 1e9:.2f} B parameters")
        join_qkv(model)
        result["correctness"] = correctness(model, size, device)
        save()
        gc.collect()
        chosen = [v for v in VARIANTS if not args.only or v.name in args.only]
        result["variants"] = timings(model, size, device, chosen)
        save()
        gc.collect()
        result["step"] = step(model, size, device)
        result["plain_parts"] = plain_parts(model, size, device)
        result["breakdown"] = breakdown(model, size, device)
        result["facts_after"] = facts(device)
    result["seconds"] = round(time.time() - started, 1)
    save()
    table(result)
    return 0 if all(row["ok"] for row in result["correctness"]) else 1


def table(result: dict[str, Any]) -> None:
    errors = {(r["variant"], r["people"]): r for r in result["correctness"]}
    print(
        f"{'variant':22s} {'ms':>9s} {'of plain':>9s} {'TFLOP/s':>8s} {'GiB':>6s} {'error':>8s} {'ratio':>6s}"
    )
    for row in result["variants"]:
        e = errors[row["variant"], row["people"]]
        ratio = "" if row["of_plain"] is None else f"{row['of_plain']:.3f}"
        print(
            f"{row['variant']:22s} {row['median_ms']:9.1f} {ratio:>9s} {row['model_tflops']:8.1f} "
            f"{row['peak_gib'] or 0:6.1f} {e['error']:8.5f} {e['ratio']:6.3f}"
        )
    s = result["step"]
    print(
        f"step of 3 passes: {s['step_ms']:.1f} ms, {s['forwards']:.3f} forwards, {s['same_as_single_passes']}"
    )
    for row in result["breakdown"][:24]:
        print(f"{row['ms']:9.1f} ms {row['calls']:5d} x {row['kernel']}")
    print(result["plain_parts"])
    for row in result["kernels"]:
        print(f"{row['kernel']:20s} {row['ms']:6.3f} ms, {row['tb_s']:4.2f} TB/s", end="")
        print(f", eager {row['eager_ms']:6.3f} ms", end="")
        print(f", error {row['error']:.1e}, reference {row['reference_error']:.1e}")


if __name__ == "__main__":
    raise SystemExit(main())
