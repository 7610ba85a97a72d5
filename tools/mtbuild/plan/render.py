"""A cell and its lock into what is committed and built: `images/<cell>/Dockerfile` and the lock's two files.

Deterministic: the same cell, lock and templates give the same bytes. A variable that a template asks for and
nobody gives is an error, not an empty string.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
from packaging.version import Version

from mtbuild.errors import InputError
from mtbuild.plan.cuts import cut_of
from mtbuild.plan.floors import family_driver
from mtbuild.plan.lock import CELL_JSON, REQUIREMENTS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mtbuild.plan.cell import Cell
    from mtbuild.plan.lock import Lock, LockedWheel

__all__ = ["LAYER_EPOCH", "MISSING_WHEEL", "Rendered", "WheelGroup", "render", "wheel_groups"]

DOCKERFILE = "Dockerfile"
LAYER_EPOCH = 1735689600  # 2025-01-01, as in the base: one for all cells, or they could not share layers
MISSING_WHEEL = "not in the build cache"  # said by a layer whose wheels the engine dropped meanwhile
_TEMPLATES = Path(__file__).parents[3] / "templates"

_SYSTEM = ("ca-certificates", "ffmpeg", "python3")
# ffmpeg's packages bring a display stack and Intel's media driver. Mesa's drivers (with LLVM and Z3) and the
# media driver are loaded by name when a window or such a device is opened, which never happens here.
_SYSTEM_WITHOUT = (
    "/usr/lib/x86_64-linux-gnu/dri/*",
    "/usr/lib/x86_64-linux-gnu/libLLVM*",
    "/usr/lib/x86_64-linux-gnu/libmfxhw64*",
    "/usr/lib/x86_64-linux-gnu/libz3*",
    "/usr/lib/x86_64-linux-gnu/mfx/*",
    "/usr/share/X11/*",
    "/usr/share/icons/*",
    "/usr/share/sounds/*",
    "/usr/share/fonts/*",
)
_COMPILER = ("g++", "gcc", "libc6-dev", "libpython3-dev")  # python3-dev adds only documents and tools
# Link-time optimisation, sanitizers, static libraries: Triton's stubs and inductor's code use none of them.
_COMPILER_WITHOUT = (
    "/usr/bin/*lto-dump*",
    "/usr/lib/gcc/x86_64-linux-gnu/*/lto1",
    "/usr/lib/gcc/x86_64-linux-gnu/*/lib*san*",
    "/usr/lib/x86_64-linux-gnu/lib*san.so*",
    "/usr/lib/python3*/config-*/*.a",
    "/usr/lib/x86_64-linux-gnu/libpython3*.a",
)


@dataclass(frozen=True, kw_only=True)
class WheelGroup:
    """The wheels of one layer, and what is cut from them."""

    title: str
    wheels: tuple[LockedWheel, ...]

    @property
    def remove(self) -> tuple[str, ...]:
        return _unique(path for wheel in self.wheels for path in cut_of(wheel.name).remove)

    @property
    def strip(self) -> tuple[str, ...]:
        return _unique(path for wheel in self.wheels for path in cut_of(wheel.name).strip)


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """The three files of `images/<cell>/`."""

    dockerfile: str
    requirements: str
    cell_json: str

    @property
    def files(self) -> dict[str, str]:
        return {DOCKERFILE: self.dockerfile, REQUIREMENTS: self.requirements, CELL_JSON: self.cell_json}

    def write(self, folder: Path) -> tuple[str, ...]:
        """Write what differs, each file whole or not at all; returns the names of those written."""
        folder.mkdir(parents=True, exist_ok=True)
        stale = self.stale(folder)
        for name in stale:
            fresh = folder / f"{name}.new"
            fresh.write_text(self.files[name], encoding="utf-8")
            fresh.replace(folder / name)
        return stale

    def stale(self, folder: Path) -> tuple[str, ...]:
        """Names of the files in the folder that are missing or differ."""
        return tuple(
            name
            for name, text in self.files.items()
            if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != text
        )

    def check(self, folder: Path) -> None:
        """InputError naming the first file that is not as rendered."""
        for name in self.stale(folder):
            msg = (
                "is not what the templates and the lock render" if (folder / name).exists() else "is missing"
            )
            raise InputError(msg, where=str(folder / name), fix=f"run `mtbuild render {folder.name}`")


def render(cell: Cell, lock: Lock, *, templates: Path | None = None) -> Rendered:
    """The files for a cell. Raises InputError for a missing or broken template and an undefined variable."""
    folder = templates if templates is not None else _TEMPLATES
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 - Dockerfiles, not HTML; every value comes from matrix.yaml
    )
    environment.globals["layer_epoch"] = LAYER_EPOCH
    environment.globals["missing_wheel"] = MISSING_WHEEL
    environment.globals["site"] = f"/opt/venv/lib/python{cell.python}/site-packages"
    shared, own = wheel_groups(lock)
    try:
        text = environment.get_template("Dockerfile.j2").render(
            cell=cell,
            compiler_packages=_COMPILER,
            compiler_without=_COMPILER_WITHOUT,
            description=_description(cell),
            own_groups=own,
            require_cuda=_require_cuda(cell.cuda),
            shared_groups=shared,
            system_packages=_SYSTEM,
            system_without=_SYSTEM_WITHOUT,
        )
    except jinja2.TemplateError as error:
        raise _broken(error, folder, cell) from error
    return Rendered(dockerfile=text, requirements=lock.requirements(), cell_json=lock.cell_json())


def wheel_groups(lock: Lock) -> tuple[tuple[WheelGroup, ...], tuple[WheelGroup, ...]]:
    """Layers by change rate: those that all cells with the same torch share, and a cell's own.

    CUDA's libraries are two layers of about the same size: they are compressed and pulled side by side.
    """
    left = {wheel.name: wheel for wheel in lock.wheels}

    def take(title: str, names: Iterable[str]) -> WheelGroup:
        return WheelGroup(title=title, wheels=tuple(left.pop(name) for name in sorted(names) if name in left))

    cuda = [name for name in left if name.startswith(("nvidia-", "cuda-"))]
    large = [name for name in cuda if name.startswith(("nvidia-cudnn", "nvidia-cublas"))]
    shared = (
        take("CUDA: cuDNN and cuBLAS", large),
        take("CUDA: the other libraries", set(cuda) - set(large)),
        take("torch", ["torch"]),
        take("triton", ["triton"]),
    )
    pinned = [pin.partition("==")[0] for pin in lock.inputs.pins]
    own = (
        take("xformers", ["xformers"]),
        take("further packages of this cell", pinned),
        take("what the runtime needs", list(left)),
    )
    return tuple(group for group in shared if group.wheels), tuple(group for group in own if group.wheels)


def _description(cell: Cell) -> str:
    parts = [f"torch {cell.torch}", f"CUDA {cell.cuda}", f"triton {cell.triton}"]
    if cell.xformers is not None:
        parts.append(f"xformers {cell.xformers}")
    parts += [f"{name} {version}" for name, version in cell.packages]
    return f"MultiTalk on Wan2.1: {', '.join(parts)}, Python {cell.python}"


def _require_cuda(cuda: str) -> str:
    """For NVIDIA's container toolkit; the words are alternatives.

    Any driver of the family runs machine code of any toolkit of the same major version (minor-version
    compatibility); a driver that knows the toolkit itself is fine as well.
    """
    parsed, family = Version(cuda), family_driver(cuda)
    if family is None:
        msg = f"no driver family is known for CUDA {cuda}"
        raise InputError(msg, where="plan/data/floors.json", fix="add it to drivers.minimum, with its source")
    return f"cuda>={parsed.major}.{parsed.minor} driver>={family[0]}"


def _broken(error: jinja2.TemplateError, folder: Path, cell: Cell) -> InputError:
    if isinstance(error, jinja2.TemplateNotFound):
        where, message = str(folder), f"there is no template {error.name}"
    elif isinstance(error, jinja2.TemplateSyntaxError):
        where, message = f"{error.filename or folder}:{error.lineno}", str(error.message)
    else:
        where, message = _place(error, folder), str(error.message)
    return InputError(
        f"{cell.name}: {message}", where=where, fix="correct the template, or pass what it asks for"
    )


def _place(error: Exception, folder: Path) -> str:
    """`templates/partials/apt.j2:12`: the innermost template line of a traceback."""
    place, trace = str(folder), error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if Path(file).is_relative_to(folder):
            place = f"{file}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def _unique(items: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(items))
