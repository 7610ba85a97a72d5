"""Write docs/performance.md from the measurements in docs/evidence/gpu; what is not there yet, it says.

python benchmarks/gpu/report.py            write it
python benchmarks/gpu/report.py --check    exit 1 if it is not what the measurements say
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]

import report_aims as aims  # noqa: E402
import report_forward as forward  # noqa: E402
import report_parts as parts  # noqa: E402
from report_base import OPEN, Found, read_notes  # noqa: E402
from report_candidates import candidates  # noqa: E402

EVIDENCE = ROOT / "docs/evidence/gpu"
DOC = ROOT / "docs/performance.md"
NAMES = ("forward", "candidates", "attention", "vae", "job", "load", "two_gpus")


def read(folder: Path) -> Found:
    """Every part's JSON, None for what is not there."""
    files = {name: folder / f"{name}.json" for name in NAMES}
    return {name: json.loads(p.read_text()) if p.exists() else None for name, p in files.items()}


def render(found: Found, notes: dict[str, str]) -> str:
    """The whole document; of the forward the candidates' run until there is one of its own."""
    run = "forward" if found["forward"] else "candidates"
    m = found["forward"] = found[run]
    rest = [
        parts.attention(found["attention"]),
        parts.vae(found["vae"], notes.get("vae", "")),
        parts.load(found["load"], notes.get("load", "")),
        parts.job(found["job"], notes.get("job", "")),
        parts.two(found["two_gpus"]),
    ]
    if not m or not m.get("variants"):
        return f"# Performance\n\nThe forward is {OPEN}.\n\n" + "\n".join(rest)
    sections = [forward.head(m, run), aims.aims(found), forward.variants(found, notes)]
    sections += [forward.where(m), forward.step(m), aims.predictions(found), candidates(found["candidates"])]
    sections += [*rest, forward.small(m), forward.kernels(m), forward.ceilings(m)]
    return "\n".join(s for s in sections if s)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--evidence", type=Path, default=EVIDENCE, help="folder of the JSON files")
    parser.add_argument("--out", type=Path, default=DOC, help="the document")
    args = parser.parse_args()
    text = render(read(args.evidence), read_notes(args.evidence))
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
