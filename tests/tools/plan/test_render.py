"""Rendering: deterministic, strict, committed; the rendered files are linted and keep their promises."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mtbuild.cli import cli
from mtbuild.errors import InputError
from mtbuild.plan.cell import Base, Cell
from mtbuild.plan.cuts import cut_of
from mtbuild.plan.lock import Lock, LockedWheel, LockInputs
from mtbuild.plan.matrix import load
from mtbuild.plan.render import Rendered, render, wheel_groups

ROOT = Path(__file__).parents[3]
GOLDEN = Path(__file__).parent / "data" / "render"
BOOKWORM = Base(name="bookworm", kind="bootstrap", glibc="2.36", python=("3.11",), suite="bookworm")
PINS = {
    "torch": "2.7.1",
    "triton": "3.3.1",
    "xformers": "0.0.31",
    "nvidia-cudnn-cu12": "9.5.1",
    "numpy": "1.26.4",
}
COMMITTED = sorted(folder for folder in (ROOT / "images").iterdir() if folder.is_dir())


def cell(**changes: Any) -> Cell:
    values: dict[str, Any] = {
        "name": "v73",
        "flavour": "runtime-deps",
        "base": BOOKWORM,
        "python": "3.11",
        "torch": "2.7.1",
        "cuda": "12.6",
        "triton": "3.3.1",
        "xformers": "0.0.31",
        "compiler": True,
    }
    return Cell(**{**values, **changes})


def lock(one: Cell, **versions: str) -> Lock:
    wheels = tuple(
        LockedWheel(
            name=name,
            version=version,
            filename=f"{name.replace('-', '_')}-{version}-py3-none-any.whl",
            sha256=f"{number:x}" * 64,
            size=1000 * number,
        )
        for number, (name, version) in enumerate(sorted({**PINS, **versions}.items()), 1)
    )
    return Lock(cell_id=one.id, name=one.name, inputs=LockInputs.of(one, []), wheels=wheels)


@pytest.mark.parametrize("flavour", ["runtime-deps", "minimal"])
def test_golden_files(flavour: Any, update: bool) -> None:
    one = cell(flavour=flavour)
    frozen = lock(one) if flavour == "runtime-deps" else dataclasses.replace(lock(one), wheels=())
    text = render(one, frozen).dockerfile
    golden = GOLDEN / f"{flavour}.Dockerfile"
    if update:
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()


def test_the_same_input_gives_the_same_bytes() -> None:
    assert render(cell(), lock(cell())) == render(cell(), lock(cell()))


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_committed_files_are_as_rendered(folder: Path) -> None:
    one = next(cell for cell in load(ROOT / "matrix.yaml").cells if cell.id == folder.name)
    render(one, Lock.load(folder)).check(folder)


def test_committed_dockerfiles_pass_hadolint() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    files = [folder / "Dockerfile" for folder in COMMITTED] + sorted(GOLDEN.glob("*.Dockerfile"))
    done = subprocess.run(
        [hadolint, "--config", ROOT / ".hadolint.yaml", *files], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_hadolint_would_find_something(tmp_path: Path) -> None:
    """The ignore list hides four rules, not the linter."""
    bad = (COMMITTED[0] / "Dockerfile").read_text().replace("CMD [", "MAINTAINER me\nCMD [")
    (tmp_path / "Dockerfile").write_text(bad)
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run(
        [hadolint, "--config", ROOT / ".hadolint.yaml", tmp_path / "Dockerfile"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and "DL4000" in done.stdout


def test_cells_with_the_same_torch_share_every_layer_up_to_triton() -> None:
    """v72 differs from v73 in its compiler and xformers: everything before them must be the same text."""
    v73 = render(cell(), lock(cell())).dockerfile
    other = cell(name="v72", compiler=False, xformers="0.0.23.post1", no_deps=("xformers",))
    v72 = render(other, lock(other, xformers="0.0.23.post1")).dockerfile

    def steps(text: str) -> list[str]:
        body = text.partition("ARG BASE")[2]  # the header names the cell; comments are in no layer
        return body.split("\nRUN ")

    def bare(step: str) -> str:
        return re.sub(r"(?m)^#.*\n?", "", step).strip()

    mine, theirs = steps(v73), steps(v72)
    triton = next(number for number, step in enumerate(mine) if "\ntriton==" in step)
    assert [bare(step) for step in mine[: triton + 1]] == [bare(step) for step in theirs[: triton + 1]]
    assert triton >= 5


def test_without_compiler_there_is_none_and_no_variable_promises_one() -> None:
    text = render(cell(compiler=False), lock(cell(compiler=False))).dockerfile
    assert "gcc" not in text and "ENV CC" not in text
    assert "ENV CC=gcc CXX=g++" in render(cell(), lock(cell())).dockerfile


def test_what_every_image_promises() -> None:
    text = render(cell(), lock(cell())).dockerfile
    for words in (
        "USER 65532:65532",
        "chmod 1777 /cache",
        "TRITON_CACHE_DIR=/cache/triton",
        "TORCHINDUCTOR_CACHE_DIR=/cache/inductor",
        "XDG_CACHE_HOME=/cache/xdg",
        "NVIDIA_VISIBLE_DEVICES=all",
        "NVIDIA_DRIVER_CAPABILITIES=compute,utility",
        'NVIDIA_REQUIRE_CUDA="cuda>=12.6 driver>=525.60.13"',
        "--require-hashes",
        "--invalidation-mode unchecked-hash",
        "\nldconfig\n",
        " ffmpeg ",
        'org.opencontainers.image.version="torch2.7.1-cu126-xf0.0.31-py311"',
    ):
        assert words in text
    installs = [part.partition("\nfind ")[0] for part in text.split("uv pip install")[1:]]
    assert len(installs) >= 5
    assert all("--no-index" in words and "--no-deps" in words for words in installs)
    assert all("--require-hashes" in words for words in installs[:-1])  # the last is our own wheel


def test_nothing_of_a_machine_is_in_a_rendered_file() -> None:
    for folder in COMMITTED:
        text = (folder / "Dockerfile").read_text()
        assert not re.search(r"[a-z]{3,}://|/root|/home|127\.0\.0\.1", text)


@pytest.mark.parametrize(
    ("cuda", "expected"), [("13.0", "cuda>=13.0 driver>=580.65.06"), ("11.8", "cuda>=11.8 driver>=450.80.02")]
)
def test_the_driver_is_that_of_the_family(cuda: str, expected: str) -> None:
    assert f'NVIDIA_REQUIRE_CUDA="{expected}"' in render(cell(cuda=cuda), lock(cell())).dockerfile


def test_an_unknown_cuda_is_an_error() -> None:
    with pytest.raises(InputError, match="no driver family is known for CUDA 14"):
        render(cell(cuda="14.0"), lock(cell()))


def templates(tmp_path: Path, replaced: str, by: str, file: str = "partials/runtime-deps.j2") -> Path:
    folder = tmp_path / "templates"
    shutil.copytree(ROOT / "templates", folder)
    text = (folder / file).read_text()
    assert replaced in text
    (folder / file).write_text(text.replace(replaced, by))
    return folder


def test_a_missing_variable_names_template_and_line(tmp_path: Path) -> None:
    folder = templates(tmp_path, 'CMD ["python3",', 'CMD ["{{ interpreter }}",')
    with pytest.raises(InputError) as raised:
        render(cell(), lock(cell()), templates=folder)
    assert raised.value.exit_code == 2
    assert "'interpreter' is undefined" in raised.value.message
    lines = (folder / "partials/runtime-deps.j2").read_text().splitlines()
    line = 1 + next(number for number, text in enumerate(lines) if "interpreter }}" in text)
    assert raised.value.where == f"{folder}/partials/runtime-deps.j2:{line}"


def test_a_broken_template_names_its_line(tmp_path: Path) -> None:
    folder = templates(tmp_path, "{% if cell.compiler -%}", "{% if cell.compiler")
    with pytest.raises(InputError, match=r"runtime-deps\.j2:\d+"):
        render(cell(), lock(cell()), templates=folder)


def test_a_missing_template_is_named(tmp_path: Path) -> None:
    folder = templates(tmp_path, "ARG BASE", "ARG BASE")
    (folder / "partials" / "users.j2").unlink()
    with pytest.raises(InputError, match=r"there is no template partials/users\.j2"):
        render(cell(), lock(cell()), templates=folder)


def test_check_names_the_file_and_write_repairs_it(tmp_path: Path) -> None:
    rendered: Rendered = render(cell(), lock(cell()))
    assert rendered.write(tmp_path) == ("Dockerfile", "requirements.lock", "cell.json")
    rendered.check(tmp_path)
    (tmp_path / "Dockerfile").write_text("FROM scratch\n")
    with pytest.raises(InputError) as raised:
        rendered.check(tmp_path)
    assert raised.value.where == str(tmp_path / "Dockerfile")
    assert "mtbuild render" in raised.value.fix
    assert rendered.write(tmp_path) == ("Dockerfile",)
    (tmp_path / "cell.json").unlink()
    with pytest.raises(InputError, match="is missing"):
        rendered.check(tmp_path)


def test_the_command_checks_and_writes(tmp_path: Path) -> None:
    for name in ("matrix.yaml", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "templates", tmp_path / "templates")
    folder = next(folder for folder in COMMITTED if "xf0.0.31-" in folder.name)
    shutil.copytree(folder, tmp_path / "images" / folder.name)

    def run(*words: str) -> Any:
        return CliRunner().invoke(cli, ["--root", str(tmp_path), "render", *words])

    assert run("--check").exit_code == 0
    (tmp_path / "images" / folder.name / "Dockerfile").write_text("FROM scratch\n")
    stale = run("--check")
    assert stale.exit_code == 2 and "is not what the templates and the lock render" in stale.stderr
    assert run("v73", "--json").stdout == f'{{"{folder.name}": ["Dockerfile"]}}\n'
    assert run("--check").exit_code == 0
    (tmp_path / "images" / "torch0-gone").mkdir()
    assert "matrix.yaml has no such cell" in run("--check").stderr


def test_every_wheel_is_in_exactly_one_layer() -> None:
    for folder in COMMITTED:
        frozen = Lock.load(folder)
        shared, own = wheel_groups(frozen)
        names = [wheel.name for group in (*shared, *own) for wheel in group.wheels]
        assert sorted(names) == [wheel.name for wheel in frozen.wheels]


def test_further_packages_have_a_layer_of_their_own() -> None:
    """A change of one leaves xformers' layer before it as it was."""
    plain, more = cell(), cell(packages=(("fa3-fwd", "0.0.2"),))
    (shared, own), (same, grown) = (
        wheel_groups(lock(plain)),
        wheel_groups(lock(more, **{"fa3-fwd": "0.0.2"})),
    )
    assert [group.title for group in shared] == [group.title for group in same]
    assert [group.title for group in own] == ["xformers", "what the runtime needs"]
    assert [group.title for group in grown] == [
        "xformers",
        "further packages of this cell",
        "what the runtime needs",
    ]
    assert [wheel.name for wheel in grown[1].wheels] == ["fa3-fwd"]
    assert "xformers 0.0.31, fa3-fwd 0.0.2, Python 3.11" in render(more, lock(more)).dockerfile


def test_cuts_stay_inside_their_packages() -> None:
    for name in ("torch", "triton", "xformers", "nvidia-cusolver-cu12", "nvidia-cudnn-cu12", "scipy"):
        for pattern in " ".join((*cut_of(name).remove, *cut_of(name).strip)).split():
            top = pattern.removeprefix("../../../bin/").split("/")[0]
            assert top in {name.split("-")[0], "proton*"}, pattern
