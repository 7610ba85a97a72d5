# ruff: noqa: E501  the lines below are those of a generated document
"""The section of docs/performance.md on the run that compared ways to make the forward faster."""

from __future__ import annotations

from predictions import PREDICTED
from report_base import PLAIN, TUNED, Sheet, ratio, shown
from report_forward import attention_rate, grouped, profile

FLASH_3 = "fused, flash-attn 3"
INT8 = ("fast, fp8 linears, int8 attention", "fast, fp8 linears, int8 and fp8 attention")


def candidates(m: Sheet | None) -> str:
    """What was tried in one process, and what its numbers say."""
    if not m or not m.get("variants"):
        return ""
    lines = [
        "## Candidates",
        "",
        f"The run that chose among them (`docs/evidence/gpu/candidates.json`, {m['when']}, torch {m['facts']['torch']}), in one process:",
        'what won became the default, so "fused" here is with cuDNN, and names are those of that run. int8 attention, our own',
        "Triton kernels then, is no longer part of the project.",
        "",
        "| variant | attention | ms | predicted | of plain, flash | of tuned, cuDNN | error ratio | SM MHz | W |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
        *(_row(m, row) for row in m["variants"]),
        "",
    ]
    absent = [r for r in m["correctness"] if "absent" in r]
    lines += [f"{r['variant']}: did not run ({r['absent']}).\n" for r in absent]
    lines += ["What was learned:", "", *(f"- {text}" for text in _learned(m) if text), ""]
    return "\n".join(lines)


def _row(m: Sheet, row: Sheet) -> str:
    name, last = row["variant"], row["rounds"][-1]
    known = {(r["variant"], r["people"]): r for r in m["correctness"] if "error" in r}
    found = known.get((name, row["people"]))
    error = "" if found is None else f"{found['ratio']:.3f}"
    shares = " | ".join(shown(ratio(m, name, base)) for base in (PLAIN, TUNED))
    predicted = PREDICTED["candidates"].get(name, ("", ""))[1]
    return (
        f"| {name} | {row['kernel']} | {row['median_ms']:.0f} | {predicted} | {shares} | {error} "
        f"| {last.get('sm_mhz', '')} | {last.get('watts', '')} |"
    )


def _learned(m: Sheet) -> list[str]:
    """A sentence or two for each question, each only where its rows are there."""
    return [_power(m), _flash_3(m), _int8(m), _compiled(m), _cross(m), _graph(m)]


def _rows(m: Sheet, *names: str) -> list[Sheet]:
    """These variants' rows, or none if one is missing."""
    known = {row["variant"]: row for row in m["variants"]}
    return [known[n] for n in names] if all(n in known for n in names) else []


def _power(m: Sheet) -> str:
    last = [row["rounds"][-1] for row in m["variants"]]
    if not all("sm_mhz" in r for r in last):
        return ""
    capped = sum(r["held_by"].get("power cap", 0) >= 0.99 for r in last)
    clocks = sorted(r["sm_mhz"] for r in last)
    return f"Power: the cap held the clock all the time in {capped} of {len(last)} rows, at {clocks[0]} to {clocks[-1]} MHz. A row that draws the cap's watts gets faster by fewer joules alone."


def _flash_3(m: Sheet) -> str:
    rows = _rows(m, "fused", FLASH_3)
    kernels = profile(m, "fused")
    if not rows or not kernels:
        return ""
    before, after = (row["median_ms"] for row in rows)
    attention, rate = grouped(kernels)["attention"], attention_rate(m, kernels) / 1e12
    left = attention - (before - after)
    joules = [row["median_ms"] / 1e3 * row["rounds"][-1]["watts"] for row in rows]
    clocks = [row["rounds"][-1]["sm_mhz"] for row in rows]
    return (
        f"flash-attn 3 for self-attention: {before:.0f} → {after:.0f} ms ({100 * (1 - after / before):.1f} % less), the error as it was. All attention took {attention:.0f} ms "
        f"({rate:.0f} TFLOP/s); less the difference that is {left:.0f} ms ({rate * attention / left:.0f} TFLOP/s). The same operations at {clocks[1]} MHz "
        f"instead of {clocks[0]}, with {joules[1]:.0f} J instead of {joules[0]:.0f} a forward."
    )


def _int8(m: Sheet) -> str:
    rows = _rows(m, "fast, fp8 linears", *INT8)
    if not rows:
        return ""
    base, *rest = rows
    more = " and ".join(f"{row['median_ms'] - base['median_ms']:.0f} ms" for row in rest)
    watts = " and ".join(str(row["rounds"][-1]["watts"]) for row in rest)
    return (
        f"8-bit attention written in Triton loses: int8, and int8 with fp8, take {more} more than the exact one beside the same fp8 "
        f"linears, drawing {watts} W instead of {base['rounds'][-1]['watts']}: they leave the units waiting."
    )


def _compiled(m: Sheet) -> str:
    rows = _rows(m, "fused", "compiled")
    if not rows:
        return ""
    ours, theirs = (row["median_ms"] for row in rows)
    cold = next((r.get("compile_s") for r in m["correctness"] if r["variant"] == "compiled"), None)
    return (
        f"torch.compile of a block takes {theirs - ours:.0f} ms ({100 * (theirs / ours - 1):.1f} %) more than our kernels, after {cold} s of compiling; "
        f"its error ratio is {_error(m, 'compiled'):.3f} to {_error(m, 'fused'):.3f}."
    )


def _error(m: Sheet, name: str) -> float:
    return next(float(r["ratio"]) for r in m["correctness"] if r["variant"] == name)


def _cross(m: Sheet) -> str:
    pairs = [("fused", "fused, cross kernel"), ("fused, absorbed", "fused, absorbed, cross kernel")]
    rows = [_rows(m, *pair) for pair in pairs]
    if not all(rows):
        return ""
    gains = " and ".join(
        f"{a['median_ms'] - b['median_ms']:.0f} ms ({100 * (1 - b['median_ms'] / a['median_ms']):.1f} %)"
        for a, b in rows
    )
    return f"One kernel for text and image cross-attention gains {gains}, without and with absorbed audio: it stays a candidate."


def _graph(m: Sheet) -> str:
    gaps = [b["unprofiled"]["ms"] - b["busy_ms"] for b in m.get("breakdown", [])]
    return (
        f"Gaps between launches are at most {max(0, *gaps):.0f} ms a forward: a CUDA graph has nothing to win at this size."
        if gaps
        else ""
    )
