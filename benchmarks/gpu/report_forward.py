# ruff: noqa: E501  the lines below are those of a generated document
"""The sections of docs/performance.md that one run of forward.py gives."""

from __future__ import annotations

import shlex

from predictions import PREDICTED, REFERENCE
from report_base import (
    ACROSS,
    NEAR,
    ONE_PROCESS,
    OPEN,
    PLAIN,
    TUNED,
    Found,
    Sheet,
    median,
    of_plain,
    plain_counts,
    plain_off,
    ratio,
    row_of,
    shown,
)

GROUPS = (
    ("attention", ("sdpa", "flash", "Flash", "cross_kernel")),
    ("linears", ("nvjet", "gemm", "cutlass")),
    (
        "our kernels",
        (
            "gate_residual",
            "rms_norm",
            "layer_norm_kernel",
            "quantize_kernel",
            "head_extremes",
            "bias_softmax",
        ),
    ),
)
REST = "everything else"


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


def variants(found: Found, notes: dict[str, str]) -> str:
    """The forward's table, each variant beside its prediction."""
    m = found["forward"] or {}
    errors = {(r["variant"], r["people"]): r for r in m.get("correctness", []) if "error" in r}
    predicted = PREDICTED["candidates" if m is found["candidates"] else "forward"]
    lines = [
        "## One forward",
        "",
        "Error: ‖out − fp32‖ / ‖fp32‖ of two blocks at the full token count, fp32 without TF32; ratio: to the error of",
        'the reference\'s order of rounding ("tuned, flash"), with the same number of speakers. A variant counts up to 1.10;',
        "the fast tier is lossy and only reported. With two speakers the error is that of tokens whose speaker flips",
        "between fp32 and bf16, in any variant. Host: ms it takes to launch the forward.",
        "",
        "| variant | what | ms (all rounds) | predicted | of plain | of tuned, cuDNN | GiB | error | ratio | SM MHz | W | host |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    marks = {ONE_PROCESS: "¹", ACROSS: "²"}
    for row in m["variants"]:
        name, last = row["variant"], row["rounds"][-1]
        e = errors.get((name, row["people"]), {})
        counts = "" if e.get("ok", True) else " **refused**"
        rounds = " ".join(f"{ms:.0f}" for ms in row["ms"])
        share, how = of_plain(found, name)
        of_tuned = ratio(m, name, TUNED) if name != PLAIN or plain_counts(m) else None
        error = f"{e['error']:.5f} | {e['ratio']:.3f}{counts}" if e else " | "
        lines.append(
            f"| {name} | {row['what']} | **{row['median_ms']:.0f}** ({rounds}) | {predicted.get(name, ('', ''))[1]} "
            f"| {shown(share)}{marks.get(how, '')} | {shown(of_tuned)} | {row['peak_gib'] or 0:.1f} | {error} "
            f"| {last.get('sm_mhz', '')} | {last.get('watts', '')} | {last['launch_ms']:.0f} |"
        )
    return "\n".join([*lines, *_plain(found, notes), *_remarks(m), *_reference(m), ""])


def _plain(found: Found, notes: dict[str, str]) -> list[str]:
    """What the marks mean, and why there are any."""
    m, other = found["forward"] or {}, found["candidates"] or {}
    base, there = median(other, PLAIN), row_of(other, PLAIN)
    if plain_off(m) is None or plain_counts(m):
        return []
    lines = [
        "",
        f'"plain, flash" is more than {100 * NEAR:.0f} % off the reference\'s own figure (see below), so that no ratio is taken to it. '
        + notes.get("forward", "Why is not known."),
    ]
    if base is None or there is None or not plain_counts(other):
        return lines
    lines += [
        f"In `candidates.json`, whose run had its host to itself, the row is {base:.0f} ms ({100 * (plain_off(other) or 0):+.1f} %, "
        f"launched in {there['rounds'][-1]['launch_ms']:.0f}).",
        f"¹ The ratio within that run, of the same variant; there flash-attn 3 did self-attention alone. ² Across two runs: this run's time over those {base:.0f} ms.",
    ]
    return lines


def _remarks(m: Sheet) -> list[str]:
    """Of the rows: clocks, what compiling took, how far lossy ones are from the exact one, who is absent."""
    out = []
    last = [row["rounds"][-1] for row in m["variants"]]
    if all("sm_mhz" in r for r in last):
        capped = sum(r["held_by"].get("power cap", 0) >= 0.99 for r in last)
        clocks = sorted(r["sm_mhz"] for r in last)
        free = (m.get("ceilings") or {}).get("copy", {}).get("sm_mhz", "")
        out.append(
            f"The power cap held the clock all the time in {capped} of {len(last)} rows, at {clocks[0]} to {clocks[-1]} MHz; a copy runs at {free}."
        )
    lossy = [row for row in m["variants"] if "error_to_exact" in row]
    if lossy:
        far = ", ".join(f"{row['error_to_exact']:.3f} ({row['variant']})" for row in lossy)
        out.append(f"The whole forward's distance to the exact one's: {far}.")
    for row in m["variants"]:
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
    return ["", *out] if out else []


def _reference(m: Sheet) -> list[str]:
    rows = [(n, ms, median(m, n)) for n, ms in REFERENCE.items()]
    off = ", ".join(f"{n} {100 * (got / ms - 1):+.1f} % ({ms} ms)" for n, ms, got in rows if got)
    lines = [
        "",
        "The plain and tuned rows are this model made to do what the reference does (`benchmarks/gpu/plain.py`). Against the",
        f"reference itself, measured earlier on other cards of the kind: {off}.",
    ]
    parts = m.get("plain_parts")
    if parts:
        lines += [
            f"Plain over tuned, by part: a rotation with its table from the CPU {parts['rotation_cpu_table_ms']} ms against "
            f"{parts['rotation_gpu_table_ms']} ms,",
            f"80 times; a reference map with its flushes {parts['map_with_flushes_ms']} ms, 40 times.",
        ]
    return lines


def step(m: Sheet) -> str:
    lines = ["## A step of three passes", ""]
    found = m.get("step")
    if not found:
        return "\n".join([*lines, f"{OPEN.capitalize()}.", ""])
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
    out = {name: 0.0 for name, _ in GROUPS} | {REST: 0.0}
    for row in rows:
        group = next((n for n, marks in GROUPS if any(k in row["kernel"] for k in marks)), REST)
        out[group] += row["ms"]
    return out


def profile(m: Sheet, variant: str) -> list[Sheet]:
    """The kernels of a profiled forward; none if it was not profiled."""
    return next((b["kernels"] for b in m.get("breakdown") or [] if b["variant"] == variant), [])


def attention_rate(m: Sheet, rows: list[Sheet]) -> float:
    """FLOP/s of all attention over tokens, text and image in a profiled forward."""
    config, tokens = m["size"]["config"], m["size"]["tokens"]
    work = 4 * config["num_layers"] * tokens * (tokens + 512 + 257) * config["dim"]
    return work / grouped(rows)["attention"] * 1e3


def linear_rate(m: Sheet, rows: list[Sheet]) -> float:
    """FLOP/s of the blocks' linears in a profiled forward without absorbed audio: q, k, v, o; q, o of text and of
    audio attention; the FFN.
    """
    config = m["size"]["config"]
    width = 8 * config["dim"] ** 2 + 2 * config["dim"] * config["ffn_dim"]
    return 2 * m["size"]["tokens"] * config["num_layers"] * width / grouped(rows)["linears"] * 1e3


def rounding_ms(rows: list[Sheet]) -> float:
    """ms of a profiled forward that make q, k and v fp8."""
    return float(sum(row["ms"] for row in rows if row["kernel"].startswith("head_")))


def where(m: Sheet) -> str:
    """What each kind of work takes of the profiled forwards."""
    found = m.get("breakdown") or []
    if not found:
        return ""
    names = [name for name, _ in GROUPS] + [REST]
    lines = ["## Where a forward's time goes", "", "ms, by the profiler, kernels from 1 ms up (the JSON has each):", ""]  # fmt: skip
    lines += [f"| variant | {' | '.join(names)} | gaps between launches | attention's TFLOP/s |"]
    lines += ["|---" + "|---:" * (len(names) + 2) + "|"]
    for entry in found:
        spent = grouped(entry["kernels"])
        gaps = max(0, entry["unprofiled"]["ms"] - entry["busy_ms"])
        lines.append(
            f"| {entry['variant']} | {' | '.join(f'{spent[n]:.0f}' for n in names)} | {gaps:.0f} "
            f"| {attention_rate(m, entry['kernels']) / 1e12:.0f} |"
        )
    return "\n".join([*lines, ""])


def kernels(m: Sheet) -> str:
    if not m.get("kernels"):
        return f"## Kernels\n\n{OPEN.capitalize()}.\n"
    copy = copy_rate(m)
    lines = [
        "## Kernels",
        "",
        f"Bytes: each input read once, each output written once; a copy moves {copy} TB/s on this card. Error against fp64;",
        "bf16 outputs round once, as the reference function does. Three inputs one after the other, behind other work:",
        "neither a cache nor a launch shows. `head_extremes` includes the small reductions after it.",
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


def kept_up(m: Sheet) -> list[tuple[float, float]]:
    """(kept up, first) TFLOP/s of the linears' shapes, the slowest first."""
    rows = (m.get("ceilings") or {}).values()
    return sorted((r["tflops"], r["first_tflops"]) for r in rows if "tflops" in r)


def ceilings(m: Sheet) -> str:
    found = m.get("ceilings") or {}
    lines = ["## Ceilings of this card", ""]
    if not found:
        return "\n".join([*lines, f"{OPEN.capitalize()}.", ""])
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
        return "\n".join([*lines, f"Smoke-size forwards, plain, fused and as one CUDA graph: {OPEN}.", ""])
    times = ", ".join(f"{r['variant']} {r['ms']:.2f}" for r in rows)
    text = (
        f"{rows[0]['layers']} blocks, {rows[0]['tokens']} tokens, where launches are the time; ms: {times}."
    )
    return "\n".join([*lines, f"{text}{_smallest(m, rows)}", ""])


def _smallest(m: Sheet, rows: list[Sheet]) -> str:
    """Whether launches ever are the time of a real clip: the shortest has two latent frames."""
    fused = next((r for r in rows if r["variant"] == "fused"), None)
    rows_of = profile(m, "fused")
    if fused is None or not rows_of:
        return ""
    spent = grouped(rows_of)
    blocks, tokens = m["size"]["config"]["num_layers"], 2 * m["size"]["tokens"] // m["size"]["latent"][0]
    launching = blocks * fused["ms"] / fused["layers"]
    computing = (sum(spent.values()) - spent["attention"]) * tokens / m["size"]["tokens"]
    text = (
        f" At that rate {blocks} blocks are launched in {launching:.0f} ms. The shortest clip there is, 5 frames, has "
        f"{tokens:,} tokens, whose share of linears and elementwise work alone is {computing:.0f} ms in bf16."
    )
    if computing <= launching:
        return f"{text} A graph would win there; the runtime has none."
    spread = int(computing / launching)
    return (
        f"{text} On one GPU a graph has nothing to win in a real clip, and the runtime has none; such a clip spread over more "
        f"than {spread} would be bound by launches (by these figures, not measured)."
    )
