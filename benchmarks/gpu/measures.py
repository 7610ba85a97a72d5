"""The measurements of the DiT: error against fp32, all variants in turn, a whole step, time by kernel."""

from __future__ import annotations

import copy
import gc
import statistics
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from plain import WithMapAndFlushes, flush, plain_ops
from setting import Scale, build, error, first_layers, forward_pflop, inputs, timed
from sheet import Sheet, say
from variants import ABSORBED, Bench, Variant, named
from watch import watched

from wan.modules.multitalk_model import StepShare, WanModel

TOLERANCE = 1.10
YARDSTICK = "tuned, flash"
BASE = "plain, flash"
# (as printed, variant, whether the pass without speech is absorbed: 2 GB)
STEPS = (("fused", "fused", False), ("fused, silence absorbed", "fused", True), (ABSORBED, ABSORBED, False))


def correctness(
    model: WanModel, size: Scale, device: torch.device, variants: list[Variant]
) -> list[dict[str, Any]]:
    """Two blocks of every variant against the same two in fp32, at the full token count."""
    bench = Bench(first_layers(model, 2, size.config), size, device, size.config | {"num_layers": 2})
    wide = first_layers(model, 2, size.config)
    for name, child in list(wide.named_children()):
        setattr(wide, name, copy.deepcopy(child).float())
    rows: list[dict[str, Any]] = []
    for people in (1, 2):
        call = inputs(model, size, device, model.dtype, people, seed=100 + people)
        want = wide(**{k: _float(v) for k, v in call.items()})
        chosen = [v for v in variants if v.people == people and v.name != YARDSTICK]
        if not chosen and people == 2:
            continue
        yardstick = 0.0
        for variant in [named(YARDSTICK), *chosen]:
            try:
                got = bench.prepare(variant, call)[0]()
            except Exception as problem:  # noqa: BLE001  (a candidate that can't run is a result)
                reason = f"{type(problem).__name__}: {problem}"[:300]
                rows.append({"variant": variant.name, "people": people, "absent": reason})
                say(f"{variant.name}: {reason}")
                continue
            off = error(got, want)
            yardstick = yardstick or off
            ok = variant.lossy or off <= TOLERANCE * yardstick
            rows.append(
                {"variant": variant.name, "people": people, "error": off, "ratio": round(off / yardstick, 4)}
                | {"ok": ok, "lossy": variant.lossy}
            )
            if variant.compiled:  # the first time, with nothing cached
                rows[-1]["compile_s"] = bench.model_for(variant).run_blocks.seconds
            say(
                f"{variant.name:30s} {people} speaker(s): error {off:.5f} against fp32, {off / yardstick:.3f}"
            )
            del got
    return rows


def _float(value: Any) -> Any:
    if isinstance(value, list):
        return [_float(v) for v in value]
    return value.float() if isinstance(value, torch.Tensor) else value


