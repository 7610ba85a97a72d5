# ruff: noqa: E501  the lines below are those of a generated document
"""The aims of docs/performance.md, what was predicted, and what the differences say."""

from __future__ import annotations

from dataclasses import dataclass

from predictions import OTHERS, PREDICTED
from report_base import OPEN, TUNED, Found, Sheet, median, of_plain, ratio, refused
from report_forward import attention_rate, grouped, kept_up, linear_rate, profile, rounding_ms
from report_parts import outside, share_of_disk, vae_row

from wan.quality import AUTO_GIB, FRAMES

WHOLE, PART, PEOPLE = "fused, absorbed", "fused", "fused, two speakers"
FAST, FAST_8 = "fast, fp8 linears", "fast, fp8 linears, fp8 attention"
FAST_WHOLE = f"{FAST_8}, absorbed"
SILENCE = "fused, silence absorbed"
ROOMY = AUTO_GIB["all"] + 1 + (FRAMES - 1) // 4  # GiB from which `settle` absorbs all audio of 81 frames


@dataclass(frozen=True, kw_only=True)
class Aim:
    """One row: what was aimed at and what was had, and how."""

    what: str
    bound: float
    got: float | None
    how: str = ""
    sign: str = "≤"
    digits: int = 3

    def line(self) -> str:
        bound = f"{self.sign} {self.bound:.{2 if round(self.bound, 2) == self.bound else 4}f}"
        if self.got is None:
            return f"| {self.what} | {bound} | {OPEN} | |"
        ok = {"≤": self.got <= self.bound, "<": self.got < self.bound, "≥": self.got >= self.bound}[self.sign]
        how = f" ({self.how})" if self.how else ""
        return f"| {self.what} | {bound} | {self.got:.{self.digits}f} | {'reached' if ok else '**not reached**'}{how} |"


def absorbs(m: Sheet) -> bool:
    """Whether quality `exact` absorbs all audio on the GPU of this run."""
    return (m["facts"].get("memory_gib") or 0) >= ROOMY


def aims(found: Found) -> str:
    """Issue 5's aims as ratios, each with what was measured."""
    m = found["forward"] or {}
    steps = m.get("step") or {}
    two = (found["two_gpus"] or {}).get("speedup") or {}
    one, decode, encode = "as `exact` runs here", "decode bf16", "encode fp32, 1 known frame, reuse"
    names = {WHOLE: "audio absorbed", PART: "not absorbed"}
    names[WHOLE if absorbs(m) else PART] += f", {one}"
    rows = []
    for name, said in names.items():
        share, how = of_plain(found, name)
        rows.append(Aim(what=f"exact forward ({said}) / plain, flash", bound=0.5, got=share, how=how))
        rows.append(Aim(what=f"exact forward ({said}) / tuned, cuDNN", bound=0.72, got=ratio(m, name, TUNED)))
    for name, said in ((SILENCE, "silence absorbed"), (WHOLE, "all audio absorbed")):
        got = steps.get(name, {}).get("forwards")
        rows.append(Aim(what=f"three-pass step ({said}), in its own forwards", bound=2.93, got=got))
    rows.append(Aim(what="two speakers / one, neither absorbed", bound=1.05, got=ratio(m, PEOPLE, PART)))
    best = max(two, key=two.__getitem__, default=None)
    rows.append(
        Aim(what="step on two GPUs, × one GPU", bound=1.9, got=best and two[best], how=best or "", sign="≥")
    )
    rows += [
        Aim(what="VAE decode (bf16), s", bound=1.2, got=_seconds(found, decode)),
        Aim(
            what="its MS-SSIM to fp32",
            bound=0.9995,
            got=vae_row(found["vae"], decode).get("ms_ssim"),
            sign="≥",
            digits=6,
        ),
        Aim(what="VAE encode of a clip (fp32), s", bound=0.9, got=_seconds(found, encode)),
    ]
    both = "fp8 linears and attention"
    whole = f"{both}, audio absorbed"
    if absorbs(m):
        whole += ", as `fast` with `--attention fp8` runs here"
    for name, said in ((FAST_WHOLE, whole), (FAST_8, both), (FAST, "fp8 linears")):
        share, how = of_plain(found, name)
        rows.append(Aim(what=f"fast forward ({said}) / plain, flash", bound=0.33, got=share, how=how))
    rows += [
        Aim(what="cold load, of the disk's rate", bound=0.8, got=share_of_disk(found["load"]), sign="≥"),
        Aim(what="outside DiT and VAE, warm 8-step job", bound=0.03, got=outside(found["job"]), sign="<"),
    ]
    kernel = next((r["kernel"] for r in m.get("variants", []) if r["variant"] == PART), OPEN)
    about = f"Exact attention is `{kernel}`; the names of variants are those of the next section. A refused variant's figure counts for nothing."
    lines = ["## Aims", "", about, "", "| | aim | measured | |", "|---|---:|---:|---|"]
    lines += [row.line() for row in rows]
    said_of = [_exact(m), _held(m), _step(m), _people(m), _fast(found)]
    return "\n".join([*lines, "", *(f"- {text}" for text in said_of if text), ""])


