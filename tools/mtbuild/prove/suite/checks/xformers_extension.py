"""xFormers' native code is really loaded, and was built for the torch that runs.

xFormers only warns when it can't load (exit status 0, V72's second failure), and compares no versions: one
built for another patch level loads in silence. So three things are asked: did `_C.so` load, for which torch
was it built (cpp_lib.json), and which attention operators are there.
"""

from __future__ import annotations

import json
import logging
import re
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from result import CheckResult, Context, failed, passed, skipped

ID = "xformers.extension"
TIERS = ("cpu", "gpu")
LIMIT_S = 240


def run(ctx: Context) -> CheckResult:
    """Load it and look at what it says of itself."""
    wanted = ctx.cell is not None and ctx.cell["xformers"] is not None
    spec = find_spec("xformers")
    if spec is None or spec.origin is None:
        if not wanted:
            return skipped("the image has no xformers" if ctx.cell is None else "the cell has no xformers")
        return failed(
            f"the cell has xformers {ctx.cell['xformers']}, the image has none",
            diagnosis="the image was not built from the cell's lock",
            fix="build it from the lock",
        )
    import torch

    built = _built_for(Path(spec.origin).parent)
    warnings = _Lines()
    logging.getLogger("xformers").addHandler(warnings)
    have = str(torch.__version__)
    facts = {"xformers__built_for_torch": built.get("torch"), "xformers__built_for_cuda": built.get("cuda")}
    try:
        import xformers
        from xformers import _cpp_lib
    except Exception as error:
        return _import_failed("xformers", error, built, have, facts)
    loaded = bool(getattr(xformers, "_has_cpp_library", False))
    facts["xformers__extension_loaded"] = loaded
    cause = _causes(getattr(_cpp_lib, "_cpp_library_load_exception", None))
    try:
        operators = _operators()
    except Exception as error:  # a bundled flash_attn_3/_C.so is loaded unguarded
        return _import_failed("xformers.ops", error, built, have, facts)
    facts["xformers__operators"] = operators
    detail = "\n".join([*warnings.lines, *cause])
    if not loaded:
        degraded = _runs_without_extension() and any(name.endswith("-pt") for name in operators)
        usable = (
            f"PyTorch's own operators still serve attention ({', '.join(operators)}); sparse kernels do not"
            if degraded
            # its dispatcher's exception, named as users will meet it (docs/evidence/t211)
            else "no attention operator of it can be used on a GPU: the first call raises NotImplementedError"
        )
        return failed(
            f"xFormers can't load its C++/CUDA extensions: built for PyTorch {built.get('torch')} with CUDA "
            f"{built.get('cuda')}, this image has {have}",
            detail=detail,
            diagnosis=f"{_reason(cause)}; {usable}",
            fix=_fix(have),
            status="degraded" if degraded else "failed",
            **facts,
        )
    if _public(built.get("torch")) != _public(have) and _pins_torch_exactly():
        return failed(
            f"xFormers loads, but was built for PyTorch {built.get('torch')}; this image has {have}",
            detail=detail,
            diagnosis="xFormers compares no versions; this build is bound to one torch "
            "release and may misread memory",
            fix=_fix(have),
            **facts,
        )
    metadata_of = getattr(_cpp_lib, "_build_metadata", None)
    if metadata_of is None or metadata_of.torch_version != built.get("torch"):
        return failed(
            "xFormers' build metadata is not that of its cpp_lib.json",
            detail=detail,
            diagnosis="files of two xformers releases lie in one folder",
            fix="install xformers into an empty environment",
            **facts,
        )
    if not operators:
        return failed(
            "xFormers' extension is loaded, but no memory-efficient attention operator is available",
            detail=detail,
            diagnosis="this release moved its kernels out (mslk), or PyTorch's schemas are "
            "not those it expects",
            fix=_fix(have),
            **facts,
        )
    return passed(
        f"active: built for PyTorch {built.get('torch')}, CUDA {built.get('cuda')}; "
        f"operators {', '.join(operators)}",
        **facts,
    )


class _Lines(logging.Handler):
    """Keeps what xFormers warns of, which is otherwise only printed."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _built_for(folder: Path) -> dict:
    """torch, cuda and python of the build, from the file that the wheel carries."""
    try:
        return json.loads((folder / "cpp_lib.json").read_text())["version"]
    except (OSError, ValueError, KeyError):
        return {}


def _operators() -> list:
    """Names of the forward attention operators that say they are available."""
    from xformers.ops import fmha

    groups = getattr(fmha, "ALL_FW_OPS", None)
    if groups is None:
        from xformers.ops.fmha import FW_OPS as groups  # noqa: N811
    return [operator.NAME for operator in groups if operator.is_available()]


def _runs_without_extension() -> bool:
    """Whether PyTorch-backed operators run on CUDA although `_C.so` did not load.

    0.0.35 lists them as available, yet refuses every CUDA input then: "xFormers wasn't build with CUDA
    support" (seen on an H200, docs/evidence/t211). This flag is what its dispatcher asks.
    """
    from xformers.ops.fmha import common

    return bool(getattr(common, "_built_with_cuda", True))


def _causes(error: BaseException | None) -> list:
    lines = []
    while error is not None:
        lines.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or error.__context__
    return lines


def _reason(causes: list) -> str:
    """The linker's own words, which stand deepest in the chain."""
    for line in reversed(causes):
        found = re.search(r"(undefined symbol: \S+|lib\S+: cannot open shared object file)", line)
        if found:
            return f"the dynamic linker says: {found.group(1)}"
    return causes[-1].splitlines()[0] if causes else "xFormers gives no reason"


def _import_failed(module: str, error: Exception, built: dict, have: str, facts: dict) -> CheckResult:
    causes = _causes(error)
    return failed(
        f"import {module} fails: {causes[0].splitlines()[0]}",
        detail="\n".join(causes),
        diagnosis=f"{_reason(causes)}; xformers was built for PyTorch {built.get('torch')}, "
        f"this image has {have}",
        fix=_fix(have),
        **facts,
    )


def _pins_torch_exactly() -> bool:
    """Whether its metadata binds it to one torch; builds on torch's stable ABI ask for a range."""
    needs = metadata.requires("xformers") or []
    return any(re.match(r"torch\s*\(?==", need) for need in needs)


def _fix(torch_version: str) -> str:
    return f"take the xformers built for it: `mtbuild suggest --torch {_public(torch_version)}`"


def _public(version: object) -> str:
    return str(version).partition("+")[0]
