"""Everything a cell's rules look at, gathered before any of them runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mtbuild.plan.wheels import WheelFacts

if TYPE_CHECKING:
    from mtbuild.plan.cell import Cell
    from mtbuild.plan.wheels import Wheels

__all__ = ["CellFacts", "gather"]


@dataclass(frozen=True, kw_only=True)
class CellFacts:
    """Wheels that the cell's pins name, by canonical project name."""

    wheels: tuple[WheelFacts, ...]

    def wheel(self, name: str) -> WheelFacts | None:
        return next((wheel for wheel in self.wheels if wheel.name == name), None)


def gather(cell: Cell, wheels: Wheels) -> CellFacts:
    """Reads what the index says of every pin of the cell; raises InfrastructureError if it can't be reached."""
    raise NotImplementedError
