"""YAML with line numbers: every value can say where in the file it stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from mtbuild.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = ["YamlFile"]

Route = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """Safe loading without dates: `until: 2027-01-31` stays the text that was written."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


@dataclass(frozen=True, kw_only=True)
class YamlFile:
    """A parsed file: `data` as plain values, `lines` the line of every key and item by its route."""

    path: Path
    data: Any
    lines: dict[Route, int]

    @classmethod
    def load(cls, path: Path) -> YamlFile:
        """Read and parse; raises InputError with file and line for anything that isn't good YAML."""
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            msg = f"there is no {path.name} in {path.parent}"
            raise InputError(
                msg, fix="run mtbuild where matrix.yaml is, or name its folder with --root"
            ) from None
        except UnicodeDecodeError as error:
            msg = f"not UTF-8 text: byte {error.start} can't be decoded"
            raise InputError(msg, where=path.name, fix="save the file as UTF-8") from error
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            lines: dict[Route, int] = {}
            if node is not None:
                _walk(node, (), lines, path.name)
            data = loader.construct_document(node) if node is not None else None
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = f":{mark.line + 1}" if mark else ""
            msg = f"broken YAML: {error.problem or error.context}"
            raise InputError(
                msg, where=f"{path.name}{line}", fix="correct the syntax at this line"
            ) from error
        finally:
            loader.dispose()
        return cls(path=path, data=data, lines=lines)

    def where(self, route: Iterable[str | int]) -> str:
        """`matrix.yaml:12 cells[3].torch`: the line of the nearest part of the route that has one."""
        steps = tuple(route)
        line = next(
            (self.lines[steps[:end]] for end in range(len(steps), -1, -1) if steps[:end] in self.lines), 1
        )
        dotted = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip(".")
        return f"{self.path.name}:{line} {dotted}".rstrip()


def _walk(node: yaml.Node, route: Route, lines: dict[Route, int], name: str) -> None:
    lines.setdefault(route, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            step = (*route, key.value)
            if step in lines:
                msg = f"the key {key.value!r} stands here again (first at line {lines[step]})"
                raise InputError(msg, where=f"{name}:{key.start_mark.line + 1}", fix="keep one of the two")
            lines[step] = key.start_mark.line + 1
            _walk(value, step, lines, name)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, (*route, index), lines, name)
