"""matrix.yaml: load it, check it, expand it into cells, leave out what is excluded, select by glob.

Nothing is dropped silently: an unknown key, a selector or an exclusion that matches nothing, and an alias
that names no cell are errors that name file, line and key.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from fnmatch import fnmatchcase
from importlib.resources import files
from itertools import product
from typing import TYPE_CHECKING, Any, Never, cast

import bracex
from jsonschema import Draft202012Validator
from packaging.utils import canonicalize_name

from mtbuild.digest import Reference
from mtbuild.errors import InputError, did_you_mean
from mtbuild.plan.cell import Base, Cell, Gpu
from mtbuild.plan.yamlfile import YamlFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from jsonschema.exceptions import ValidationError

__all__ = ["Excluded", "Matrix", "PolicySettings", "RegistrySettings", "load"]

_AXES = ("torch", "cuda", "triton", "xformers", "python")
_MATCHABLE = ("name", "flavour", "python", "torch", "cuda", "triton", "xformers")


@dataclass(frozen=True, kw_only=True)
class RegistrySettings:
    """Where images go, as HOST/REPOSITORY; None is the embedded registry on loopback."""

    staging: str | None = None
    release: str | None = None


@dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """What a release engineer may tune of the policy: the age, in days, at which evidence expires."""

    max_age_days: int = 90


@dataclass(frozen=True, kw_only=True)
class Excluded:
    """A cell that an exclusion took out, with the rule's reason."""

    cell: Cell
    reason: str
    link: str
    until: date | None


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """The whole of matrix.yaml. `groups` are cell names in file order; `expired` are exclusions whose
    `until` has passed: they no longer exclude, and the plan says so."""

    path: Path
    bases: dict[str, Base]
    cells: tuple[Cell, ...]
    excluded: tuple[Excluded, ...]
    expired: tuple[str, ...]
    groups: dict[str, tuple[str, ...]]
    aliases: dict[str, str]
    registry: RegistrySettings
    policy: PolicySettings

    def cell(self, key: str) -> Cell:
        """The cell with this name or id; InputError with the nearest name otherwise."""
        for cell in self.cells:
            if key in (cell.name, cell.id):
                return cell
        for excluded in self.excluded:
            if key in (excluded.cell.name, excluded.cell.id):
                msg = f"cell {key!r} is excluded: {excluded.reason}"
                raise InputError(
                    msg, where=self.path.name, fix="remove the exclusion, or choose another cell"
                )
        msg = f"there is no cell {key!r} in {self.path.name}.{did_you_mean(key, self._names())}"
        raise InputError(msg, fix="see `mtbuild matrix --plan` for all cells")

    def select(self, patterns: Iterable[str], *, where: str = "--only") -> tuple[Cell, ...]:
        """Cells whose name or id matches any of the globs (`t2*`, `v{72,73}`), in file order.

        `where` is what the user wrote them to, for the error if one matches nothing.
        """
        return _select(self.cells, patterns, where=where)

    def group(self, name: str) -> tuple[Cell, ...]:
        """The cells of a group; InputError if there is no such group."""
        if name not in self.groups:
            msg = f"there is no group {name!r} in {self.path.name}.{did_you_mean(name, self.groups)}"
            raise InputError(msg, fix=f"choose one of: {', '.join(self.groups)}")
        chosen = set(self.groups[name])
        return tuple(cell for cell in self.cells if cell.name in chosen)

    def aliases_of(self, cell: Cell) -> tuple[str, ...]:
        """The moving aliases that name this cell."""
        return tuple(alias for alias, name in self.aliases.items() if name in (cell.name, cell.id))

    def _names(self) -> Iterator[str]:
        for cell in self.cells:
            yield cell.name
            yield cell.id


