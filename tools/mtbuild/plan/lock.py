"""Exact wheels for a cell, each with one hash: nothing is left that a resolver could decide anew.

Two files under `images/<cell>/` hold a lock: `requirements.lock` (for an installer: name, version, hash) and
`cell.json` (file names, sizes and hashes, and what the lock was made from). Neither holds an address: where a
wheel comes from is the machine's business, its bytes are not.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from mtbuild.errors import InfrastructureError, InputError
from mtbuild.plan.floors import undeclared
from mtbuild.plan.resolve import resolve
from mtbuild.plan.select import choose
from mtbuild.plan.tags import Target

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from mtbuild.plan.cell import Cell
    from mtbuild.plan.index import Index
    from mtbuild.plan.resolve import Resolved
    from mtbuild.plan.wheels import Wheels

__all__ = ["Lock", "LockInputs", "LockedWheel", "check", "make_lock", "runtime_requirements"]

REQUIREMENTS, CELL_JSON = "requirements.lock", "cell.json"
_EPOCH = 1735689600  # 2025-01-01, for indexes that don't say when a wheel was uploaded
_ALWAYS = ("numpy<2",)  # the model's code and torch's own older builds need it, and no torch says so


@dataclass(frozen=True, kw_only=True)
class LockedWheel:
    """One wheel: sizes in bytes. `unpacked_size` is None where the index could not be asked for it."""

    name: str
    version: str
    filename: str
    sha256: str
    size: int
    unpacked_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class LockInputs:
    """What a lock was made from. A cell that differs from it in any field has an out-of-date lock."""

    flavour: str
    platform: str
    python: str
    glibc: str
    pins: tuple[str, ...]
    no_deps: tuple[str, ...]
    requirements: tuple[str, ...]

    @classmethod
    def of(cls, cell: Cell, runtime: Iterable[str]) -> LockInputs:
        """For a cell and the requirements of the runtime that goes into its image."""
        if cell.flavour == "minimal":  # the packages are those of the image that it stands on
            pins: tuple[str, ...] = ()
        else:
            pins = tuple(f"{name}=={version}" for name, version in sorted(cell.pins.items()))
        return cls(
            flavour=cell.flavour,
            platform=cell.platform,
            python=cell.python,
            glibc=cell.base.glibc,
            pins=pins,
            no_deps=tuple(sorted(canonicalize_name(name) for name in cell.no_deps)) if pins else (),
            requirements=tuple(sorted({*runtime, *_ALWAYS, *_unasked(cell)})) if pins else (),
        )


@dataclass(frozen=True, kw_only=True)
class Lock:
    """The frozen wheels of a cell, sorted by name. `epoch` (s since 1970) is when the newest was uploaded."""

    cell_id: str
    wheels: tuple[LockedWheel, ...]
    inputs: LockInputs
    name: str = ""
    epoch: int = _EPOCH

    @property
    def download_bytes(self) -> int:
        return sum(wheel.size for wheel in self.wheels)

    @property
    def unpacked_bytes(self) -> int:
        """Where a wheel's own figure is unknown, 1.9 times its size: what CUDA wheels come to."""
        return sum(wheel.unpacked_size or int(wheel.size * 1.9) for wheel in self.wheels)

    def wheel(self, name: str) -> LockedWheel | None:
        return next((wheel for wheel in self.wheels if wheel.name == name), None)

    def requirements(self) -> str:
        """`requirements.lock`: for `uv pip install --require-hashes --no-deps`."""
        lines = [
            f"# {self.cell_id}: wheels frozen by `mtbuild lock`; change matrix.yaml, not this file.\n",
            *(f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}\n" for wheel in self.wheels),
        ]
        return "".join(lines)

    def cell_json(self) -> str:
        """`cell.json`, schema 1."""
        document = {
            "schema": 1,
            "id": self.cell_id,
            "name": self.name,
            "epoch": self.epoch,
            "download_bytes": self.download_bytes,
            "unpacked_bytes": self.unpacked_bytes,
            "inputs": asdict(self.inputs),
            "wheels": [asdict(wheel) for wheel in self.wheels],
        }
        return json.dumps(document, indent=1) + "\n"

    def write(self, folder: Path) -> None:
        """Both files, each whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in ((REQUIREMENTS, self.requirements()), (CELL_JSON, self.cell_json())):
            fresh = folder / f"{name}.new"
            fresh.write_text(text, encoding="utf-8")
            fresh.replace(folder / name)

    @classmethod
    def load(cls, folder: Path) -> Lock:
        """From `images/<cell>/`; InputError if a file is missing, broken or does not agree with the other."""
        file = folder / CELL_JSON
        fix = f"run `mtbuild lock {folder.name}`"
        try:
            data: Any = json.loads(file.read_text(encoding="utf-8"))
            if data["schema"] != 1:
                msg = f"schema {data['schema']} is not one that this mtbuild knows"
                raise InputError(msg, where=str(file), fix="use the mtbuild that wrote it, or lock again")
            inputs: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value
                for key, value in data["inputs"].items()
            }
            lock = cls(
                cell_id=data["id"],
                name=data["name"],
                epoch=int(data["epoch"]),
                inputs=LockInputs(**inputs),
                wheels=tuple(LockedWheel(**wheel) for wheel in data["wheels"]),
            )
        except FileNotFoundError as error:
            msg = "there is no lock for this cell"
            raise InputError(msg, where=str(file), fix=fix) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            msg = f"not a lock: {error}"
            raise InputError(msg, where=str(file), fix=fix) from error
        requirements = folder / REQUIREMENTS
        if not requirements.is_file() or requirements.read_text(encoding="utf-8") != lock.requirements():
            msg = f"the lock does not agree with {CELL_JSON} beside it (edited by hand, or half a merge)"
            raise InputError(msg, where=str(requirements), fix=fix)
        return lock


def runtime_requirements(root: Path) -> tuple[str, ...]:
    """What the runtime's wheel needs: `project.dependencies` of the root pyproject.toml."""
    file = root / "pyproject.toml"
    try:
        project: Any = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        listed = tuple(str(Requirement(line)) for line in project.get("dependencies", ()))
    except (OSError, KeyError, tomllib.TOMLDecodeError, InvalidRequirement) as error:
        msg = f"can't read the runtime's dependencies: {error}"
        raise InputError(msg, where=str(file), fix="correct project.dependencies") from error
    names = {canonicalize_name(Requirement(line).name) for line in listed}
    banned = sorted({"torch", "triton", "xformers"} & names)
    if banned:
        msg = f"{', '.join(banned)} must come from the cell, not from the runtime's dependencies"
        raise InputError(msg, where=f"{file} project.dependencies", fix="remove it there")
    return listed


