"""Rules 7 to 10: drivers, windows in sources, placeholders, and what the image itself lacks. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from packaging.version import Version

from mtbuild.plan.cell import Finding
from mtbuild.plan.floors import compiler_need, driver_floor, driver_reaches, toolkit_driver
from mtbuild.plan.requires import target_of, wishes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mtbuild.plan.cell import Cell
    from mtbuild.plan.facts import CellFacts
    from mtbuild.plan.wheels import WheelFacts

__all__ = ["compiler", "drivers", "flash_window", "placeholders"]


def drivers(cell: Cell, facts: CellFacts) -> Iterator[Finding]:
    """7: each GPU host's driver carries torch's CUDA, its extensions' and Triton's ptxas."""
    torch = facts.wheel("torch")
    cuda = torch.cuda if torch is not None and torch.cuda else cell.cuda
    for gpu in cell.smoke_on:
        floor = driver_floor(cuda=cuda, triton=cell.triton, sm=gpu.sm)
        if floor is not None and not driver_reaches(gpu.driver, floor[0]):
            yield Finding(
                rule="driver",
                severity="refused",
                message=f"{gpu.name} has driver {gpu.driver}, "
                f"but CUDA {cuda} with triton {cell.triton} needs {floor[0]} or newer",
                source=floor[1],
                fix=f"update that host's driver to {floor[0]} or newer, or take a cell of CUDA "
                f"{Version(cuda).major - 1}",
            )
            continue
        own = toolkit_driver(cuda)
        if own is not None and not driver_reaches(gpu.driver, own[0]):
            yield Finding(
                rule="driver",
                severity="note",
                message=f"{gpu.name}'s driver {gpu.driver} is older than CUDA {cuda}'s own ({own[0]}): "
                "machine code runs by minor-version compatibility, newer features don't",
                source=own[1],
                fix=f"nothing has to be done; driver {own[0]} or newer ends the limits",
            )


def flash_window(cell: Cell, facts: CellFacts) -> Iterator[Finding]:
    """8: xFormers accepts only some flash-attn versions, and says so only in its source."""
    xformers = facts.wheel("xformers")
    pinned = cell.pins.get("flash-attn")
    window = xformers.flash_window if xformers is not None else None
    if xformers is None or window is None or pinned is None or not pinned[:1].isdigit():
        return
    version = Version(".".join(str(part) for part in Version(pinned).release[:3]))
    if Version(window.first) <= version <= Version(window.last):
        return
    after = "falls back to PyTorch's own FlashAttention" if window.guarded else "fails at import"
    span = f">={window.first},<={window.last}" if window.first != window.last else f"=={window.first}"
    yield Finding(
        rule="flash-attn-window",
        severity="note" if window.guarded else "refused",
        message=f"xformers {xformers.version} accepts flash-attn {span}; with {pinned} it {after}",
        source=f"{xformers.filename}: xformers/ops/fmha/flash.py: {window.text}",
        fix=f"pin flash-attn {span}, or leave it out (the model here does not need it)",
    )


def placeholders(cell: Cell, facts: CellFacts) -> Iterator[Finding]:
    """9: a project whose release holds nothing: its name is taken, its code is elsewhere."""
    for wheel in (*facts.wheels, *facts.dependencies):
        # An empty wheel with requirements is a meta-package and does its work, unless it is a mere 0.0.0.
        if not wheel.empty or (wheel.requires_dist and any(Version(wheel.version).release)):
            continue
        by = next((other for other in facts.wheels if _asks_for(other, wheel.name, cell)), None)
        why = f"{by.name} {by.version} requires {wheel.name}" if by else "this cell pins it"
        instead = f"take a {by.name} that does not need it" if by else f"leave {wheel.name} out"
        yield Finding(
            rule="placeholder",
            severity="refused",
            message=f"{wheel.name} {wheel.version} is an empty placeholder, and {why}: "
            "what needs it is unavailable",
            source=f"{wheel.filename}: {wheel.size} bytes, nothing in RECORD beside its metadata",
            fix=f"{instead}, or configure an index that serves a real {wheel.name}",
        )


def _asks_for(wheel: WheelFacts, name: str, cell: Cell) -> bool:
    return any(wish.applies and wish.name == name for wish in wishes(wheel.requires_dist, target_of(cell)))


def compiler(cell: Cell, facts: CellFacts) -> Iterator[Finding]:
    """10: Triton compiles C at run time, so the image needs a compiler."""
    need = compiler_need(cell.triton)
    if cell.compiler or need is None:
        return
    message, source = need
    yield Finding(
        rule="compiler",
        severity="refused",
        message=f"the image has no C compiler, and triton {cell.triton} needs one at run time: {message}",
        source=source,
        fix="compiler: true (gcc, Python and libc headers, CC)",
    )
