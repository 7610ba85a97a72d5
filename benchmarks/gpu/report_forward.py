# ruff: noqa: E501  the lines below are those of a generated document
"""The sections of docs/performance.md that one run of forward.py gives."""

from __future__ import annotations

import shlex
from typing import Any

from predictions import PREDICTED, REFERENCE

GROUPS = (
    ("attention", ("sdpa", "flash", "Flash", "cross_kernel")),
    ("linears", ("nvjet", "gemm", "cutlass")),
    ("our kernels", ("gate_residual", "rms_norm", "layer_norm_kernel", "quantize_kernel", "head_extremes")),
)
Sheet = dict[str, Any]


def median(m: Sheet, name: str) -> float | None:
    return next((row["median_ms"] for row in m.get("variants", []) if row["variant"] == name), None)


def ratio(m: Sheet, name: str, to: str) -> float | None:
    """Of two medians; None where one is missing or was refused."""
    a, b = (None if refused(m, n) else median(m, n) for n in (name, to))
    return None if a is None or b is None else a / b


def refused(m: Sheet, name: str) -> bool:
    return any(r["variant"] == name and not r.get("ok", True) for r in m.get("correctness", []))


def head(m: Sheet, name: str) -> str:
    f, size = m["facts"], m["size"]
    names = [row["variant"] for row in m["variants"]]
    repeats = str(len(m["variants"][0]["ms"]))
    out = f"docs/evidence/gpu/{name}.json"
    again = ["python", "benchmarks/gpu/forward.py", "--out", out, "--repeats", repeats, "--only", *names]
    return f"""# Performance

Written by `python benchmarks/gpu/report.py` from the measurements in `docs/evidence/gpu`; do not edit.

One {f["gpu"]}, torch {f["torch"]}, cuDNN {f["cudnn"]}, triton {f["triton"]}, {m["when"]}. The real-width DiT
({m["parameters"] / 1e9:.2f} B parameters, random bf16 weights made on the GPU), {size["frames"]} frames at
{size["latent"][1] * 8}×{size["latent"][2] * 8}: {size["tokens"]:,} tokens, {m["pflop"]:.3f} PFLOP a forward as the
reference counts them. All rows of a table are of one process, the variants timed in turn. Again, with a GPU (all
parts, in three calls: `docs/evidence/gpu/README.md`):

    {shlex.join(again)}
"""


