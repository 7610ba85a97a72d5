# ruff: noqa: E501  the lines below are those of a generated document
"""The sections of docs/performance.md on everything but the forward."""

from __future__ import annotations

from report_base import OPEN, Sheet

CUDNN, PLANS = "cuDNN", "cuDNN plans"


def vae_row(m: Sheet | None, case: str) -> Sheet:
    rows = (m or {}).get("rows", [])
    return next((r for r in rows if r["case"] == case and r["size"] == "640x640"), {})


def outside(m: Sheet | None) -> float | None:
    """The least share of a measured job that was spent outside DiT and VAE."""
    rows = [r["outside"] for r in (m or {}).get("rows", []) if r["job"] != "warm-up"]
    return min(rows) if rows else None


def share_of_disk(m: Sheet | None) -> float | None:
    return (m or {}).get("share_of_disk")


def attention(m: Sheet | None) -> str:
    lines = ["## Self-attention alone, kept up", ""]
    if m is None:
        return "\n".join([*lines, f"Every way to compute it, with clocks and power: {OPEN}.", ""])
    size = m["size"]
    lines += [
        f"L as said, {size['heads']} heads of {size['dim']}, bf16; each after 2 s of the same; first: as a short benchmark has it. fp8 includes rounding.",
        "",
        "| attention | layout | L | ms | TFLOP/s | first | SM MHz | W | error |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in m["rows"]:
        if r["attention"] == PLANS and "ms" in r:
            continue  # in a sentence below
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
    said = [_cap(m), _tail(m), _plans(m), *(f"{n}: absent ({why})." for n, why in m["absent"].items())]
    lines += ["", *(f"- {text}" for text in said if text)]
    return "\n".join([*lines, *_cross(m.get("cross_ms") or {}), ""])


def _ran(m: Sheet, name: str) -> list[Sheet]:
    """Its rows in the model's layout."""
    return [r for r in m["rows"] if r["attention"] == name and r["layout"] == "as in the model" and "ms" in r]


def _cap(m: Sheet) -> str:
    held = [r["held_by"].get("power cap", 0) for r in m["rows"] if r.get("held_by")]
    if not held or min(held) < 0.5:
        return ""
    return f"The power cap held the clock of all {len(held)} rows, for {100 * min(held):.0f} to {100 * max(held):.0f} % of the time."


def _tail(m: Sheet) -> str:
    """What a last tile that is not full costs."""
    rows = _ran(m, CUDNN)
    full = [r for r in rows if r["length"] % 256 == 0]
    ragged = [r for r in rows if r["length"] % 256]
    if not full or not ragged or (lost := 1 - ragged[0]["tflops"] / full[-1]["tflops"]) <= 0:
        return ""
    rates = " and ".join(f"{r['tflops']:.0f} TFLOP/s at {r['length']:,}" for r in full)
    return (
        f"cuDNN computes {ragged[0]['tflops']:.0f} TFLOP/s at L = {ragged[0]['length']:,}, which is {ragged[0]['length'] / 128:g} tiles of 128, but {rates}: "
        f"the tile that is not full costs {100 * lost:.0f} %."
    )


def _plans(m: Sheet) -> str:
    rows = [r for r in m["rows"] if any("ms" in p for p in r.get("plans", []))]
    base = _ran(m, CUDNN)
    if not rows or not base:
        return ""
    least = ", ".join(f"{min(p['ms'] for p in r['plans'] if 'ms' in p):.1f} ({r['layout']})" for r in rows)
    kept = ", ".join(f"{r['ms']:.1f}" for r in rows)
    return (
        f"Of cuDNN's {len(rows[0]['plans'])} plans (frontend {rows[0]['version']}) the best takes {least} ms when tried; kept up {kept}: no better than the "
        f"{base[0]['ms']:.1f} of the one that PyTorch takes."
    )


def _cross(found: Sheet) -> list[str]:
    """Cross-attention alone: ways by numbers of keys."""
    known = {tuple(name.split(" keys, ", 1)): ms for name, ms in found.items()}
    ways = {key[1]: None for key in known if len(key) == 2}
    keys = {key[0]: None for key in known}
    if not known:
        return []
    lines = ["", f"| cross-attention, ms; keys: | {' | '.join(keys)} |"]
    lines += ["|---" + "|---:" * len(keys) + "|"]
    lines += [f"| {way} | {' | '.join(str(known.get((n, way), '')) for n in keys)} |" for way in ways]
    return lines


def vae(m: Sheet | None, note: str = "") -> str:
    lines = ["## VAE", ""]
    if m is None:
        return "\n".join([*lines, f"Encoding a clip, decoding in fp32 and bf16: {OPEN}.", ""])
    lines += [note, ""] if note else []
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


def load(m: Sheet | None, note: str = "") -> str:
    lines = ["## Loading", ""]
    if m is None or "rows" not in m:
        return "\n".join(
            [*lines, f"Converted weights from the disk to the GPU, against O_DIRECT reads: {OPEN}.", ""]
        )
    lines += [note, ""] if note else []
    lines += [
        f"{m['written']['gb']} GB, {m['written']['blocks']} blocks; read from disk: what the kernel fetched, of all bytes.",
        "",
        "| | s | GB/s | read from disk |",
        "|---|---:|---:|---:|",
    ]
    lines += [
        f"| {r['what']} | {r.get('s', '')} | {r.get('gb_s', r.get('failed', ''))} | {r.get('read_from_disk', '')} |"
        for r in m["rows"]
    ]
    return "\n".join([*lines, ""])


def job(m: Sheet | None, note: str = "") -> str:
    lines = ["## A warm job of 8 steps", ""]
    if m is None or not m.get("rows"):
        return "\n".join(
            [*lines, f"Through `multitalk_runtime.Generator`, networks of the real sizes: {OPEN}.", ""]
        )
    lines += [f"Video: {m['video']}. {note}".strip(), ""]
    lines += ["| job | s | DiT | VAE encode | decode | outside | share | peak GiB |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|---:|"]
    for r in m["rows"]:
        spent = " | ".join(f"{r.get(f'{n} s', 0):.2f}" for n in ("dit", "vae encode", "vae decode"))
        steps = "1 step" if r["steps"] == 1 else f"{r['steps']} steps"
        lines.append(
            f"| {r['job']}, {steps} | {r['s']:.2f} | {spent} | {r['outside_s']:.2f} | {100 * r['outside']:.1f} % | {r['peak_gib']} |"
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
        "| three-pass step | ms | × one GPU | distance to one GPU's result | peak GiB |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, ms in m["ms"].items():
        speed = m["speedup"].get(name, 1)
        off = m["results"].get(name, {}).get("distance", 0)
        peak = (m.get("peak_gib") or {}).get(name, "")
        lines.append(f"| {name} | {ms} | {speed} | {off:.1e} | {peak} |")
    return "\n".join([*lines, ""])
