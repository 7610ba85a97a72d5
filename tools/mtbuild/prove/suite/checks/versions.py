"""What is installed is what the cell says: Python, torch and its CUDA, triton, xformers, further pins.

Read twice, from the packages' metadata and from the modules: a base image's torch that survived under a new
metadata folder is a known failure ("tag says torch A, torch.__version__ says B"). A further pin must be
that release and import: what is pinned is wanted, and the model would do without it in silence.
"""

from __future__ import annotations

import platform
from importlib import import_module, metadata

from pins import look, same_release
from result import CheckResult, Context, failed, passed

ID = "versions"
TIERS = ("cpu", "gpu")
LIMIT_S = 300  # pins import in processes of their own, a minute each at most


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
    torch = _imported("torch", found, wrong)
    if torch is not None:
        found["cuda"] = torch.version.cuda
        facts["versions__cuda"] = torch.version.cuda
        facts["versions__torch_module"] = str(torch.__version__)
        if not same_release(torch.__version__, found["torch"]):
            wrong.append(
                f"torch's metadata says {found['torch']}, torch.__version__ says {torch.__version__}"
            )
    triton = _imported("triton", found, wrong)
    if triton is not None and not same_release(triton.__version__, found["triton"]):
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
        if want[name] is None or (name == "cuda" and found["torch"] and torch is None):
            continue  # a cell without xformers may sit on a base that has it; torch says which CUDA
        if have is None:
            wrong.append(f"the cell has {name} {want[name]}, the image has none")
        elif not same_release(have, want[name]):
            wrong.append(f"the cell has {name} {want[name]}, the image {have}")
    for name, version in want.get("packages", {}).items():
        pin = look(name, version, tier=ctx.tier)
        facts[f"versions__{name.replace('-', '_')}"] = pin.version
        if pin.wrong:
            wrong.append(pin.wrong)
        listing += f", {name} {pin.version}" + (f" ({pin.note})" if pin.note else "")
    return _failed(wrong, facts) if wrong else passed(listing, **facts)


def _imported(name: str, found: dict, wrong: list):
    """The module, if it is installed; what is wrong where it then does not import (as Triton before 3.3
    without setuptools)."""
    if found[name] is None:
        return None
    try:
        return import_module(name)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        wrong.append(f"{name} {found[name]} is installed and does not import: {said}"[:400])
        return None


def _failed(wrong: list, facts: dict) -> CheckResult:
    return failed(
        "; ".join(wrong),
        diagnosis="the image was not built from this cell's lock, a package of its base survived, or a pin "
        "is built for another torch or CUDA",
        fix="build from the lock with hashes (uv --require-hashes --no-deps) into an empty environment; pin "
        "a release that fits the cell's torch and CUDA",
        **facts,
    )
