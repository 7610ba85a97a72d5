"""What is installed is what the cell says: Python, torch and its CUDA, triton, xformers, further pins.

Read twice, from the packages' metadata and from the modules: a base image's torch that survived under a new
metadata folder is a known failure ("tag says torch A, torch.__version__ says B"). A further pin must also
import: whoever pins flash-attn 3 wants it, and the model would take cuDNN without a word if it did not load.
"""

from __future__ import annotations

import platform
from importlib import import_module, metadata

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
    for name, version in want.get("packages", {}).items():
        have, broken = _pinned(name)
        facts[f"versions__{name.replace('-', '_')}"] = have
        if have is None or _public(have) != _public(version):
            wrong.append(f"the cell has {name} {version}, the image {have or 'none'}")
        elif broken:
            wrong.append(f"{name} {have} is installed and does not import: {broken}")
        else:
            listing += f", {name} {have}"
    return _failed(wrong, facts) if wrong else passed(listing, **facts)


def _pinned(name: str) -> tuple:
    """(its version or None, why one of its modules does not import or None)."""
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None, None
    for module in _modules(found):
        try:
            import_module(module)
        except Exception as error:  # a library for another CUDA or torch raises what it likes
            return found.version, f"{module}: {type(error).__name__}: {error}"[:300]
    return found.version, None


def _modules(found: metadata.Distribution) -> list:
    """The modules and packages at its top that hold Python code: only they can be imported by name."""
    tops = set()
    for file in found.files or ():
        first, last = file.parts[0], file.parts[-1]
        if first.endswith(".py") and len(file.parts) == 1:
            tops.add(first[:-3])
        elif last == "__init__.py" and len(file.parts) == 2:
            tops.add(first)
    return sorted(top for top in tops if top.isidentifier())


def _failed(wrong: list, facts: dict) -> CheckResult:
    return failed(
        "; ".join(wrong),
        diagnosis="the image was not built from this cell's lock, a package of its base survived, or a pin "
        "is built for another torch or CUDA",
        fix="build from the lock with hashes (uv --require-hashes --no-deps) into an empty environment; pin "
        "a release that fits the cell's torch and CUDA",
        **facts,
    )


def _public(version: str) -> str:
    """Without the local part: 2.7.1+cu126 → 2.7.1."""
    return str(version).partition("+")[0]
