"""The runtime's wheel, built from this tree: the same files give the same bytes, and are not built twice."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtbuild.errors import InputError
from mtbuild.plan.index import Index
from mtbuild.plan.resolve import uv_program
from mtbuild.proc import run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mtbuild.paths import Paths

__all__ = ["RuntimeWheel", "runtime_wheel"]

_EPOCH = 1735689600  # 2025-01-01: every member of the wheel has this time
_BACKEND = Path(__file__).parent / "build-backend.txt"
_BUILD_S = 600


@dataclass(frozen=True, kw_only=True)
class RuntimeWheel:
    """The wheel file, alone in its folder, and its hash."""

    path: Path
    sha256: str


def runtime_wheel(paths: Paths, *, note: Callable[[str], None] = lambda _: None) -> RuntimeWheel:
    """Build it with `uv build`, or find the one that these very files gave before.

    Raises InputError for a pyproject.toml without packages, InfrastructureError where the build backend
    can't be fetched.
    """
    key = _tree_hash(paths.root)
    folder = paths.state / "runtime" / key[:16]
    found = _in(folder)
    if found is not None:
        return found
    note("building the runtime's wheel")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="new-", dir=folder.parent) as temporary:
        run(
            [
                uv_program(), "build", "--wheel", "--quiet", f"--out-dir={temporary}",
                f"--build-constraint={_BACKEND}", paths.root,
            ],
            timeout_s=_BUILD_S,
            env={
                **Index.from_environment().uv_env(),
                "SOURCE_DATE_EPOCH": str(_EPOCH),
                "UV_PYTHON_DOWNLOADS": "never",
            },
            fix="check the package index of this machine, and that the tree builds: `uv build --wheel`",
        )  # fmt: skip
        for extra in Path(temporary).glob(".*"):
            extra.unlink()  # uv leaves a .gitignore
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(temporary, folder)
    built = _in(folder)
    if built is None:
        msg = "uv built no wheel"
        raise InputError(msg, where=str(paths.root / "pyproject.toml"), fix="see `uv build --wheel`")
    return built


def _in(folder: Path) -> RuntimeWheel | None:
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        return None
    return RuntimeWheel(path=wheels[0], sha256=hashlib.sha256(wheels[0].read_bytes()).hexdigest())


def _tree_hash(root: Path) -> str:
    """Over all that the wheel is made of: the project file, what it names, and the backend's versions."""
    total = hashlib.sha256(_BACKEND.read_bytes())
    for file in sorted(_files(root)):
        total.update(f"{file.relative_to(root)}\0{file.stat().st_mode & 0o111:o}\0".encode())
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def _files(root: Path) -> Iterator[Path]:
    project = root / "pyproject.toml"
    try:
        document: Any = tomllib.loads(project.read_text(encoding="utf-8"))
        packages = document["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    except (OSError, KeyError, tomllib.TOMLDecodeError) as error:
        msg = f"can't tell which packages the runtime's wheel holds: {error}"
        raise InputError(
            msg, where=str(project), fix="list them in tool.hatch.build.targets.wheel.packages"
        ) from error
    yield project
    readme = document["project"].get("readme")
    if isinstance(readme, str):
        yield root / readme
    for package in packages:
        for file in (root / package).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts and file.suffix != ".pyc":
                yield file
