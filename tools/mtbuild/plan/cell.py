"""The value types of the plan: what a release engineer writes, once it is loaded and expanded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from packaging.utils import canonicalize_name

__all__ = ["Base", "Cell", "Expectation", "Finding", "Flavour", "Gpu", "State"]

Flavour = Literal["runtime-deps", "minimal"]
Expectation = Literal["published", "refused"]
State = Literal["planned", "refused", "degraded"]
Severity = Literal["refused", "degraded", "note"]


@dataclass(frozen=True, kw_only=True)
class Base:
    """What a cell's image starts from.

    `bootstrap`: made here from Debian packages (`suite`); `image`: an image by digest (`ref`);
    `import`: files of the host that builds it; `cell`: another cell's image (for `minimal`).
    `glibc` is the C library's version, `python` the interpreters it can have.
    """

    name: str
    kind: Literal["bootstrap", "image", "import", "cell"]
    glibc: str
    python: tuple[str, ...]
    suite: str = ""
    ref: str = ""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU host that a cell is smoked on: `sm` is the compute capability ("9.0")."""

    name: str
    sm: str
    driver: str


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One combination of versions, and what becomes of it. All versions are strings."""

    name: str
    flavour: Flavour
    base: Base
    python: str
    torch: str
    cuda: str
    triton: str
    xformers: str | None
    compiler: bool
    no_deps: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()
    expect: Expectation = "published"
    packages: tuple[tuple[str, str], ...] = ()  # further pins beside the trio, e.g. ("flash-attn", "2.8.3")
    smoke_on: tuple[Gpu, ...] = ()
    platform: str = "linux/amd64"
    where: str = field(default="", compare=False)  # "matrix.yaml:12", for messages
    # "matrix.yaml:15 cells[1].torch" by project, for the keys that stand there
    places: tuple[tuple[str, str], ...] = field(default=(), compare=False, repr=False)

    @property
    def id(self) -> str:
        """`torch2.7.1-cu126-xf0.0.31-py311[-minimal]`, also the folder under images/."""
        parts = [f"torch{self.torch}", f"cu{self.cuda.replace('.', '')}"]
        if self.xformers is not None:
            parts.append(f"xf{self.xformers}")
        parts.append(f"py{self.python.replace('.', '')}")
        if self.flavour == "minimal":
            parts.append("minimal")
        return "-".join(parts)

    def at(self, project: str) -> str:
        """Where the version of a project stands, for messages."""
        return dict(self.places).get(project, f"{self.where or self.name} {project}")

    @property
    def pins(self) -> dict[str, str]:
        """Every package that the cell itself fixes, by canonical name."""
        pins = {"torch": self.torch, "triton": self.triton}
        if self.xformers is not None:
            pins["xformers"] = self.xformers
        pins.update({canonicalize_name(name): version for name, version in self.packages})
        return pins


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a rule says of a cell: what is wrong, why (`source` quotes it), and the fix."""

    rule: str
    severity: Severity
    message: str
    source: str
    fix: str
