"""What is installed is what the cell says: Python, torch and its CUDA, triton, xformers.

Read twice, from the packages' metadata and from the modules: a base image's torch that survived under a new
metadata folder is a known failure ("tag says torch A, torch.__version__ says B").
"""

from __future__ import annotations

import platform
from importlib import metadata

from result import CheckResult, Context, failed, passed

ID = "versions"
TIERS = ("cpu", "gpu")
LIMIT_S = 180


def run(ctx: Context) -> CheckResult:
    """Compare with the cell; for a foreign image record only."""
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "xformers", "numpy", "multitalk-runtime"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    facts = {f"versions__{name.replace('-', '_')}": version for name, version in found.items()}
    wrong = []
    if found["torch"] is not None:
        import torch

        found["cuda"] = torch.version.cuda
        facts["versions__cuda"] = torch.version.cuda
        facts["versions__torch_module"] = str(torch.__version__)
        if _public(torch.__version__) != _public(found["torch"]):
            wrong.append(
                f"torch's metadata says {found['torch']}, torch.__version__ says {torch.__version__}"
            )
    if found["triton"] is not None:
        import triton

        if _public(triton.__version__) != _public(found["triton"]):
            wrong.append(
                f"triton's metadata says {found['triton']}, triton.__version__ says {triton.__version__}"
            )
    listing = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    if ctx.cell is None:
        if wrong:
            return _failed(wrong, facts)
        return passed(f"recorded, not compared (no cell): {listing}", **facts)
    want = ctx.cell
    parts = want["python"].count(".") + 1
    if ".".join(found["python"].split(".")[:parts]) != want["python"]:
        wrong.append(f"the cell has Python {want['python']}, the image {found['python']}")
    for name in ("torch", "cuda", "triton", "xformers"):
        have = found.get(name)
        if want[name] is None:
            continue  # a cell without xformers may sit on a base that has it; the image may hold more
        if have is None:
            wrong.append(f"the cell has {name} {want[name]}, the image has none")
        elif _public(have) != _public(want[name]):
            wrong.append(f"the cell has {name} {want[name]}, the image {have}")
    return _failed(wrong, facts) if wrong else passed(listing, **facts)


def _failed(wrong: list, facts: dict) -> CheckResult:
    return failed(
        "; ".join(wrong),
        diagnosis="the image was not built from this cell's lock, or a package of its base survived",
        fix="build from the lock with hashes (uv --require-hashes --no-deps) into an empty environment",
        **facts,
    )


def _public(version: str) -> str:
    """Without the local part: 2.7.1+cu126 → 2.7.1."""
    return str(version).partition("+")[0]
