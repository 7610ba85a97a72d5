"""The plan: each cell with what the rules say of it, for people, for programs and for GitHub's matrix."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mtbuild.plan.compat import is_buildable, judge, state_of
from mtbuild.plan.facts import gather_all

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mtbuild.plan.cell import Cell, Finding, State
    from mtbuild.plan.matrix import Matrix
    from mtbuild.plan.wheels import Wheels

__all__ = ["Planned", "github_json", "plan", "plan_json"]


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A cell and the findings of all rules, worst first within the order of the checks."""

    cell: Cell
    findings: tuple[Finding, ...]

    @property
    def state(self) -> State:
        return state_of(self.cell, self.findings)

    @property
    def buildable(self) -> bool:
        """Planned, or degraded where the cell allows it."""
        return is_buildable(self.cell, self.findings)

    @property
    def as_expected(self) -> bool:
        """Whether the plan alone says nothing against the cell's `expect`: a refusal can still come from the
        suite, so a cell that expects one may well be buildable."""
        return self.buildable or self.cell.expect == "refused"

    @property
    def reason(self) -> str:
        """The decisive findings in one line, empty if there are none."""
        worst = [finding.message for finding in self.findings if finding.severity == self.state]
        return "; ".join(worst)


def plan(cells: Sequence[Cell], wheels: Wheels) -> tuple[Planned, ...]:
    """Gather the facts of all cells and judge each. Raises InfrastructureError if the index is away."""
    facts = gather_all(cells, wheels)
    return tuple(Planned(cell=cell, findings=judge(cell, facts[cell.name])) for cell in cells)


def plan_json(planned: Sequence[Planned], matrix: Matrix) -> dict[str, Any]:
    """`mtbuild matrix --plan --json`, schema 1."""
    return {
        "schema": 1,
        "cells": [
            {
                "id": item.cell.id,
                "name": item.cell.name,
                "versions": {
                    "python": item.cell.python,
                    "torch": item.cell.torch,
                    "cuda": item.cell.cuda,
                    "triton": item.cell.triton,
                    "xformers": item.cell.xformers,
                    **dict(item.cell.packages),
                },
                "state": item.state,
                "buildable": item.buildable,
                "expect": item.cell.expect,
                "findings": [
                    {
                        "rule": finding.rule,
                        "severity": finding.severity,
                        "message": finding.message,
                        "source": finding.source,
                        "fix": finding.fix,
                    }
                    for finding in item.findings
                ],
            }
            for item in planned
        ],
        "excluded": [
            {"id": out.cell.id, "name": out.cell.name, "reason": out.reason, "link": out.link}
            for out in matrix.excluded
        ],
    }


def github_json(planned: Sequence[Planned]) -> dict[str, Any]:
    """Two dynamic job matrices, for `fromJSON`: what to build, and what to smoke on which GPU runner."""
    build = [item.cell for item in planned if item.buildable and item.cell.expect == "published"]
    return {
        "cells": {"include": [{"cell": cell.name, "id": cell.id} for cell in build]},
        "smoke": {
            "include": [
                {
                    "cell": cell.name,
                    "id": cell.id,
                    "gpu": gpu.name,
                    "sm": gpu.sm,
                    "driver": gpu.driver,
                    "runner": _runner(cell.platform, gpu.name, gpu.driver),
                }
                for cell in build
                for gpu in cell.smoke_on
            ]
        },
    }


def _runner(platform: str, gpu: str, driver: str) -> str:
    """`linux-amd64-gpu-h200-580-1`: the field's label scheme (architecture, GPU, driver branch, count)."""
    model = re.sub(r"[^a-z0-9]+", "-", re.sub(r"^nvidia\s+", "", gpu.lower())).strip("-")
    return f"{platform.replace('/', '-')}-gpu-{model}-{driver.split('.')[0]}-1"