def _seconds(found: Found, case: str) -> float | None:
    ms = vae_row(found["vae"], case).get("median_ms")
    return None if ms is None else ms / 1e3


def _exact(m: Sheet) -> str:
    known = {r["variant"]: r["ratio"] for r in m.get("correctness", []) if "ratio" in r}
    if WHOLE not in known:
        return ""
    return (
        f"`exact` absorbs all audio projections of one speaker on a GPU of {ROOMY} GiB or more (`wan.quality.settle`; this one has "
        f"{m['facts'].get('memory_gib')}). It takes 20 GiB, and the error is {known[WHOLE]:.3f} of the reference's order (gate 1.10)."
    )


def _held(m: Sheet) -> str:
    """Why the forward without absorbed audio is over its aim."""
    ms, tuned, rows = median(m, PART), median(m, TUNED), profile(m, PART)
    kept = kept_up(m)
    if not (ms and tuned and rows and kept) or ms / tuned <= 0.72:
        return ""
    spent, absorbed = grouped(rows), grouped(profile(m, WHOLE))
    both = spent["attention"] + spent["linears"]
    fewer = spent["linears"] - absorbed["linears"] if absorbed["linears"] else None
    return (
        f"Not absorbed, {ms - 0.72 * tuned:.0f} ms are too many. Attention ({spent['attention']:.0f} ms, {attention_rate(m, rows) / 1e12:.0f} TFLOP/s) and linears "
        f"({spent['linears']:.0f} ms, {linear_rate(m, rows) / 1e12:.0f} TFLOP/s) are {both / tuned:.3f} of the tuned row by themselves, at the power cap; alone the "
        f"linears' shapes keep up {kept[0][0]:.0f} to {kept[-1][0]:.0f} TFLOP/s."
        + (f" Absorbing does away with {fewer:.0f} ms of linears." if fewer else "")
    )


def _step(m: Sheet) -> str:
    found = m.get("step") or {}
    if not {SILENCE, WHOLE} <= set(found):
        return ""
    one, whole = found[SILENCE], found[WHOLE]
    return (
        f"A step with all audio absorbed is more of its own forwards, since these are shorter, yet faster: {whole['step_ms']:.0f} ms "
        f"against {one['step_ms']:.0f} with silence alone absorbed."
    )


def _people(m: Sheet) -> str:
    share = ratio(m, PEOPLE, WHOLE)
    return (
        f"What two speakers say is never absorbed (their silence is): against one speaker whose audio is, {share:.3f}."
        if share
        else ""
    )


def _fast(found: Found) -> str:
    """What the fast tier's forward consists of, and what is missing to its aim."""
    m = found["forward"] or {}
    share, _ = of_plain(found, FAST_WHOLE)
    rows, ms = profile(m, FAST_WHOLE), median(m, FAST_WHOLE)
    if not (share and ms and rows) or refused(m, FAST_WHOLE):
        return ""
    spent, base = grouped(rows), ms / share
    missing = f"{ms - 0.33 * base:.0f} ms are missing to 0.33. " if share > 0.33 else ""
    one = median(m, FAST_8)
    saves = (
        f" It saves {one - ms:.0f} ms, and of audio's projections the weights alone are rounded to fp8."
        if one
        else ""
    )
    return (
        f"Fast: {missing}{spent['attention']:.0f} ms are attention, {spent['linears']:.0f} linears and absorbed audio's products, {spent['our kernels']:.0f} our kernels, "
        f"{rounding_ms(rows):.0f} of them for q, k and v to fp8. `fast` absorbs where `exact` does.{saves}"
    )