def timings(bench: Bench, variants: list[Variant], sheet: Sheet, repeats: int) -> None:
    """All variants interleaved: a warm-up and a peak-memory pass each, then rounds over all of them, each row
    with clocks and power. Writes sheet["variants"] after every round.
    """
    size, device, model = bench.size, bench.device, bench.model
    calls = {n: inputs(model, size, device, model.dtype, n) for n in (1, 2)}
    pflop = forward_pflop(size.config, size.tokens, text=model.text_len)
    forwards, rows = {}, []
    exact = None
    for variant in variants:
        call = calls[variant.people]
        try:
            forward, chosen = bench.prepare(variant, call)
            out = forward()
            own = bench.own_bytes(variant, call)
            peak = _peak(forward, own, device)
        except Exception as problem:  # noqa: BLE001  (the other variants are still worth measuring)
            say(f"{variant.name}: {type(problem).__name__}: {problem}"[:300])
            continue
        q = torch.empty(1, 1, model.num_heads, model.dim // model.num_heads, dtype=model.dtype, device=device)
        row = {
            "variant": variant.name,
            "tier": variant.tier,
            "what": variant.what,
            "people": variant.people,
            "kernel": chosen.attention.kernel_for(q),
            "ops": chosen.ops.name,
            "peak_gib": peak,
            "rounds": [],
        }
        if variant.name == "fused":
            exact = out
        elif variant.lossy and exact is not None:
            row["error_to_exact"] = error(out, exact)  # of the whole forward, all blocks
        if variant.compiled:
            blocks = bench.model_for(variant).run_blocks
            row |= {"compile_s": blocks.seconds, "compiled_graphs": blocks.graphs}
        if hasattr(getattr(chosen.attention, "attend", None), "plans"):
            row["plans"] = chosen.attention.attend.plans
        forwards[variant.name] = forward
        rows.append(row)
        say(f"{variant.name:30s} warm, peak {peak} GiB")
    for turn in range(repeats):
        if turn and sheet.left < sum(r["rounds"][-1]["ms"] for r in rows) / 1e3 + 20:
            say(f"round {turn + 1} left out")
            break
        for row in rows:
            row["rounds"].append(watched(forwards[row["variant"]], device))
        sheet["variants"] = _summed(rows, pflop)
        say(f"round {turn + 1} of {repeats}: " + ", ".join(f"{r['ms'][-1]:.0f}" for r in rows))


def _summed(rows: list[dict[str, Any]], pflop: float) -> list[dict[str, Any]]:
    for row in rows:
        row["ms"] = [r["ms"] for r in row["rounds"]]
        row["median_ms"] = round(statistics.median(row["ms"]), 2)
        row["model_tflops"] = round(pflop * 1e6 / row["median_ms"], 1)
    base = next((row["median_ms"] for row in rows if row["variant"] == BASE), None)
    for row in rows:
        row["of_plain"] = None if base is None else round(row["median_ms"] / base, 4)
    return rows


def _peak(forward: Any, own: int, device: torch.device) -> float | None:
    """GiB: what a variant keeps, and the most that one forward takes beside it."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    forward()
    torch.cuda.synchronize(device)
    return round((torch.cuda.max_memory_allocated(device) - before + own) / 2**30, 2)


def step(bench: Bench, repeats: int) -> dict[str, Any]:
    """A three-pass step with everything shared against single forwards of the same variant, interleaved; and
    against a forward that embeds its conditions itself, as the reference's does.
    """
    model, size, device = bench.model, bench.size, bench.device
    call = inputs(model, size, device, model.dtype)
    out: dict[str, Any] = {}
    for name, variant, silence in STEPS:
        model.runtime = replace(bench.runtime(named(variant)), absorb_silence=silence)
        passes = StepPasses(model, call)
        alone = bench.prepare(named("fused, not kept"), call)[0]
        chosen = model.runtime
        same = all(torch.equal(a, b) for a, b in zip(passes.three(), passes.singly(), strict=True))
        singles, steps, whole = [], [], []
        for _ in range(repeats):
            model.runtime = chosen
            singles.append(timed(passes.one, device))
            steps.append(timed(passes.three, device))
            if name == "fused":
                whole.append(timed(alone, device))
        single, three = statistics.median(singles), statistics.median(steps)
        row = {
            "forward_ms": round(single, 2),
            "step_ms": round(three, 2),
            "forwards": round(three / single, 4),
        }
        if whole:
            row |= {"forward_not_kept_ms": round(statistics.median(whole), 2)}
            row |= {"forwards_not_kept": round(three / statistics.median(whole), 4)}
        out[name] = row | {"same_as_single_passes": same}
        del passes
        gc.collect()
    return out


class StepPasses:
    """The three guidance passes of a step: prompt and speech, no prompt, neither."""

    ORDER = ((0, 0), (1, 0), (1, 1))

    def __init__(self, model: WanModel, call: dict[str, Any]) -> None:
        self.model = model
        self.latents = torch.cat((call["x"][0], call["y"][0]))[None]
        self.moment = model.embed_time(call["t"])
        contexts = (call["context"][0], call["context"][0] * 0.5)
        self.texts = [model.embed_text([c], call["clip_fea"], keep=True) for c in contexts]
        self.audios = [model.embed_audio(call["audio"] * factor, keep=True) for factor in (1.0, 0.0)]

    def one(self, text: int = 0, audio: int = 0, share: StepShare | None = None) -> torch.Tensor:
        return self.model.predict(
            self.latents, self.moment, self.texts[text], self.audios[audio], share=share
        )

    def branches(self) -> list[Any]:
        """The passes of one step, to be called in any order, sharing what they can."""
        share = StepShare()
        return [partial(self.one, t, a, share) for t, a in self.ORDER]

    def three(self) -> list[torch.Tensor]:
        return [run() for run in self.branches()]

    def singly(self) -> list[torch.Tensor]:
        return [self.one(t, a) for t, a in self.ORDER]


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


def breakdown(bench: Bench, name: str) -> dict[str, Any] | None:
    """GPU time of one forward of `name` by kernel, longest first, beside that forward's own time: with the
    profiler and without. `busy_ms` is the sum over all kernels, so what is missing to `ms` are gaps.
    """
    if bench.device.type != "cuda":
        return None
    bench.forget()  # two variants absorb, 20 GiB each
    call = inputs(bench.model, bench.size, bench.device, bench.model.dtype)
    forward, _ = bench.prepare(named(name), call)
    forward()
    without = watched(forward, bench.device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        profiled = watched(forward, bench.device)
    every = [
        {"kernel": e.key[:90], "calls": e.count, "ms": round(e.self_device_time_total / 1e3, 3)}
        for e in profile.key_averages()
    ]
    rows = sorted((r for r in every if r["ms"] >= 1), key=lambda r: -r["ms"])
    busy = round(sum(r["ms"] for r in every), 2)
    return {"variant": name, "unprofiled": without, "profiled": profiled, "busy_ms": busy, "kernels": rows}


def small(device: torch.device, tiny: bool) -> list[dict[str, Any]]:
    """A smoke-size forward, where launches are the time: eager, our kernels, and as one CUDA graph."""
    from setting import scale

    size = scale(tiny=True, repeats=1)
    model = build(size.config, device, torch.bfloat16)
    bench, call = Bench(model, size, device), inputs(model, size, device, torch.bfloat16)
    rows = []
    for name in ("eager, kept K/V", "fused", "fused, graph"):
        forward, _ = bench.prepare(named(name), call)
        for _ in range(5):
            forward()
        ms = statistics.median(timed(forward, device) for _ in range(5 if tiny else 50))
        rows.append({"variant": name, "tokens": size.tokens, "layers": len(model.blocks), "ms": round(ms, 4)})
    return rows