def load(path: Path, *, today: date | None = None) -> Matrix:
    """Read matrix.yaml. `today` decides which exclusions have expired (default: the date in UTC)."""
    source = YamlFile.load(path)
    _check_schema(source)
    data = source.data
    bases = {name: _base(source, name, raw) for name, raw in data["bases"].items()}
    cells = tuple(
        cell for index, raw in enumerate(data["cells"]) for cell in _expand(source, index, raw, bases)
    )
    _check_unique(source, cells)
    excludes = data.get("exclude", [])
    kept, excluded, expired = _exclude(source, cells, excludes, today or datetime.now(UTC).date())
    kept = _with_gpus(source, kept, data.get("smoke_on", []))
    groups = {}
    for name, patterns in data.get("groups", {}).items():
        chosen = _select(kept, patterns, where=source.where(("groups", name)))
        groups[name] = tuple(cell.name for cell in chosen)
    matrix = Matrix(
        path=path,
        bases=bases,
        cells=kept,
        excluded=excluded,
        expired=expired,
        groups=groups,
        aliases=data.get("aliases", {}),
        registry=_registry(source, data.get("registry", {})),
        policy=PolicySettings(**data.get("policy", {})),
    )
    _check_aliases(source, matrix)
    return matrix


def _check_schema(source: YamlFile) -> None:
    """One error for the first problem in the file, in the words of a person."""
    schema = json.loads(files("mtbuild.plan").joinpath("schema/matrix.schema.json").read_text("utf-8"))
    errors = [
        leaf for error in Draft202012Validator(schema).iter_errors(source.data) for leaf in _leaves(error)
    ]
    if not errors:
        return

    def line(error: ValidationError) -> tuple[int, int]:
        route = tuple(error.absolute_path)
        nearest = (
            source.lines[route[:end]] for end in range(len(route), -1, -1) if route[:end] in source.lines
        )
        return next(nearest, 0), -len(route)

    _say(source, min(errors, key=line))


def _leaves(error: ValidationError) -> list[ValidationError]:
    """The errors under a oneOf that speak of the branch the writer meant (scalar or list)."""
    if error.validator != "oneOf" or not error.context:
        return [error]
    wanted = "array" if isinstance(error.instance, list) else "string"
    branch = [
        leaf for leaf in error.context if not (leaf.validator == "type" and leaf.validator_value != wanted)
    ]
    return branch or [error.context[0]]


def _say(source: YamlFile, error: ValidationError) -> Never:
    route = tuple(error.absolute_path)
    value: Any = error.instance
    rule: Any = cast("Any", error.validator_value)
    where = source.where(route)
    if error.validator == "additionalProperties":
        known = list(cast("dict[str, Any]", error.schema).get("properties", {}))
        key = next(key for key in value if key not in known)
        msg = f"unknown key {key!r}.{did_you_mean(str(key), known)}"
        raise InputError(msg, where=source.where((*route, key)), fix=f"the keys here are: {', '.join(known)}")
    if error.validator == "required":
        missing = next(key for key in rule if key not in value)
        msg = "an exclusion without a reason" if missing == "reason" else f"the key {missing!r} is missing"
        raise InputError(msg, where=where, fix=f"add `{missing}:` here")
    if error.validator == "type" and isinstance(value, int | float) and not isinstance(value, bool):
        msg = f"{value!r} is a bare number; YAML would read 2.10 as 2.1"
        raise InputError(msg, where=where, fix="write the version in quotes, exactly as released")
    if error.validator == "pattern":
        msg = f"{value!r} is not of the form that {route[-1] if route else 'this'} needs"
        raise InputError(msg, where=where, fix='write a version in quotes, such as "2.7.1"')
    if error.validator == "enum":
        choices = [str(choice) for choice in rule]
        msg = f"{value!r} is not one of {', '.join(choices)}.{did_you_mean(str(value), choices)}"
        raise InputError(msg, where=where, fix="use one of these")
    if error.validator == "const":
        msg = f"schema {value!r} is not one that this mtbuild reads"
        raise InputError(msg, where=where, fix="write `schema: 1`, or update mtbuild")
    raise InputError(error.message, where=where, fix="see docs/matrix.md for the file's form")


