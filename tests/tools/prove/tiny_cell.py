"""A cell of tiny wheels with the real names, which goes the same way as the large ones."""

from __future__ import annotations

import base64
import hashlib
import io
import zipfile
from pathlib import Path
from typing import Any

from mtbuild.paths import Paths
from mtbuild.plan.cell import Base, Cell
from mtbuild.plan.lock import Lock, LockedWheel, LockInputs, runtime_requirements
from mtbuild.plan.render import render
from mtbuild.prove import wheel_store

ROOT = Path(__file__).parents[3]
REAL = Paths.of(ROOT)
BOOKWORM = Base(name="bookworm", kind="bootstrap", glibc="2.36", python=("3.11",), suite="bookworm")


def wheel(name: str, version: str, files: dict[str, str]) -> tuple[str, bytes]:
    """(file name, bytes) of a small wheel that installers accept, RECORD and all."""
    info = f"{name}-{version}.dist-info"
    members = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = []
    for path, text in members.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
        rows.append(f"{path},sha256={digest},{len(text.encode())}\n")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for path, text in members.items():
            file.writestr(path, text)
        file.writestr(f"{info}/RECORD", "".join(rows) + f"{info}/RECORD,,\n")
    return f"{name}-{version}-py3-none-any.whl", buffer.getvalue()


def locked(name: str, content: bytes) -> LockedWheel:
    project, version = name.split("-")[:2]
    return LockedWheel(
        name=project.replace("_", "-"),
        version=version,
        filename=name,
        sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
        unpacked_size=2 * len(content),
    )


def lock_of(cell: Cell, wheels: list[tuple[str, bytes]], root: Path) -> Lock:
    return Lock(
        cell_id=cell.id,
        name=cell.name,
        inputs=LockInputs.of(cell, runtime_requirements(root)),
        wheels=tuple(sorted((locked(*one) for one in wheels), key=lambda wheel: wheel.name)),
    )


def tiny(**changes: Any) -> Cell:
    values: dict[str, Any] = {
        "name": "tiny",
        "flavour": "runtime-deps",
        "base": BOOKWORM,
        "python": "3.11",
        "torch": "0.0.1",
        "cuda": "12.6",
        "triton": "0.0.2",
        "xformers": "0.0.3",
        "compiler": False,
    }
    return Cell(**{**values, **changes})


def commit(cell: Cell, paths: Paths, salt: str) -> Lock:
    """Lock and rendered files of a tiny cell, its wheels already downloaded. `salt` makes its layers new."""
    wheels = [
        wheel("torch", "0.0.1", {"torch/__init__.py": f"SALT = {salt!r}\n", "torch/bin/protoc": "x"}),
        wheel("triton", "0.0.2", {"triton/__init__.py": "", "triton/_C/libproton.so": "x"}),
        wheel("xformers", "0.0.3", {"xformers/__init__.py": ""}),
        wheel("numpy", "1.26.4", {"numpy/__init__.py": "", "numpy/core/tests/test_x.py": ""}),
    ]
    lock = lock_of(cell, [] if cell.flavour == "minimal" else wheels, paths.root)
    for one, (_, content) in zip(
        lock.wheels, sorted(wheels, key=lambda pair: pair[0]) if lock.wheels else [], strict=True
    ):
        file = wheel_store.path_of(one, paths.wheels)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    render(cell, lock, templates=paths.templates).write(paths.images / cell.id)
    return lock
