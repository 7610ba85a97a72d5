"""Locks: resolved by uv against a real index on loopback, one best wheel a package, no address in a file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from local_index import LocalIndex, serve, wheel

from mtbuild.cli import cli
from mtbuild.errors import InfrastructureError, InputError
from mtbuild.plan.cell import Base, Cell
from mtbuild.plan.index import Index
from mtbuild.plan.index_settings import IndexSettings, Source
from mtbuild.plan.lock import Lock, LockedWheel, LockInputs, check, make_lock, runtime_requirements
from mtbuild.plan.matrix import load

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[3]
LINUX = "cp311-cp311-manylinux_2_28_x86_64"
BOOKWORM = Base(name="bookworm", kind="bootstrap", glibc="2.36", python=("3.11",), suite="bookworm")


def cell(**changes: Any) -> Cell:
    values: dict[str, Any] = {
        "name": "t210",
        "flavour": "runtime-deps",
        "base": BOOKWORM,
        "python": "3.11",
        "torch": "2.10.0",
        "cuda": "12.8",
        "triton": "3.6.0",
        "xformers": "0.0.35",
        "compiler": True,
        "where": "matrix.yaml:7",
    }
    return Cell(**{**values, **changes})


@pytest.fixture(scope="module")
def served() -> Iterator[LocalIndex]:
    """Small wheels with the real ones' names, requirements and traps."""
    made = [
        wheel("triton", "3.6.0", {"triton/a.py": ""}, requires=[], tag=LINUX),
        wheel("xformers", "0.0.35", {"xformers/a.py": ""}, requires=["torch>=2.10", "numpy"], tag=LINUX),
        wheel("xformers", "0.0.23.post1", {"xformers/a.py": "1"}, requires=["torch==2.1.2"], tag=LINUX),
        wheel("numpy", "1.26.4", {"numpy/a.py": ""}, requires=[], tag=LINUX),
        wheel("numpy", "2.4.6", {"numpy/a.py": ""}, requires=[], tag=LINUX),
        wheel("small", "1.0", {"small/a.py": ""}, requires=['colorama; sys_platform == "win32"'], tag=LINUX),
        wheel("small", "1.0", {"small/a.py": "any"}, requires=[], tag="py3-none-any"),
        wheel("future", "1.0", {"future/a.py": ""}, requires=[], tag="cp311-cp311-manylinux_2_39_x86_64"),
    ]
    index = LocalIndex(files=dict(made))
    for build in ("", "1-", "3-"):  # one version, three files: the highest build number is the one
        name, data = wheel(
            "torch", "2.10.0", {"torch/build.txt": build}, requires=["triton==3.6.0"], tag=LINUX
        )
        index.files[name.replace("2.10.0-", f"2.10.0-{build}")] = data
    with serve(index) as running:
        yield running


@pytest.fixture
def index(served: LocalIndex) -> Index:
    return Index(
        IndexSettings(
            sources=(Source.of(f"{served.url}/simple/", origin="test"),),
            ca_file=None,
            ca_dir=None,
            notes=(),
            default_is_builtin=False,
        )
    )


def test_one_wheel_a_package_and_of_three_builds_the_highest(index: Index, served: LocalIndex) -> None:
    lock = make_lock(cell(), index=index, runtime=["small"])
    assert [f"{w.name} {w.version}" for w in lock.wheels] == [
        "numpy 1.26.4",
        "small 1.0",
        "torch 2.10.0",
        "triton 3.6.0",
        "xformers 0.0.35",
    ]
    torch = lock.wheel("torch")
    assert torch is not None
    assert torch.filename == f"torch-2.10.0-3-{LINUX}.whl"
    assert torch.sha256 == hashlib.sha256(served.files[torch.filename]).hexdigest()
    assert torch.size == len(served.files[torch.filename])
    small = lock.wheel("small")
    assert small is not None and small.filename.endswith(f"{LINUX}.whl")  # better than py3-none-any


def test_a_package_by_no_deps_comes_without_what_it_asks_for(index: Index) -> None:
    study = cell(xformers="0.0.23.post1", no_deps=("xformers",))
    lock = make_lock(study, index=index)
    assert {w.name: w.version for w in lock.wheels}["xformers"] == "0.0.23.post1"
    assert {w.name: w.version for w in lock.wheels}["torch"] == "2.10.0"


def test_what_does_not_fit_is_refused_in_uvs_own_words(index: Index) -> None:
    with pytest.raises(InputError) as raised:
        make_lock(cell(xformers="0.0.23.post1"), index=index)
    assert "depends on torch==2.1.2" in raised.value.message
    assert raised.value.where == "matrix.yaml:7"
    assert "mtbuild suggest --torch 2.10.0" in raised.value.fix


