"""The ladder to a wheel's facts, against local servers that lack each rung."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import recorded
from local_index import LocalIndex, serve, wheel

from mtbuild.errors import InfrastructureError, InputError
from mtbuild.plan.facts import gather
from mtbuild.plan.fetch import Fetcher
from mtbuild.plan.index import Index
from mtbuild.plan.index_settings import IndexSettings, Source
from mtbuild.plan.wheels import Wheels

if TYPE_CHECKING:
    from pathlib import Path

HERE = {"python": "3.11", "platform": "linux/amd64", "glibc": "2.36"}
FLASH = """
try:
    import flash_attn
    FLASH_VER_MIN = (2, 7, 1)
    FLASH_VER_LAST = (2, 7, 4)  # last supported, inclusive
except ImportError:
    pass
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A real shared object that NEEDs libcudart.so.12, made by the C compiler of this machine."""
    folder = tmp_path_factory.mktemp("library")
    (folder / "empty.c").write_text("int cudaNothing(void) { return 0; }\n")
    (folder / "code.c").write_text("int cudaNothing(void);\nint work(void) { return cudaNothing(); }\n")
    for words in (
        ["-o", "libcudart.so.12", "-Wl,-soname,libcudart.so.12", "empty.c"],
        ["-o", "_C.so", "code.c", "-L.", "-l:libcudart.so.12"],
    ):
        subprocess.run(["cc", "-shared", "-fPIC", *words], cwd=folder, check=True, timeout=60)
    return (folder / "_C.so").read_bytes()


@pytest.fixture
def files(library: bytes) -> dict[str, bytes]:
    noise = os.urandom(300_000)  # not compressible, so that reading a part is told from reading the whole
    cpp = {"version": {"cuda": 1208, "torch": "2.7.1+cu126"}, "env": {"TORCH_CUDA_ARCH_LIST": "8.0+PTX 9.0a"}}
    made = [
        wheel(
            "xformers",
            "0.0.31",
            {
                "xformers/__init__.py": "",
                "xformers/big.bin": noise,
                "xformers/_C.so": library,
                "xformers/cpp_lib.json": json.dumps(cpp),
                "xformers/ops/fmha/flash.py": FLASH,
            },
            requires=["torch==2.7.1", "numpy"],
            tag="cp39-abi3-manylinux_2_28_x86_64",
        ),
        wheel(
            "torch",
            "2.7.1",
            {
                "torch/version.py": "__version__ = '2.7.1+cu126'\ncuda: Optional[str] = '12.6'\n",
                "torch/lib/libtorch_python.so": noise + b"hsm_80 sm_90 sm_100a compute_90\0" + noise,
                "torch/lib/libtorch_global_deps.so": library,
            },
            requires=['triton==3.3.1; platform_system == "Linux"'],
            tag="cp311-cp311-manylinux_2_28_x86_64",
        ),
        wheel("hollow", "0.0.0", {}, requires=[], tag="py3-none-any"),
    ]
    return dict(made)


def wheels_of(server: LocalIndex, cache: Path, said: list[str] | None = None) -> Wheels:
    settings = IndexSettings(
        sources=(Source.of(f"{server.url}/simple", origin="test"),),
        default_is_builtin=False,
        ca_file=None,
        ca_dir=None,
        notes=(),
    )
    index = Index(settings, cache=cache, fetcher=Fetcher(settings, backoff_s=0.01))
    return Wheels(index, cache, (said if said is not None else []).append)


def check(facts: object) -> None:
    assert facts.requires_dist == ("torch==2.7.1", "numpy")  # type: ignore[attr-defined]
    assert facts.cpp_lib.torch == "2.7.1+cu126"  # type: ignore[attr-defined]
    assert facts.cpp_lib.cuda == "12.8"  # type: ignore[attr-defined]
    assert facts.needed_cudart == (("xformers/_C.so", "libcudart.so.12"),)  # type: ignore[attr-defined]
    window = facts.flash_window  # type: ignore[attr-defined]
    assert (window.first, window.last, window.guarded) == ("2.7.1", "2.7.4", True)


# what the server has → (which rungs are climbed, whether the whole wheel is read)
@pytest.mark.parametrize(
    ("metadata", "ranges", "whole"),
    [
        (True, "all", False),
        (False, "all", False),
        (True, "no-suffix", False),
        (True, "none", True),
        (False, "none", True),
    ],
)
def test_every_rung(
    files: dict[str, bytes], tmp_path: Path, metadata: bool, ranges: str, whole: bool
) -> None:
    said: list[str] = []
    with serve(LocalIndex(files=files, metadata=metadata, ranges=ranges)) as server:
        wheels = wheels_of(server, tmp_path, said)
        facts = wheels.facts("xformers", "0.0.31", **HERE)
        size = len(files[facts.filename])
        assert server.paths(".metadata"), "PEP 658 is tried even where it isn't advertised"
    check(facts)
    assert facts.size == size
    assert bool([text for text in said if "0.3 MB" in text and "whole wheel" in text]) == whole
    assert (wheels.bytes > size) == whole
    assert not list(tmp_path.glob(".whole-*")), "the whole wheel is not kept"


def test_torch_and_placeholder(files: dict[str, bytes], tmp_path: Path) -> None:
    with serve(LocalIndex(files=files)) as server:
        wheels = wheels_of(server, tmp_path)
        torch = wheels.facts("torch", "2.7.1", **HERE)
        hollow = wheels.facts("hollow", "0.0.0", **HERE)
    assert (torch.local_version, torch.cuda) == ("2.7.1+cu126", "12.6")
    assert torch.sass == ("8.0", "9.0", "10.0a")
    assert torch.sass_source == "read from torch/lib/libtorch_python.so"
    assert torch.needed_cudart[0][1] == "libcudart.so.12"
    assert torch.unpacked_size is not None and torch.unpacked_size > 600_000
    assert (hollow.empty, torch.empty) == (True, False)


def test_facts_are_kept_by_hash(files: dict[str, bytes], tmp_path: Path) -> None:
    with serve(LocalIndex(files=files)) as server:
        first = wheels_of(server, tmp_path).facts("xformers", "0.0.31", **HERE)
    again = wheels_of(server, tmp_path)  # the server is gone
    assert again.facts("xformers", "0.0.31", **HERE) == first
    assert (again.bytes, again.read) == (0, 0)


def test_nothing_is_kept_of_a_file_without_hash(files: dict[str, bytes], tmp_path: Path) -> None:
    with serve(LocalIndex(files=files, hashes=False)) as server:
        check(wheels_of(server, tmp_path).facts("xformers", "0.0.31", **HERE))
        again = wheels_of(server, tmp_path)
        again.facts("xformers", "0.0.31", **HERE)
        assert again.read == 1


def test_each_wheel_is_read_once_by_many_threads(files: dict[str, bytes], tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with serve(LocalIndex(files=files)) as server:
        wheels = wheels_of(server, tmp_path)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: wheels.facts("xformers", "0.0.31", **HERE), range(16)))
        assert wheels.read == 1
        assert len(server.paths("/simple/xformers/")) == 1
    assert len({id(one) for one in found}) == 1


def test_flaky_server_is_tried_again(files: dict[str, bytes], tmp_path: Path) -> None:
    with serve(LocalIndex(files=files, failures=3)) as server:
        check(wheels_of(server, tmp_path).facts("xformers", "0.0.31", **HERE))


def test_failing_server_is_one_clear_error(files: dict[str, bytes], tmp_path: Path) -> None:
    with serve(LocalIndex(files=files, failures=99)) as server:
        with pytest.raises(InfrastructureError, match=r"after 5 attempts: HTTP status 503") as caught:
            wheels_of(server, tmp_path).facts("xformers", "0.0.31", **HERE)
        assert "nothing was changed" in caught.value.fix
    assert not list((tmp_path / "pages").glob("*")) if (tmp_path / "pages").exists() else True


def test_metadata_with_another_hash_is_not_believed(files: dict[str, bytes], tmp_path: Path) -> None:
    said: list[str] = []
    with serve(LocalIndex(files=files, wrong_metadata=True)) as server:
        check(wheels_of(server, tmp_path, said).facts("xformers", "0.0.31", **HERE))
    assert any("another hash" in text for text in said)


def test_whole_wheel_with_another_hash_is_an_error(files: dict[str, bytes], tmp_path: Path) -> None:
    with serve(LocalIndex(files=files, ranges="none")) as server:
        wheels = wheels_of(server, tmp_path)
        wheels.index.links("xformers")
        name = next(name for name in files if name.startswith("xformers"))
        files[name] = wheel(
            "xformers", "0.0.31", {"xformers/__init__.py": "evil"}, requires=[], tag="py3-none-any"
        )[1]
        with pytest.raises(InfrastructureError, match="but the index says"):
            wheels.facts("xformers", "0.0.31", **HERE)


@pytest.mark.parametrize(
    ("project", "version", "python", "words"),
    [
        ("xformers", "0.0.33", "3.11", "the index has no xformers 0.0.33. Did you mean '0.0.31'?"),
        ("xfromers", "0.0.31", "3.11", "the index has no project 'xfromers'"),
        ("torch", "2.7.1", "3.12", "torch 2.7.1 has no wheel for cp312"),
        ("torch", "two", "3.11", "neither a version nor a version range"),
    ],
)
def test_bad_pins_are_input_errors(
    files: dict[str, bytes], tmp_path: Path, project: str, version: str, python: str, words: str
) -> None:
    with serve(LocalIndex(files=files)) as server, pytest.raises(InputError) as caught:
        wheels_of(server, tmp_path).facts(
            project, version, python=python, platform="linux/amd64", glibc="2.36"
        )
    assert words in str(caught.value)
    assert caught.value.fix


def test_a_cells_unknown_version_names_its_place_in_the_matrix(
    files: dict[str, bytes], tmp_path: Path
) -> None:
    cell = replace(recorded.V73, torch="2.7.2", where="matrix.yaml:12")
    with serve(LocalIndex(files=files)) as server, pytest.raises(InputError) as caught:
        gather(cell, wheels_of(server, tmp_path))
    assert str(caught.value).startswith(
        "matrix.yaml:12 torch: the index has no torch 2.7.2. Did you mean '2.7.1'?"
    )


def test_the_whole_wheel_is_also_judged(files: dict[str, bytes], tmp_path: Path) -> None:
    """Facts are the same whichever rung they came from."""
    found = []
    for ranges in ("all", "none"):
        with serve(LocalIndex(files=files, ranges=ranges)) as server:
            found.append(wheels_of(server, tmp_path / ranges).facts("xformers", "0.0.31", **HERE))
    assert found[0] == found[1]