def _base(source: YamlFile, name: str, raw: dict[str, Any]) -> Base:
    base = Base(name=name, **{**raw, "python": tuple(raw["python"])})
    route = ("bases", name)
    if base.kind == "bootstrap" and not base.suite:
        msg = "a base of kind bootstrap needs a suite"
        raise InputError(msg, where=source.where(route), fix="add `suite: bookworm`")
    if base.kind == "image":
        if not base.ref:
            msg = "a base of kind image needs a ref"
            raise InputError(msg, where=source.where(route), fix="add `ref: HOST/REPOSITORY@sha256:…`")
        try:
            Reference.parse(base.ref)
        except InputError as error:
            raise InputError(error.message, where=source.where((*route, "ref")), fix=error.fix) from error
    if base.kind == "cell" and not base.ref:
        msg = "a base of kind cell needs a ref"
        raise InputError(msg, where=source.where(route), fix="add `ref: NAME`, the cell to build on")
    return base


def _expand(source: YamlFile, index: int, raw: dict[str, Any], bases: dict[str, Base]) -> Iterator[Cell]:
    """The cells of one entry: a list of versions is an axis, and the name's placeholders tell them apart."""
    route: tuple[str | int, ...] = ("cells", index)
    base = bases.get(raw["base"])
    if base is None:
        msg = f"there is no base {raw['base']!r}.{did_you_mean(raw['base'], bases)}"
        raise InputError(msg, where=source.where((*route, "base")), fix=f"use one of: {', '.join(bases)}")
    axes = [axis for axis in _AXES if isinstance(raw.get(axis), list)]
    for values in product(*(raw[axis] for axis in axes)):
        chosen = {**raw, **dict(zip(axes, values, strict=True))}
        try:
            name = chosen["name"].format(**{axis: chosen.get(axis) or "none" for axis in _AXES})
        except (KeyError, IndexError, ValueError) as error:
            msg = f"the placeholder {error} in the name is not an axis"
            fix = f"use {', '.join('{' + axis + '}' for axis in _AXES)}"
            raise InputError(msg, where=source.where((*route, "name")), fix=fix) from error
        if chosen["python"] not in base.python:
            msg = f"base {base.name!r} has Python {', '.join(base.python)}, not {chosen['python']}"
            raise InputError(
                msg, where=source.where((*route, "python")), fix="change the cell's python or base"
            )
        yield Cell(
            name=name,
            flavour=chosen.get("flavour", "runtime-deps"),
            base=base,
            python=chosen["python"],
            torch=chosen["torch"],
            cuda=chosen["cuda"],
            triton=chosen["triton"],
            xformers=chosen.get("xformers"),
            compiler=chosen.get("compiler", True),
            no_deps=tuple(chosen.get("no_deps", ())),
            targets=tuple(chosen.get("targets", ())),
            allow=tuple(chosen.get("allow", ())),
            expect=chosen.get("expect", "published"),
            packages=tuple(sorted(chosen.get("packages", {}).items())),
            where=source.where(route),
            places=(
                *((key, source.where((*route, key))) for key in ("torch", "triton", "xformers")),
                *(
                    (canonicalize_name(name), source.where((*route, "packages", name)))
                    for name in chosen.get("packages", {})
                ),
            ),
        )


def _check_unique(source: YamlFile, cells: Sequence[Cell]) -> None:
    seen: dict[str, Cell] = {}
    for cell in cells:
        for key, what in ((cell.name, "name"), (cell.id, "id")):
            if key in seen and seen[key] is not cell:
                msg = f"two cells have the {what} {key!r} (the other: {seen[key].where})"
                fix = (
                    "put the axis into the name, such as `t{torch}-py{python}`"
                    if what == "name"
                    else "drop one"
                )
                raise InputError(msg, where=cell.where or source.path.name, fix=fix)
            seen[key] = cell


def _exclude(
    source: YamlFile, cells: tuple[Cell, ...], rules: Sequence[dict[str, Any]], today: date
) -> tuple[tuple[Cell, ...], tuple[Excluded, ...], tuple[str, ...]]:
    kept = cells
    excluded: list[Excluded] = []
    expired: list[str] = []
    for index, rule in enumerate(rules):
        where = source.where(("exclude", index))
        hits = [cell for cell in cells if _matches(cell, rule["match"])]
        if not hits:
            words = ", ".join(f"{key}: {value}" for key, value in rule["match"].items())
            values = {str(getattr(cell, key)) for cell in cells for key in rule["match"] if key != "base"}
            hint = did_you_mean(next(iter(rule["match"].values())), values)
            msg = f"the exclusion ({words}) matches no cell.{hint}"
            raise InputError(msg, where=where, fix="correct it or remove it")
        until = _date(source, index, rule["until"]) if "until" in rule else None
        if until is not None and until < today:
            expired.append(f"{where}: expired on {until}, so it excludes nothing ({rule['reason']})")
            continue
        for cell in hits:
            if cell in kept:
                excluded.append(
                    Excluded(cell=cell, reason=rule["reason"], link=rule.get("link", ""), until=until)
                )
        kept = tuple(cell for cell in kept if cell not in hits)
    return kept, tuple(excluded), tuple(expired)


