# ruff: noqa: E501  the lines below are those of a generated document
"""The sections of docs/performance.md on everything but the forward, and the table of aims."""

from __future__ import annotations

from typing import Any

from predictions import OTHERS, REFERENCE
from report_forward import Sheet, median, ratio, refused

Found = dict[str, Sheet | None]
OPEN = "not measured yet"
BASE = "plain, flash"
NEAR = 0.07  # of the reference's own figure; further off, a plain row is no base for a ratio


def plain(found: Found) -> float | None:
    """ms of the plain row: the forward's own if it is near the reference's figure, else the candidates'."""
    rows = [median(m, BASE) for m in (found["forward"], found["candidates"]) if m]
    near = [ms for ms in rows if ms is not None and abs(ms / REFERENCE[BASE] - 1) <= NEAR]
    return next(iter(near or [ms for ms in rows if ms is not None]), None)


def note(notes: Sheet, name: str) -> list[str]:
    return [notes[name] + "\n"] if name in notes else []


def aims(found: Found) -> str:
    """Issue 5's aims as ratios, each with what was measured."""
    m = found["forward"] or {}
    step = (m.get("step") or {}).get("fused, silence absorbed") or {}
    vae, job, load, two = (found[n] or {} for n in ("vae", "job", "load", "two_gpus"))
    best = max((two.get("speedup") or {"": 0.0}).values()) or None
    base = plain(found)

    def of_plain(name: str) -> float | None:
        ms = None if refused(m, name) else median(m, name)
        return ms / base if ms and base else None

    fast = [of_plain(r["variant"]) for r in m.get("variants", []) if r["tier"] == "fast"]
    fastest = min((share for share in fast if share), default=None)
    rows: list[tuple[str, str, float | None, float, bool]] = [
        ("exact forward / plain, flash", "≤ 0.50", of_plain("fused"), 0.50, True),
        ("exact forward / tuned, cuDNN", "≤ 0.72", ratio(m, "fused", "tuned, cuDNN"), 0.72, True),
        (
            "with absorbed audio (20 GiB) / plain, flash",
            "≤ 0.50",
            of_plain("fused, absorbed"),
            0.50,
            True,
        ),
        (
            "with absorbed audio / tuned, cuDNN",
            "≤ 0.72",
            ratio(m, "fused, absorbed", "tuned, cuDNN"),
            0.72,
            True,
        ),
        ("three-pass step, in forwards", "≤ 2.93", step.get("forwards"), 2.93, True),
        ("two speakers / one", "≤ 1.05", ratio(m, "fused, two speakers", "fused"), 1.05, True),
        ("step on two GPUs, × one GPU", "≥ 1.9", best, 1.9, False),
        ("VAE decode (bf16), s", "≤ 1.2", _seconds(vae, "decode bf16"), 1.2, True),
        (
            "VAE encode of a clip (fp32), s",
            "≤ 0.9",
            _seconds(vae, "encode fp32, 1 known frame, reuse"),
            0.9,
            True,
        ),
        ("fast tier / plain, flash", "≤ 0.33", fastest, 0.33, True),
        ("cold load, of the disk's rate", "≥ 0.80", load.get("share_of_disk"), 0.80, False),
        ("outside DiT and VAE, warm 8-step job", "< 0.03", _outside(job), 0.03, True),
    ]
    kernel = next((r["kernel"] for r in m.get("variants", []) if r["variant"] == "fused"), OPEN)
    about = f'Exact is "fused" (attention: {kernel}); a refused variant\'s figure counts for nothing.'
    lines = ["## Aims", "", about, ""]
    lines += ["| | aim | measured | |", "|---|---:|---:|---|"]
    for name, aim, got, bound, below in rows:
        if got is None:
            lines.append(f"| {name} | {aim} | {OPEN} | |")
            continue
        ok = got <= bound if below else got >= bound
        lines.append(f"| {name} | {aim} | {got:.3f} | {'reached' if ok else 'not reached'} |")
    return "\n".join([*lines, ""])


def _seconds(vae: Sheet, case: str) -> float | None:
    found = [r["median_ms"] for r in vae.get("rows", []) if r["case"] == case and r["size"] == "640x640"]
    return found[0] / 1e3 if found else None


def _outside(job: Sheet) -> float | None:
    rows = [r["outside"] for r in job.get("rows", []) if r["job"] != "warm-up"]
    return min(rows) if rows else None


