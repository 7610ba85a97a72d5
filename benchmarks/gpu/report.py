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
from report_candidates import candidates  # noqa: E402

ROOT = HERE.parents[1]
EVIDENCE = ROOT / "docs/evidence/gpu"
DOC = ROOT / "docs/performance.md"
NAMES = ("forward", "candidates", "attention", "vae", "job", "load", "two_gpus")


def read(folder: Path) -> dict[str, dict[str, Any] | None]:
    """Every part's JSON, None for what is not there; `notes` are what people have to say of them."""
    files = {name: folder / f"{name}.json" for name in (*NAMES, "notes")}
    return {name: json.loads(p.read_text()) if p.exists() else None for name, p in files.items()}


def render(found: dict[str, dict[str, Any] | None]) -> str:
    """The whole document; of the forward the candidates' run until there is one of its own."""
    m = found["forward"] = found["forward"] or found["candidates"]
    notes = found["notes"] or {}
    if not m or not m.get("variants"):
        return f"# Performance\n\nThe forward is {parts.OPEN}.\n\n" + "\n".join(_rest(found))
    run = "candidates" if m is found["candidates"] else "forward"
    sections = [forward.head(m, run), parts.aims(found)]
    sections += [line for name in ("forward", "exact", "fast") for line in parts.note(notes, name)]
    sections += [
        forward.variants(m, parts.plain(found)),
        forward.where(m),
        forward.step(m),
        candidates(found["candidates"]),
    ]
    sections += [forward.predictions(found), parts.others(found), *_rest(found)]
    sections += [forward.small(m), forward.kernels(m), forward.ceilings(m)]
    return "\n".join(s for s in sections if s)


def _rest(found: dict[str, dict[str, Any] | None]) -> list[str]:
    notes = found["notes"] or {}
    return [
        parts.attention(found["attention"]),
        parts.vae(found["vae"]),
        parts.load(found["load"]),
        *parts.note(notes, "load"),
        parts.job(found["job"]),
        *parts.note(notes, "job"),
        parts.two(found["two_gpus"]),
    ]


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