def predictions(found: Found) -> str:
    """Predictions that are no row of the other tables, and what the differences say of all."""
    two = (found["two_gpus"] or {}).get("speedup") or {}
    got = {
        "hybrid": two.get("hybrid"),
        "Ulysses": two.get("Ulysses"),
        "outside": outside(found["job"]),
        "share_of_disk": share_of_disk(found["load"]),
    }
    lines = ["## Prediction and result", "", "Of forwards: the column in the tables above. Of the rest:", ""]
    lines += ["| | predicted | measured |", "|---|---:|---:|"]
    lines += [
        f"| {what} | {value} | {OPEN if got[name] is None else got[name]} |"
        for name, (what, value) in OTHERS.items()
    ]
    learned = [_first(found), _last(found), _fp8(found), _two(found), _never(found)]
    return "\n".join([*lines, "", *(f"- {text}" for text in learned if text), ""])


def _first(found: Found) -> str:
    m, kept = found["candidates"], kept_up(found["candidates"] or {})
    ms = median(m, PART)
    if m is None or ms is None or not kept:
        return ""
    rows, predicted = profile(m, PART), PREDICTED["candidates"][PART][1]
    slow, first = kept[0][0], max(f for _, f in kept)
    return (
        f"The first prediction of `fused`, {predicted} ms, was {100 * (1 - predicted / ms):.0f} % below the {ms:.0f} measured: it left out the power cap, under which cuDNN's attention "
        f"ran at {attention_rate(m, rows) / 1e12:.0f} TFLOP/s and linears alone keep up {slow:.0f} where a short benchmark shows up to {first:.0f}."
    )


def _last(found: Found) -> str:
    m = found["forward"]
    if m is found["candidates"]:
        return ""
    off = {n: (median(m, n) or 0) / ms - 1 for n, (_, ms) in PREDICTED["forward"].items() if median(m, n)}
    near = [abs(v) for n, v in off.items() if not n.startswith(FAST_8)]
    if not near or max(near) > 0.02:
        return ""
    return (
        f"The last run's {len(near)} forwards without fp8 attention came within {100 * max(near):.1f} % of their predictions, which added up terms measured in "
        "forwards, not alone."
    )


def _fp8(found: Found) -> str:
    m = found["forward"] or {}
    ms, rows, predicted = median(m, FAST_8), profile(m, FAST_WHOLE), PREDICTED["forward"][FAST_8][1]
    kernel = max((row["ms"] for row in rows if "flash" in row["kernel"]), default=0)
    if not (ms and kernel) or m is found["candidates"]:
        return ""
    config, tokens = m["size"]["config"], m["size"]["tokens"]
    work = 4 * config["num_layers"] * tokens**2 * config["dim"] / 1e9
    passes = rounding_ms(rows)
    return (
        f"fp8 attention: {predicted} ms predicted, {ms:.0f} measured. As profiled with absorbed audio self-attention runs at {work / kernel:.0f} TFLOP/s inside a forward instead of 950 "
        f"({kernel - work / 950:.0f} ms more), rounding takes {passes:.0f} ms instead of 50."
    )


def _two(found: Found) -> str:
    m = found["two_gpus"] or {}
    ms, sent = m.get("ms") or {}, m.get("transfer") or {}
    if not {"one GPU", "hybrid", "Ulysses"} <= set(ms) or not sent:
        return ""
    # q, k, v and the result of every block's self-attention
    calls = 4 * m["size"]["config"]["num_layers"]
    half = ms["one GPU"] / 2
    return (
        f"Two GPUs: over half of one GPU's step Ulysses takes {ms['Ulysses'] - half:.0f} ms, of which its {3 * calls} all-to-alls are {3 * calls * sent['ms']:.0f} at "
        f"{sent['ms']} ms each, if nothing hides them; hybrid, where one pass of three is shared, {ms['hybrid'] - half:.0f} with {calls * sent['ms']:.0f} of all-to-alls."
    )


def _never(found: Found) -> str:
    m = found["candidates"]
    rest = [f"{n} ({ms})" for n, (_, ms) in PREDICTED["candidates"].items() if median(m, n) is None]
    return f"Predicted, not run as a whole forward: {', '.join(rest)}." if m and rest else ""