def _date(source: YamlFile, index: int, text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        where = source.where(("exclude", index, "until"))
        msg = f"{text!r} is not a date"
        raise InputError(msg, where=where, fix="write it as YYYY-MM-DD") from error


def _matches(cell: Cell, match: dict[str, str]) -> bool:
    """All keys of a rule must match, each as a glob."""
    values = {key: getattr(cell, key) or "" for key in _MATCHABLE} | {"base": cell.base.name}
    return all(
        any(fnmatchcase(values[key], glob) for glob in _globs(pattern)) for key, pattern in match.items()
    )


def _with_gpus(
    source: YamlFile, cells: tuple[Cell, ...], rules: Sequence[dict[str, Any]]
) -> tuple[Cell, ...]:
    for index, rule in enumerate(rules):
        chosen = set(_select(cells, rule["cells"], where=source.where(("smoke_on", index, "cells"))))
        gpu = Gpu(name=rule["gpu"], sm=rule["sm"], driver=rule["driver"])
        cells = tuple(
            replace(cell, smoke_on=(*cell.smoke_on, gpu)) if cell in chosen else cell for cell in cells
        )
    return cells


def _registry(source: YamlFile, raw: dict[str, str]) -> RegistrySettings:
    for key, value in raw.items():
        host, slash, _path = value.partition("/")
        if value != "embedded" and (not slash or not ("." in host or ":" in host or host == "localhost")):
            msg = f"{value!r} is neither `embedded` nor HOST/REPOSITORY"
            raise InputError(
                msg, where=source.where(("registry", key)), fix="write it as HOST[:PORT]/REPOSITORY"
            )
    chosen = {key: None if value == "embedded" else value for key, value in raw.items()}
    if len(chosen) == 2 and (chosen["staging"] is None) != (chosen["release"] is None):
        msg = "one of staging and release is embedded and the other is not"
        raise InputError(msg, where=source.where(("registry",)), fix="name both, or keep both embedded")
    if chosen.get("staging") is not None and chosen.get("staging") == chosen.get("release"):
        msg = "staging and release are the same repository, so an unproven image would be public"
        raise InputError(msg, where=source.where(("registry",)), fix="name two repositories")
    return RegistrySettings(**chosen)


def _check_aliases(source: YamlFile, matrix: Matrix) -> None:
    names = {key for cell in matrix.cells for key in (cell.name, cell.id)}
    for alias, name in matrix.aliases.items():
        where = source.where(("aliases", alias))
        if name not in names:
            msg = f"the alias {alias!r} names {name!r}, which is not a cell.{did_you_mean(name, names)}"
            raise InputError(msg, where=where, fix="name a cell that stands in this file and is not excluded")
        if alias in names:
            msg = f"the alias {alias!r} is also a cell's name"
            raise InputError(msg, where=where, fix="choose another alias")


def _globs(pattern: str) -> list[str]:
    return list(bracex.expand(pattern))


def _select(cells: Sequence[Cell], patterns: Iterable[str], *, where: str) -> tuple[Cell, ...]:
    chosen: set[str] = set()
    for pattern in patterns:
        for glob in _globs(pattern):
            hits = {cell.id for cell in cells if fnmatchcase(cell.name, glob) or fnmatchcase(cell.id, glob)}
            if not hits:
                names = [key for cell in cells for key in (cell.name, cell.id)]
                msg = f"the selector {glob!r} matches no cell.{did_you_mean(glob, names)}"
                raise InputError(msg, where=where, fix="see `mtbuild matrix --plan` for all cells")
            chosen |= hits
    return tuple(cell for cell in cells if cell.id in chosen)