def variants(m: Sheet, plain: float | None) -> str:
    """The table of a run; ratios to `plain`, a time that may be of another run."""
    errors = {(r["variant"], r["people"]): r for r in m.get("correctness", []) if "error" in r}
    lines = [
        "## One forward",
        "",
        "Error: ‖out − fp32‖ / ‖fp32‖ of two blocks at the full token count, fp32 without TF32; ratio: to the error of",
        'the reference\'s order of rounding ("tuned, flash"), with the same number of speakers. A variant counts up to 1.10;',
        "the fast tier is lossy and only reported. With two speakers the error is that of tokens whose speaker flips",
        "between fp32 and bf16, in any variant.",
        "",
        "| variant | what | ms (all rounds) | of plain | TFLOP/s | peak GiB | error | ratio |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in m["variants"]:
        e = errors.get((row["variant"], row["people"]), {})
        counts = "" if e.get("ok", True) else " **refused**"
        rounds = " ".join(f"{ms:.0f}" for ms in row["ms"])
        of_plain = "" if plain is None else f"{row['median_ms'] / plain:.3f}"
        error = f"{e['error']:.5f} | {e['ratio']:.3f}{counts}" if e else " | "
        lines.append(
            f"| {row['variant']} | {row['what']} | **{row['median_ms']:.0f}** ({rounds}) | {of_plain} "
            f"| {row['model_tflops']:.0f} | {row['peak_gib'] or 0:.1f} | {error} |"
        )
    lines += [*_notes(m), *_clocks(m), *_reference(m)]
    return "\n".join([*lines, ""])


def _notes(m: Sheet) -> list[str]:
    out = [""]
    for row in m["variants"]:
        if "error_to_exact" in row:
            out.append(
                f"{row['variant']}: the whole forward is {row['error_to_exact']:.4f} (relative) from the exact one's."
            )
        if "compile_s" in row:
            cold = next(
                (r.get("compile_s") for r in m["correctness"] if r["variant"] == row["variant"]), None
            )
            out.append(
                f"{row['variant']}: compiling took {cold} s with nothing cached, {row['compile_s']} s after it "
                f"({row['compiled_graphs']} graph for all blocks)."
            )
    absent = [r for r in m.get("correctness", []) if "absent" in r]
    out += [f"{r['variant']}: did not run ({r['absent']})." for r in absent]
    return out if len(out) > 1 else []


def _clocks(m: Sheet) -> list[str]:
    """What the card did during the rounds, where NVML was read."""
    rows = [r for r in m["variants"] if r.get("rounds") and "sm_mhz" in r["rounds"][-1]]
    if not rows:
        return []
    lines = ["", "During the rounds (median of each row's last one):", ""]
    lines += ["| variant | SM MHz | W | clock held by | host's launching, ms |", "|---|---:|---:|---|---:|"]
    for row in rows:
        last = row["rounds"][-1]
        held = (
            ", ".join(f"{name} {100 * share:.0f} %" for name, share in last["held_by"].items()) or "nothing"
        )
        lines.append(
            f"| {row['variant']} | {last['sm_mhz']} | {last['watts']} | {held} | {last['launch_ms']:.0f} |"
        )
    return lines


def _reference(m: Sheet) -> list[str]:
    rows = [(n, ms, median(m, n)) for n, ms in REFERENCE.items()]
    lines = [
        "",
        "The plain and tuned rows are this model made to do what the reference does (`benchmarks/gpu/plain.py`). Against the",
        "reference itself, measured earlier on other cards of the kind:",
        "",
        "| row | reference ms | here | difference |",
        "|---|---:|---:|---:|",
        *(f"| {n} | {ms} | {got:.0f} | {100 * (got / ms - 1):+.1f} % |" for n, ms, got in rows if got),
    ]
    parts = m.get("plain_parts")
    if parts:
        lines += [
            "",
            f"Plain over tuned, by part: a rotation with its table from the CPU {parts['rotation_cpu_table_ms']} ms against "
            f"{parts['rotation_gpu_table_ms']} ms,",
            f"80 times; a reference map with its flushes {parts['map_with_flushes_ms']} ms, 40 times.",
        ]
    return lines


def step(m: Sheet) -> str:
    lines = ["## A step of three passes", ""]
    found = m.get("step")
    if not found:
        return "\n".join([*lines, "Not measured yet.", ""])
    lines += [
        "| variant | step ms | one pass ms | passes | same as single passes |",
        "|---|---:|---:|---:|---|",
    ]
    for name, s in found.items():
        same = "bit for bit" if s["same_as_single_passes"] else "**no**"
        lines.append(
            f"| {name} | {s['step_ms']:.0f} | {s['forward_ms']:.0f} | {s['forwards']:.3f} | {same} |"
        )
    for name, s in found.items():
        if "forwards_not_kept" in s:
            lines += [
                "",
                f"Against a forward that embeds its conditions itself ({s['forward_not_kept_ms']:.0f} ms), as the "
                f"reference's does, a step of {name} is {s['forwards_not_kept']:.3f}.",
            ]
    return "\n".join([*lines, ""])


def grouped(rows: list[Sheet]) -> dict[str, float]:
    out = {name: 0.0 for name, _ in GROUPS} | {"everything else": 0.0}
    for row in rows:
        group = next((n for n, marks in GROUPS if any(k in row["kernel"] for k in marks)), "everything else")
        out[group] += row["ms"]
    return out


def attention_rate(m: Sheet, rows: list[Sheet]) -> float:
    """FLOP/s of all attention over tokens, text and image in a profiled forward."""
    config, tokens = m["size"]["config"], m["size"]["tokens"]
    work = 4 * config["num_layers"] * tokens * (tokens + 512 + 257) * config["dim"]
    return work / grouped(rows)["attention"] * 1e3


def where(m: Sheet) -> str:
    lines = ["## Where a forward's time goes", "", "By the profiler, kernels from 1 ms up.", ""]
    for entry in m.get("breakdown") or []:
        lines += _profile(m, entry)
    return "\n".join(lines)


def _profile(m: Sheet, entry: Sheet) -> list[str]:
    rows, whole, busy = entry["kernels"], entry["unprofiled"]["ms"], entry["busy_ms"]
    groups = grouped(rows)
    total = sum(groups.values())
    lines = [f"### {entry['variant']}", "", "| | ms | share |", "|---|---:|---:|"]
    lines += [f"| {group} | {ms:.0f} | {100 * ms / total:.1f} % |" for group, ms in groups.items()]
    floor, tuned = groups["attention"] + groups["linears"], median(m, "tuned, cuDNN")
    lines += [
        "",
        f"One forward takes {whole:.0f} ms without the profiler; all kernels are {busy:.0f} of them, so gaps between launches are",
        f"{max(0, whole - busy):.0f} ms. Attention runs at {attention_rate(m, rows) / 1e12:.0f} TFLOP/s in it."
        + (
            f" Attention and linears take {floor:.0f} ms, {floor / tuned:.2f} of the tuned row."
            if tuned
            else ""
        ),
        "",
        "| kernel | calls | ms |",
        "|---|---:|---:|",
    ]
    lines += [f"| `{r['kernel'][:70]}` | {r['calls']} | {r['ms']:.1f} |" for r in rows[:14]]
    return [*lines, ""]


def predictions(found: dict[str, Sheet | None]) -> str:
    """Prediction and result of the candidates' run, where "fused" was with cuDNN, and of the last one."""
    lines = ["## Prediction and result", ""]
    titles = {"candidates": "The candidates' run, in which", "forward": "The last run, in which"}
    means = {"candidates": '"fused" was with cuDNN:', "forward": '"fused" is with flash-attn 3:'}
    for run, predicted in PREDICTED.items():
        m = found[run] or {}
        if run == "forward" and m is found["candidates"]:
            m = {}
        lines += [
            f"{titles[run]} {means[run]}",
            "",
            "| | predicted ms | measured | |",
            "|---|---:|---:|---:|",
        ]
        for name, (what, ms) in predicted.items():
            got = median(m, name)
            result = "not measured yet | " if got is None else f"{got:.0f} | {100 * (got / ms - 1):+.0f} %"
            lines.append(f"| {name}: {what} | {ms} | {result} |")
        lines.append("")
    return "\n".join(lines)


def kernels(m: Sheet) -> str:
    if not m.get("kernels"):
        return "## Kernels\n\nNot measured yet.\n"
    copy = copy_rate(m)
    lines = [
        "## Kernels",
        "",
        f"Bytes: each input read once, each output written once; a copy moves {copy} TB/s on this card. Error against fp64;",
        "bf16 outputs round once, as the reference function does. Inputs in rotation, so that no cache holds them.",
        "",
        "| kernel | shape | ms | TB/s | of the copy | eager ms | error | reference's |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in m["kernels"]:
        if "failed" in r:
            lines.append(f"| {r['kernel']} | failed: {r['failed']} | | | | | | |")
            continue
        shape = "×".join(map(str, r["shape"]))
        share = f"{100 * r['tb_s'] / copy:.0f} %" if copy else ""
        lines.append(
            f"| {r['kernel']} | {shape} {r['dtype']} | {r['ms']:.3f} | {r['tb_s']:.2f} | {share} "
            f"| {r['eager_ms']:.3f} | {r['error']:.1e} | {r['reference_error']:.1e} |"
        )
    return "\n".join([*lines, ""])


def copy_rate(m: Sheet) -> float | None:
    return (m.get("ceilings") or {}).get("copy", {}).get("tb_s")


def ceilings(m: Sheet) -> str:
    found = m.get("ceilings") or {}
    lines = ["## Ceilings of this card", ""]
    if not found:
        return "\n".join([*lines, "Not measured yet.", ""])
    lines += ["Kept up: after 1.5 s of the same; first: as a short benchmark has it.", ""]
    lines += ["| | kept up | first | SM MHz | W |", "|---|---:|---:|---:|---:|"]
    for name, r in found.items():
        rate = f"{r['tb_s']} TB/s | " if "tb_s" in r else f"{r['tflops']} TFLOP/s | {r['first_tflops']}"
        lines.append(f"| {name} | {rate} | {r.get('sm_mhz', '')} | {r.get('watts', '')} |")
    return "\n".join([*lines, ""])


def small(m: Sheet) -> str:
    rows = m.get("small")
    lines = ["## Small shapes", ""]
    if not rows:
        return "\n".join(
            [*lines, "Smoke-size forwards, plain, fused and as one CUDA graph: not measured yet.", ""]
        )
    lines += [f"{rows[0]['layers']} blocks, {rows[0]['tokens']} tokens: launches are the time.", ""]
    lines += ["| variant | ms |", "|---|---:|", *(f"| {r['variant']} | {r['ms']} |" for r in rows)]
    return "\n".join([*lines, ""])
