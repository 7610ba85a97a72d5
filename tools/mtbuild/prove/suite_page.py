"""docs/suite.md: every check of the suite, by the suite's own words.

python -m mtbuild.prove.suite_page > docs/suite.md
"""

from __future__ import annotations

import json
import sys

from mtbuild.proc import run
from mtbuild.prove.report import CPU_CHECKS, EVERY_USER, GPU_CHECKS, RUNTIME_CHECKS, WEIGHTS_CHECKS
from mtbuild.prove.suite_files import SUITE

__all__ = ["page"]

_HEAD = """# What an image is put through

Written by `python -m mtbuild.prove.suite_page > docs/suite.md` from the checks themselves; do not edit.

`mtbuild smoke` runs these checks in an unmodified container of one digest: no network, a read-only root, no
capabilities, limits of memory and processes. Each check is a process of its own, killed at its limit. All
run as uid 65532, those marked *any user* once more as a random uid with gid 0. Those marked *tier gpu* run
on tier `gpu` alone, the others on both; only what the host itself saw (the GPU by NVML, the container's
memory on it) makes a run one of tier `gpu`. A mark *cells with …* or *images with …* says where a check is
required: elsewhere it may be skipped. A required check that is skipped has not passed.
"""


def page() -> str:
    """The page as Markdown. The checks stand in the order in which they run."""
    listed = {
        check["id"]: check
        for check in json.loads(run([sys.executable, SUITE, "--list"], timeout_s=60).output)
    }
    lines = [_HEAD, "| check | limit | what must be true |", "|---|---:|---|"]
    for name in (*CPU_CHECKS, *GPU_CHECKS, *WEIGHTS_CHECKS):
        check = listed[name]
        marks = ", ".join(_marks(name, check["tiers"]))
        text = " ".join(filter(None, (f"**{check['what']}**", check["why"], f"*{marks}*" if marks else "")))
        lines.append(f"| `{name}` | {check['limit_s']:g} s | {text.replace('|', chr(92) + '|')} |")
    return "\n".join([*lines, ""])


def _marks(name: str, tiers: list[str]) -> list[str]:
    """When it is run and asked for, in few words."""
    marks = ["tier gpu"] if tiers == ["gpu"] else []
    marks += ["any user"] if name in EVERY_USER else []
    marks += ["cells with xFormers"] if name.startswith("xformers.") else []
    marks += ["images with the runtime"] if name in RUNTIME_CHECKS else []
    marks += ["with `--weights DIR`"] if name in WEIGHTS_CHECKS else []
    return marks


if __name__ == "__main__":
    sys.stdout.write(page())