def test_a_version_that_no_index_has(index: Index) -> None:
    """The error names the very key, and what the index has near it; with `no_deps` as without."""
    for changes, said, has in (
        ({"torch": "2.99"}, "the index has no torch 2.99.", "2.10.0"),
        ({"torch": "2.10.1"}, "the index has no torch 2.10.1. Did you mean '2.10.0'?", "2.10.0"),
        ({"xformers": "0.0.36", "no_deps": ("xformers",)}, "the index has no xformers 0.0.36.", "0.0.35"),
        ({"packages": (("Small", "2.0"),)}, "the index has no small 2.0.", "1.0"),
        ({"packages": (("nowhere", "2.0"),)}, "the index has no project 'nowhere'", "correct its name"),
    ):
        name = next(name for name in ("packages", "torch", "xformers") if name in changes)
        name = str(changes[name][0][0]).lower() if name == "packages" else name
        places = (("triton", "matrix.yaml:9"), (name, f"matrix.yaml:8 cells[3].{name}"))
        with pytest.raises(InputError) as caught:
            make_lock(cell(**changes, places=places), index=index)
        assert caught.value.where == f"matrix.yaml:8 cells[3].{name}"
        assert caught.value.message.startswith(said)
        assert has in caught.value.fix


def test_a_wheel_for_a_newer_c_library_is_refused(index: Index) -> None:
    with pytest.raises(InputError, match="future"):
        make_lock(cell(), index=index, runtime=["future"])


def test_an_index_that_is_away_is_not_the_users_mistake(index: Index) -> None:
    gone = Index(
        IndexSettings(
            sources=(Source.of("http://127.0.0.1:9/simple/", origin="test"),),
            ca_file=None,
            ca_dir=None,
            notes=(),
            default_is_builtin=False,
        )
    )
    with pytest.raises(InfrastructureError, match="can't resolve t210"):
        make_lock(cell(), index=gone)


def test_no_file_holds_an_address(index: Index, served: LocalIndex, tmp_path: Path) -> None:
    make_lock(cell(), index=index, runtime=["small"]).write(tmp_path)
    for file in tmp_path.iterdir():
        assert not re.search(r"[a-z]{3,}://", file.read_text())
        assert "127.0.0.1" not in file.read_text()


def test_written_and_loaded_it_is_the_same(index: Index, tmp_path: Path) -> None:
    lock = make_lock(cell(), index=index, runtime=["small"])
    lock.write(tmp_path)
    assert Lock.load(tmp_path) == lock
    check(cell(), tmp_path, runtime=["small"])
    again = make_lock(cell(), index=index, runtime=["small"])
    assert again == lock


@pytest.mark.parametrize(
    ("changes", "runtime", "said"),
    [
        ({"torch": "2.9.1"}, ["small"], "pins was torch==2.10.0, now it is torch==2.9.1"),
        ({"base": dataclasses.replace(BOOKWORM, glibc="2.28")}, ["small"], "glibc was 2.36, now it is 2.28"),
        ({"no_deps": ("xformers",)}, ["small"], "no_deps was without that, now it is xformers"),
        ({}, ["small>=2"], "requirements was small, now it is small>=2"),
    ],
)
def test_an_out_of_date_lock_names_file_difference_and_fix(
    index: Index, tmp_path: Path, changes: dict[str, Any], runtime: list[str], said: str
) -> None:
    made = make_lock(cell(), index=index, runtime=["small"])
    wanted = cell(**changes)
    dataclasses.replace(made, cell_id=wanted.id).write(tmp_path)
    with pytest.raises(InputError) as raised:
        check(wanted, tmp_path, runtime=runtime)
    assert said in raised.value.message
    assert raised.value.where == str(tmp_path / "cell.json")
    assert raised.value.fix.startswith("run `mtbuild lock t210`")
    assert raised.value.exit_code == 2


def test_a_lock_edited_by_hand_is_refused(index: Index, tmp_path: Path) -> None:
    make_lock(cell(), index=index).write(tmp_path)
    file = tmp_path / "requirements.lock"
    file.write_text(file.read_text().replace("sha256:", "sha256:0", 1))
    with pytest.raises(InputError, match="does not agree with"):
        Lock.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1}', '{"schema": 2}'])
def test_a_broken_cell_json_is_an_input_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "cell.json").write_text(text)
    with pytest.raises(InputError) as raised:
        Lock.load(tmp_path)
    assert str(tmp_path / "cell.json") in str(raised.value)