def attention(m: Sheet | None) -> str:
    lines = ["## Self-attention alone, kept up", ""]
    if m is None:
        return "\n".join([*lines, f"Every way to compute it, with clocks and power: {OPEN}.", ""])
    size = m["size"]
    lines += [
        f"L as said, {size['heads']} heads of {size['dim']}, bf16; each after 2 s of the same; first: as a short benchmark has it.",
        "",
        "| attention | layout | L | ms | TFLOP/s | first | SM MHz | W | error |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in m["rows"]:
        if "failed" in r:
            lines.append(
                f"| {r['attention']} | {r['layout']} | {r['length']} | failed: {r['failed']} | | | | | |"
            )
            continue
        refused = "" if r["ok"] else " **refused**"
        lines.append(
            f"| {r['attention']} | {r['layout']} | {r['length']} | {r['ms']:.2f} | {r['tflops']:.0f} | {r['first_tflops']:.0f} "
            f"| {r.get('sm_mhz', '')} | {r.get('watts', '')} | {r['error']:.1e}{refused} |"
        )
    for r in m["rows"]:
        plans = [p for p in r.get("plans", []) if "ms" in p]
        if plans:
            lines += ["", f"cuDNN's plans ({r['version']}), {r['layout']}, fastest first:", ""]
            lines += ["| plan | ms |", "|---|---:|", *(f"| `{p['plan']}` | {p['ms']} |" for p in plans[:8])]
    if m.get("cross_ms"):
        lines += ["", "Cross-attention, ms:", "", "| | ms |", "|---|---:|"]
        lines += [f"| {name} | {ms} |" for name, ms in m["cross_ms"].items()]
    lines += ["", *(f"{name}: absent ({why})." for name, why in m["absent"].items())]
    return "\n".join([*lines, ""])


def vae(m: Sheet | None) -> str:
    lines = ["## VAE", ""]
    if m is None:
        return "\n".join([*lines, f"Encoding a clip, decoding in fp32 and bf16: {OPEN}.", ""])
    lines += [
        "| size | case | ms | of plain | GiB beside | MS-SSIM | same bits |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    lines += [
        f"| {r['size']} | {r['case']} | {r['median_ms']:.0f} | {r.get('of_plain', '')} | {r['extra_gib']} "
        f"| {r.get('ms_ssim', '')} | {r.get('same_bits', '')} |"
        for r in m["rows"]
    ]
    return "\n".join([*lines, ""])


def load(m: Sheet | None) -> str:
    lines = ["## Loading", ""]
    if m is None or "rows" not in m:
        return "\n".join(
            [*lines, f"Converted weights from the disk to the GPU, against O_DIRECT reads: {OPEN}.", ""]
        )
    lines += [
        f"{m['written']['gb']} GB, {m['written']['blocks']} blocks; read_from_disk: what the kernel fetched, of all bytes.",
        "",
        "| | s | GB/s | read from disk |",
        "|---|---:|---:|---:|",
    ]
    lines += [
        f"| {r['what']} | {r.get('s', '')} | {r.get('gb_s', r.get('failed', ''))} | {r.get('read_from_disk', '')} |"
        for r in m["rows"]
    ]
    return "\n".join([*lines, ""])


def job(m: Sheet | None) -> str:
    lines = ["## A warm job of 8 steps", ""]
    if m is None or not m.get("rows"):
        return "\n".join(
            [*lines, f"Through `multitalk_runtime.Generator`, networks of the real sizes: {OPEN}.", ""]
        )
    lines += [
        f"Video: {m['video']}.",
        "",
        "| job | s | DiT | VAE encode | decode | outside | share | peak GiB |",
    ]
    lines += ["|---|---:|---:|---:|---:|---:|---:|---:|"]
    for r in m["rows"]:
        spent = " | ".join(f"{r.get(f'{n} s', 0):.2f}" for n in ("dit", "vae encode", "vae decode"))
        lines.append(
            f"| {r['job']}, {r['steps']} steps | {r['s']:.2f} | {spent} | {r['outside_s']:.2f} | {100 * r['outside']:.1f} % | {r['peak_gib']} |"
        )
    last = m["rows"][-1]
    stages = ", ".join(f"{name} {s:.2f}" for name, s in last["phases"].items())
    return "\n".join([*lines, "", f"By stage, in s: {stages}.", ""])


def two(m: Sheet | None) -> str:
    lines = ["## Two GPUs", ""]
    if m is None or "ms" not in m:
        text = f"A step on one and on two GPUs over NCCL: {OPEN} (the code is tested with gloo on 2 and 4 processes)."
        return "\n".join([*lines, text, ""])
    lines += [
        f"{m['world']} × {m['facts']['gpu']}, {m['backend']} {m['nccl']['version']}, variant {m['variant']}; an all-to-all of {m['transfer']['mb']} MB "
        f"sends {m['transfer']['gb_s']} GB/s.",
        "",
        "| three-pass step | ms | × one GPU | predicted | distance to one GPU's result | peak GiB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, ms in m["ms"].items():
        speed, predicted = m["speedup"].get(name, 1), OTHERS.get(name, ("", ""))[1]
        off = m["results"].get(name, {}).get("distance", 0)
        peak = (m.get("peak_gib") or {}).get(name, "")
        lines.append(f"| {name} | {ms} | {speed} | {predicted} | {off:.1e} | {peak} |")
    return "\n".join([*lines, ""])


def others(found: Found) -> str:
    """Predictions that are no forward's time."""
    speed = (found["two_gpus"] or {}).get("speedup") or {}
    got: dict[str, Any] = {
        "hybrid": speed.get("hybrid"),
        "Ulysses": speed.get("Ulysses"),
        "outside": _outside(found["job"] or {}),
        "share_of_disk": (found["load"] or {}).get("share_of_disk"),
    }
    lines = ["| | predicted | measured |", "|---|---:|---:|"]
    lines += [
        f"| {what} | {value} | {OPEN if got[name] is None else got[name]} |"
        for name, (what, value) in OTHERS.items()
    ]
    return "\n".join([*lines, ""])