def check(cell: Cell, folder: Path, *, runtime: Sequence[str] = ()) -> None:
    """InputError, naming file and fix, unless the lock in this folder was made for exactly this cell."""
    lock = Lock.load(folder)
    fix = f"run `mtbuild lock {cell.name}` and review the difference"
    where = str(folder / CELL_JSON)
    if lock.cell_id != cell.id:
        msg = f"this lock is for {lock.cell_id}, not for {cell.id}"
        raise InputError(msg, where=where, fix=fix)
    wanted = LockInputs.of(cell, runtime)
    for field in LockInputs.__dataclass_fields__:
        old, new = getattr(lock.inputs, field), getattr(wanted, field)
        if old != new:
            msg = f"the lock is out of date: {field} was {_said(old, new)}, now it is {_said(new, old)}"
            raise InputError(msg, where=where, fix=fix)
    for pin in lock.inputs.pins:
        name, _, version = pin.partition("==")
        wheel = lock.wheel(name)
        if wheel is None or Version(wheel.version) != Version(version):
            held = wheel.version if wheel else "(nothing)"
            msg = f"the lock holds {name} {held}, the cell asks for {version}"
            raise InputError(msg, where=where, fix=fix)


def _unasked(cell: Cell) -> set[str]:
    """What the cell's own releases import and no metadata asks for: without it the image is broken."""
    return {need for name, version in cell.pins.items() for need, _ in undeclared(name, version)}


def _said(value: object, other: object) -> str:
    """Of a list, only what the other has not."""
    if isinstance(value, tuple) and isinstance(other, tuple):
        return ", ".join(str(item) for item in value if item not in other) or "without that"
    return str(value)


def make_lock(
    cell: Cell,
    *,
    index: Index,
    note: Callable[[str], None] = lambda _: None,
    runtime: Sequence[str] = (),
    wheels: Wheels | None = None,
) -> Lock:
    """Resolve a cell's pins and the runtime's requirements into exact wheels.

    `wheels` gives unpacked sizes where it is passed. Raises InputError where no set of wheels fits (with uv's
    own words) and InfrastructureError where the index can't be reached.
    """
    inputs = LockInputs.of(cell, runtime)
    if not inputs.pins:
        return Lock(cell_id=cell.id, name=cell.name, inputs=inputs, wheels=())
    alone = [pin for pin in inputs.pins if pin.partition("==")[0] in inputs.no_deps]
    solved = [*(pin for pin in inputs.pins if pin not in alone), *inputs.requirements]
    note(f"{cell.name}: resolving {len(solved) + len(alone)} requirements")
    try:
        found = {one.name: one for one in resolve(solved, cell, index)}
        if alone:
            # What such a package asks for does not fit (then it is taken for study) or is not needed.
            found |= {one.name: one for one in resolve(alone, cell, index, deps=False)}
    except InputError as refused:
        _blame_unknown(cell, index, refused)
        raise
    return Lock(
        cell_id=cell.id,
        name=cell.name,
        inputs=inputs,
        wheels=tuple(_locked(one, cell, wheels) for _, one in sorted(found.items())),
        epoch=max((one.uploaded for one in found.values() if one.uploaded), default=_EPOCH),
    )


def _blame_unknown(cell: Cell, index: Index, refused: InputError) -> None:
    """Raise InputError naming the very key where a pin is of a version that no index has."""
    target = Target(python=cell.python, platform=cell.platform, glibc=cell.base.glibc)
    for name, version in cell.pins.items():
        try:
            choice = choose(index, name, version, target)
        except InfrastructureError:
            return  # uv's own words stand: nothing better can be said without the index
        if choice.missing is not None and choice.missing.why in {"project", "version"}:
            try:
                choice.or_raise(target)
            except InputError as error:
                raise InputError(error.message, where=cell.at(name), fix=error.fix) from refused


def _locked(one: Resolved, cell: Cell, wheels: Wheels | None) -> LockedWheel:
    unpacked = None
    if wheels is not None:
        facts = wheels.facts(
            one.name, one.version, python=cell.python, platform=cell.platform, glibc=cell.base.glibc
        )
        unpacked = facts.unpacked_size if facts.sha256 == one.link.sha256 else None
    return LockedWheel(
        name=one.name,
        version=one.version,
        filename=one.link.filename,
        sha256=str(one.link.sha256),
        size=int(one.link.size or 0),
        unpacked_size=unpacked,
    )
