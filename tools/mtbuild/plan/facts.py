"""Everything a cell's rules look at, gathered before any of them runs; kilobytes a wheel."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from packaging.version import Version

from mtbuild.errors import InputError
from mtbuild.plan.floors import numpy_window
from mtbuild.plan.pairs import odds
from mtbuild.plan.requires import admits, conflicts, target_of, wishes
from mtbuild.plan.select import Choice, Missing, choose, usable
from mtbuild.plan.wheels import WheelFacts

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mtbuild.plan.cell import Cell
    from mtbuild.plan.index import Link
    from mtbuild.plan.tags import Target
    from mtbuild.plan.wheels import Wheels

__all__ = ["CellFacts", "gather", "gather_all"]

_AT_ONCE = 16
_TORCHS_OWN = {"torch", "triton"}
# Their packages say nothing that a rule asks for, and their index pages are megabytes.
_NOT_ASKED = ("nvidia-", "cuda-")
_FIRST_WITHOUT_OLD_NUMPY = Version("3.13")


@dataclass(frozen=True, kw_only=True)
class CellFacts:
    """Facts of one cell: `wheels` of its pins, pins with no usable file, and what else decides or helps."""

    wheels: tuple[WheelFacts, ...]
    missing: tuple[Missing, ...] = ()
    dependencies: tuple[WheelFacts, ...] = ()  # direct ones of torch's extensions, for placeholders
    alternatives: tuple[WheelFacts, ...] = field(
        default=()
    )  # other releases of extensions at odds with this torch, which admit it; newest first

    def wheel(self, name: str) -> WheelFacts | None:
        """Of a pin, by canonical name."""
        return next((wheel for wheel in self.wheels if wheel.name == name), None)

    @property
    def download_size(self) -> int:
        """Bytes of the pinned wheels (their dependencies are the lock's business)."""
        return sum(wheel.size for wheel in self.wheels)


def gather(cell: Cell, wheels: Wheels) -> CellFacts:
    """Reads what the index says of every pin of the cell.

    Raises InputError for a project or version that no index has, InfrastructureError if none can be reached.
    """
    return gather_all([cell], wheels)[cell.name]


def gather_all(cells: Sequence[Cell], wheels: Wheels) -> dict[str, CellFacts]:
    """The same for many cells at once, by cell name; each wheel is read once, many at a time."""
    if not cells:
        return {}
    # Two pools: a cell waits for its wheels, so they must not queue behind cells.
    with ThreadPoolExecutor(_AT_ONCE) as cell_pool, ThreadPoolExecutor(_AT_ONCE) as wheel_pool:
        gathered = cell_pool.map(lambda cell: _gather(cell, wheels, wheel_pool), cells)
        return {cell.name: facts for cell, facts in zip(cells, gathered, strict=True)}


def _gather(cell: Cell, wheels: Wheels, pool: ThreadPoolExecutor) -> CellFacts:
    target = target_of(cell)
    pins = _pins(cell)
    chosen: list[Link] = []
    missing: list[Missing] = []
    for name, choice in zip(
        pins, pool.map(lambda name: choose(wheels.index, name, pins[name], target), pins), strict=True
    ):
        if choice.link is not None:
            chosen.append(choice.link)
            continue
        assert choice.missing is not None
        if choice.missing.why in {"project", "version"}:
            raise _unknown(cell, name, choice, target)
        missing.append(choice.missing)
    found = tuple(pool.map(wheels.of, chosen))
    return CellFacts(
        wheels=found,
        missing=tuple(missing),
        dependencies=_dependencies(found, pins, target, wheels, pool),
        alternatives=_alternatives(cell, found, target, wheels, pool),
    )


def _pins(cell: Cell) -> dict[str, str]:
    pins = cell.pins
    # MultiTalk needs numpy below 2, which has no wheel for newer Pythons. Older ones have it, so the 2 MB of
    # its index page are not worth asking for.
    if Version(cell.python) >= _FIRST_WITHOUT_OLD_NUMPY:
        pins.setdefault("numpy", numpy_window(cell.torch)[0])
    return pins


def _unknown(cell: Cell, name: str, choice: Choice, target: Target) -> InputError:
    """What `choice` says, with the place in the matrix."""
    try:
        choice.or_raise(target)
    except InputError as error:
        return InputError(error.message, fix=error.fix, where=cell.at(name))
    raise AssertionError  # only asked where there is no file


def _dependencies(
    found: Iterable[WheelFacts],
    pins: dict[str, str],
    target: Target,
    wheels: Wheels,
    pool: ThreadPoolExecutor,
) -> tuple[WheelFacts, ...]:
    """What torch's extensions ask for beside the pins: a mere placeholder there breaks them."""
    asked = {
        wish.name: wish.specifier
        for wheel in found
        if wheel.name not in _TORCHS_OWN
        for wish in wishes(wheel.requires_dist, target)
        if wish.applies
        and wish.name not in pins
        and wish.name != "numpy"
        and not wish.name.startswith(_NOT_ASKED)
    }
    choices = pool.map(lambda name: choose(wheels.index, name, asked[name], target), asked)
    return tuple(pool.map(wheels.of, [choice.link for choice in choices if choice.link is not None]))


def _alternatives(
    cell: Cell, found: Sequence[WheelFacts], target: Target, wheels: Wheels, pool: ThreadPoolExecutor
) -> tuple[WheelFacts, ...]:
    """Where an extension is at odds with this torch: its other releases, which admit what the cell has."""
    torch = next((wheel for wheel in found if wheel.name == "torch"), None)
    versions = {"torch": cell.torch}

    def at_odds(extension: WheelFacts) -> bool:
        if extension.name == "xformers" and (torch is None or conflicts([extension], versions, target)):
            return True
        return torch is not None and extension.name not in _TORCHS_OWN and bool(odds(torch, extension))

    return tuple(
        other
        for extension in found
        if at_odds(extension)
        for other in asking_for(wheels, extension.name, versions, target, pool)
    )


def asking_for(
    wheels: Wheels, project: str, versions: dict[str, str], target: Target, pool: ThreadPoolExecutor
) -> tuple[WheelFacts, ...]:
    """Releases whose metadata admits these versions, newest first; only those are read in full."""
    links = [link for _, link in usable(wheels.index.versions(project), target)]

    def fits(link: Link) -> bool:
        lines = wishes(wheels.metadata(link).requires_dist, target)
        return all(admits(w, versions[w.name]) for w in lines if w.applies and w.name in versions)

    admitted = [link for link, good in zip(links, pool.map(fits, links), strict=True) if good]
    return tuple(pool.map(wheels.of, admitted))
