"""Self-attention alone, at the model's size, by every way there is: correct first, then sustained, with
clocks.

    python benchmarks/gpu/attention.py --out attention.json
    python benchmarks/gpu/attention.py --out attention.json --only cuDNN 'cuDNN plans'

Each row runs two seconds before it is timed, so that it shows what the card keeps up at its power limit;
`first_ms` is what a short benchmark would have said. Optional packages that are absent are named with the
reason.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import torch  # noqa: E402
from candidates import LOSSY, CudnnPlans, candidates, flash_3  # noqa: E402
from setting import error, scale  # noqa: E402
from sheet import Sheet, device_of, parser, say  # noqa: E402
from torch import Tensor  # noqa: E402
from watch import sustained  # noqa: E402

from wan.attention_backends import AttentionBackend  # noqa: E402

Tensors = tuple[Tensor, Tensor, Tensor]
TOLERANCE = 1.10  # of cuDNN's error against fp32


class Layouts:
    """q, k, v [1, L, N, D] of one set of numbers in the layouts that matter."""

    def __init__(self, length: int, heads: int, dim: int, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(3)
        dtype = torch.bfloat16
        self.shape = (1, length, heads, dim)
        self.joined = torch.randn(1, length, 3 * heads * dim, generator=generator, device=device, dtype=dtype)

    def get(self, name: str) -> Tensors:
        q, k, v = (t.unflatten(-1, self.shape[2:]) for t in self.joined.chunk(3, dim=-1))
        if name == "as in the model":  # q and k written by the norm's kernel, v a part of the joined product
            return q.contiguous(), k.contiguous(), v
        if name == "tokens first":
            return q.contiguous(), k.contiguous(), v.contiguous()
        return tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))  # heads first


def check(attend: Callable[..., Tensor], tensors: Tensors, rows: int = 512) -> float:
    """Error of the first and last rows against fp32 softmax of the same bf16 numbers."""
    q, k, v = tensors
    got = attend(q, k, v)
    worst = 0.0
    for part in (slice(0, rows), slice(q.shape[1] - rows, q.shape[1])):
        for head in (0, q.shape[2] - 1):
            a, b, c = (t[0, s, head].float() for t, s in ((q, part), (k, slice(None)), (v, slice(None))))
            want = ((a @ b.T) * q.shape[-1] ** -0.5).softmax(-1) @ c
            worst = max(worst, error(got[0, part, head], want))
    return worst


def row(
    name: str, layout: str, attend: Callable[..., Tensor], tensors: Tensors, device: torch.device, base: float
) -> dict[str, Any]:
    q = tensors[0]
    out: dict[str, Any] = {"attention": name, "layout": layout, "length": q.shape[1]}
    try:
        out["error"] = check(attend, tensors, min(512, q.shape[1] // 2))
        out["lossy"] = name in LOSSY
        out["ok"] = out["lossy"] or base == 0 or out["error"] <= TOLERANCE * base
        out |= sustained(lambda: attend(*tensors), device)
    except Exception as problem:  # noqa: BLE001  (one that can't run is a result, too)
        return out | {"failed": f"{type(problem).__name__}: {problem}"[:200]}
    work = 4 * q.shape[1] ** 2 * q.shape[2] * q.shape[3] / 1e9
    out |= {"tflops": round(work / out["ms"], 1), "first_tflops": round(work / out["first_ms"], 1)}
    say(f"{name:24s} {layout:18s} L {q.shape[1]}: {out}")
    return out


def lengths(size_tokens: int) -> dict[str, int]:
    """The model's length, and the multiples of 128 and 256 around it: what a ragged last tile costs."""
    return {f"{n}": n for n in (size_tokens // 256 * 256, -(-size_tokens // 256) * 256)}


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--only", nargs="*", help="ways to measure (default: all)")
    args = options.parse_args()
    device = device_of(args, options)
    size = scale(tiny=args.tiny, repeats=1)
    heads, tokens = size.config["num_heads"], size.tokens if not args.tiny else 640
    dim = size.config["dim"] // heads
    sheet = Sheet(args.out, "attention.py", device, args.budget_s)
    found, absent = candidates(device)
    chosen = {n: f for n, f in found.items() if not args.only or n in args.only}
    sheet.data |= {"absent": absent, "size": {"tokens": tokens, "heads": heads, "dim": dim}, "rows": []}
    say(f"absent: {absent}")
    rows: list[dict[str, Any]] = sheet["rows"]

    def add(name: str, layout: str, attend: Any, tensors: Tensors) -> None:
        if sheet.left < 8:
            sheet.data.setdefault("left_out", []).append(f"{name}, {layout}")
            return
        base = next((r["error"] for r in rows if r["attention"] == "cuDNN" and "error" in r), 0.0)
        rows.append(row(name, layout, attend, tensors, device, base))
        if isinstance(attend, CudnnPlans):
            rows[-1] |= {"version": attend.version, "plans": attend.plans[:24]}
            attend.plans = []
        sheet.save()

    with torch.inference_mode():
        data = Layouts(tokens, heads, dim, device)
        for name, attend in chosen.items():
            add(name, "as in the model", attend, data.get("as in the model"))
        main_one = next(iter(chosen))
        for layout in ("tokens first", "heads first"):
            for name in (main_one, "cuDNN plans"):
                if name in chosen:
                    add(name, layout, chosen[name], data.get(layout))
        for length in lengths(tokens).values():
            other = Layouts(length, heads, dim, device)
            add(main_one, "as in the model", chosen[main_one], other.get("as in the model"))
        if device.type == "cuda" and not args.only:
            short(sheet, data, device)
    print_table(sheet.data)
    return 0


def short(sheet: Sheet, data: Layouts, device: torch.device) -> None:
    """Cross-attention to the text (padded) and the image by the backends, alone."""
    q = data.get("tokens first")[0]
    found: dict[str, Any] = {}
    ways: dict[str, Callable[..., Tensor]] = {n: AttentionBackend(name=n) for n in ("cudnn", "flash")}
    try:
        ways["flash-attn 3"] = flash_3()
    except Exception as problem:  # noqa: BLE001  (as of the candidates)
        found["flash-attn 3 absent"] = f"{type(problem).__name__}: {problem}"[:200]
    for keys in (512, 257, 102):
        k, v = (torch.randn(1, keys, *q.shape[2:], device=device, dtype=q.dtype) for _ in range(2))
        for name, attend in ways.items():
            try:
                ran = sustained(lambda: attend(q, k, v), device, warm_s=0.2, run_s=0.2)  # noqa: B023
                found[f"{keys} keys, {name}"] = ran["ms"]
            except Exception as problem:  # noqa: BLE001  (one that can't run is a result, too)
                found[f"{keys} keys, {name}, failed"] = f"{type(problem).__name__}: {problem}"[:200]
    try:
        from cross import cross

        kv = tuple(
            torch.randn(1, n, *q.shape[2:], device=device, dtype=q.dtype) for n in (102, 102, 257, 257)
        )
        found["102 + 257 keys, one kernel"] = sustained(
            lambda: cross(q, kv, 411), device, warm_s=0.2, run_s=0.2
        )["ms"]
    except Exception as problem:  # noqa: BLE001
        found["one kernel failed"] = f"{type(problem).__name__}: {problem}"[:200]
    sheet["cross_ms"] = found


def print_table(result: dict[str, Any]) -> None:
    for r in result["rows"]:
        rest = {k: v for k, v in r.items() if k in ("sm_mhz", "watts", "held_by", "failed", "error")}
        print(
            f"{r['attention']:24s} {r['layout']:16s} L {r['length']:6d} {r.get('ms', 0):8.2f} ms "
            f"{r.get('tflops', 0):6.1f} TFLOP/s, first {r.get('first_tflops', 0):6.1f}  {rest}"
        )
        for plan in r.get("plans", [])[:6]:
            print("    ", plan)
    print(result.get("cross_ms"), result["absent"])


if __name__ == "__main__":
    raise SystemExit(main())