def test_no_lock_at_all(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no lock for this cell"):
        Lock.load(tmp_path / "nothing")


@pytest.mark.parametrize("triton", ["2.0.0", "2.1.0", "3.0.0", "3.2.0", "3.3.0"])
def test_what_a_wheel_imports_and_does_not_ask_for_is_locked(triton: str) -> None:
    """Triton 3.2.0 in an image without setuptools: `import triton` ends with ModuleNotFoundError."""
    asked = LockInputs.of(cell(triton=triton), ["small"]).requirements
    assert ("setuptools" in asked) is (triton != "3.3.0")


def test_minimal_cells_lock_nothing(index: Index) -> None:
    assert make_lock(cell(flavour="minimal"), index=index, runtime=["small"]).wheels == ()


def test_the_runtime_may_not_bring_torch(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "x"\ndependencies = ["Torch>=2"]\n')
    with pytest.raises(InputError, match="torch must come from the cell"):
        runtime_requirements(tmp_path)


NAMES = st.from_regex(r"[a-z]{1,8}", fullmatch=True)
HEX = st.text("0123456789abcdef", min_size=64, max_size=64)


@given(
    st.lists(
        st.builds(
            LockedWheel,
            name=NAMES,
            version=st.from_regex(r"[0-9]\.[0-9]", fullmatch=True),
            filename=NAMES,
            sha256=HEX,
            size=st.integers(0, 10**10),
            unpacked_size=st.none() | st.integers(0, 10**10),
        ),
        max_size=5,
    )
)
def test_any_lock_survives_its_files(
    tmp_path_factory: pytest.TempPathFactory, wheels: list[LockedWheel]
) -> None:
    folder = tmp_path_factory.mktemp("lock")
    lock = Lock(cell_id="x", wheels=tuple(wheels), inputs=LockInputs.of(cell(), ["numpy"]))
    lock.write(folder)
    assert Lock.load(folder) == lock


# --- what is committed ---------------------------------------------------------------------------------


def committed() -> list[Path]:
    return sorted(folder for folder in (ROOT / "images").iterdir() if folder.is_dir())


def test_the_default_cells_are_locked() -> None:
    there = {folder.name for folder in committed()}
    matrix = load(ROOT / "matrix.yaml")
    assert {cell.id for cell in matrix.cells if cell.base.kind == "bootstrap"} <= there


@pytest.mark.parametrize("folder", committed(), ids=lambda folder: folder.name)
def test_committed_locks_are_up_to_date_and_hold_one_hash_a_package(folder: Path) -> None:
    one = next(cell for cell in load(ROOT / "matrix.yaml").cells if cell.id == folder.name)
    check(one, folder, runtime=runtime_requirements(ROOT))
    lines = [line for line in (folder / "requirements.lock").read_text().splitlines() if line[0] != "#"]
    names = [line.partition("==")[0] for line in lines]
    assert len(names) == len(set(names)) > 3
    assert all(re.fullmatch(r"[a-z0-9-]+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)
    for file in folder.iterdir():
        assert not re.search(r"[a-z]{3,}://", file.read_text())
    data = json.loads((folder / "cell.json").read_text())
    assert data["unpacked_bytes"] > data["download_bytes"] > 10**9


@pytest.mark.parametrize("name", ["t241", "t260"])
def test_old_tritons_come_with_setuptools(name: str) -> None:
    assert Lock.load(ROOT / "images" / load(ROOT / "matrix.yaml").cell(name).id).wheel("setuptools")


def test_torch_2_10_0_is_locked_to_its_third_build() -> None:
    lock = Lock.load(next(folder for folder in committed() if folder.name.startswith("torch2.10.0-")))
    torch = lock.wheel("torch")
    assert torch is not None and torch.filename.startswith("torch-2.10.0-3-")


def test_the_command_says_what_is_stale(tmp_path: Path) -> None:
    text = (ROOT / "matrix.yaml").read_text()
    (tmp_path / "matrix.yaml").write_text(text.replace('torch: "2.7.1"', 'torch: "2.7.0"', 2))
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    old = next(folder for folder in committed() if "xf0.0.31-" in folder.name)
    new = tmp_path / "images" / old.name.replace("2.7.1", "2.7.0")
    new.mkdir(parents=True)
    for file in old.iterdir():
        (new / file.name).write_bytes(file.read_bytes())
    result = CliRunner().invoke(cli, ["--root", str(tmp_path), "lock", "--check", "v73"])
    assert result.exit_code == 2
    assert str(new / "cell.json") in result.stderr
    assert "fix: run `mtbuild lock v73`" in result.stderr
