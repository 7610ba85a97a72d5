# ruff: noqa: E501  the lines below are those of a generated document
"""Write docs/performance.md from the measurements in docs/evidence/gpu; what is not there yet, it says.

python benchmarks/gpu/report.py            write it
python benchmarks/gpu/report.py --check    exit 1 if it is not what the measurements say
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import report_forward as forward  # noqa: E402
import report_parts as parts  # noqa: E402

ROOT = HERE.parents[1]
EVIDENCE = ROOT / "docs/evidence/gpu"
DOC = ROOT / "docs/performance.md"
NAMES = ("forward", "forward-absorbed", "attention", "vae", "job", "load", "two_gpus")


def read(folder: Path) -> dict[str, dict[str, Any] | None]:
    """Every part's JSON, None for what is not there."""
    files = {name: folder / f"{name}.json" for name in NAMES}
    return {name: json.loads(p.read_text()) if p.exists() else None for name, p in files.items()}


def render(found: dict[str, dict[str, Any] | None]) -> str:
    """The whole document."""
    m = found["forward"]
    if not m or not m.get("variants"):
        return f"# Performance\n\nThe forward is {parts.OPEN}.\n\n" + "\n".join(_rest(found))
    first = m["schema"] == 1  # the first runs: absorption was measured in a second process
    second = found["forward-absorbed"] if first else None
    sections = [forward.head(m), parts.aims(found), forward.variants(m)]
    if second:
        sections.append(forward.absorbed(second, m))
    sections += [forward.where(m), _learned(m, second) if second else "", forward.step(m)]
    sections += [forward.predictions(m, second), parts.others(found), *_rest(found)]
    sections += [forward.small(m), forward.kernels(m), forward.ceilings(m)]
    return "\n".join(s for s in sections if s)


def _rest(found: dict[str, dict[str, Any] | None]) -> list[str]:
    return [
        parts.attention(found["attention"]),
        parts.vae(found["vae"]),
        parts.load(found["load"]),
        parts.job(found["job"]),
        parts.two(found["two_gpus"]),
    ]


def _learned(m: dict[str, Any], second: dict[str, Any]) -> str:
    """What the first runs taught; later ones have what they teach in their tables."""
    name, rows, _ = forward.profiles(m)[0]
    config, tokens = m["size"]["config"], m["size"]["tokens"]
    attention = 4 * config["num_layers"] * tokens**2 * config["dim"]
    rate = forward.attention_rate(m, rows)
    gap = (attention / rate - attention / 680e12) * 1e3
    fused, tuned = forward.median(m, "fused"), forward.median(m, "tuned, cuDNN")
    apart = forward.median(second, "fused") - forward.median(second, "fused, absorbed")
    own = (
        4 * config["num_layers"] * tokens * config["dim"] ** 2 * 2
    )  # the two products that absorption does away with
    return f"""### What was learned

- The profile is of "{name}", not of "fused" ({fused:.0f} ms): its kernels fill its own forward, so there are no launch
  gaps to win back. "fused" takes {apart:.0f} ms more, mostly for the audio's two linears ({own / 2e12:.0f} TFLOP).
- The predictions took attention at 680 TFLOP/s; inside a forward it gives {rate / 1e12:.0f}: {gap:.0f} ms of the difference.
  It is the term that holds the exact tier. Whether that is the card's power limit, the next run says: each row then
  has the SM clock, the power and what held the clock down.
- Fusing the elementwise steps saved {tuned - fused:.0f} ms against the tuned reference (predicted: 800); absorption saves {apart:.0f} ms
  (predicted: 143).
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--evidence", type=Path, default=EVIDENCE, help="folder of the JSON files")
    parser.add_argument("--out", type=Path, default=DOC, help="the document")
    args = parser.parse_args()
    text = render(read(args.evidence))
    if not args.check:
        args.out.write_text(text)
        return 0
    if args.out.read_text() == text:
        return 0
    print(
        f"{args.out.name} is not what {args.evidence.name}/ says; run python benchmarks/gpu/report.py",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
