"""Properties that the rules keep for every input, and the parsers of what wheels say."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import lru_cache

import pytest
import recorded
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.tags import sys_tags
from packaging.version import Version
from recorded import CELLS, NEGATIVE, POSITIVE, V73

from mtbuild.plan import members
from mtbuild.plan.cell import Finding, Gpu
from mtbuild.plan.compat import RULES, is_buildable, judge, state_of
from mtbuild.plan.facts import CellFacts
from mtbuild.plan.floors import driver_floor, driver_reaches, numpy_window, toolkit_driver
from mtbuild.plan.index import Link
from mtbuild.plan.native import cudart_needed, sass_of
from mtbuild.plan.pairs import odds
from mtbuild.plan.reading import measured_releases
from mtbuild.plan.requires import wishes
from mtbuild.plan.rules_native import covers
from mtbuild.plan.tags import Target, best_wheel, pythons_of, version_of


@lru_cache(maxsize=1)
def facts() -> dict[str, CellFacts]:
    return recorded.load()


def link(filename: str) -> Link:
    return Link(filename=filename, url="", sha256=None, size=None, requires_python=None, yanked=False)


# ── tags ─────────────────────────────────────────────────────────────────────────────────────────

MINORS = st.integers(17, 45)
PYTHONS = st.sampled_from(["3.9", "3.10", "3.11", "3.12", "3.13"])
PLATFORMS = st.sampled_from(["linux/amd64", "linux/arm64"])


def target(python: str, glibc: int, platform: str = "linux/amd64") -> Target:
    return Target(python=python, platform=platform, glibc=f"2.{glibc}")


@given(PYTHONS, MINORS, MINORS, PLATFORMS)
def test_a_newer_c_library_takes_every_wheel_of_an_older_one(
    python: str, one: int, two: int, platform: str
) -> None:
    older, newer = sorted((one, two))
    assert target(python, older, platform).tags.keys() <= target(python, newer, platform).tags.keys()


@given(PYTHONS, MINORS, MINORS)
def test_a_wheel_is_taken_exactly_from_its_glibc_on(python: str, floor: int, have: int) -> None:
    here = target(python, have)
    name = f"thing-1.0-{here.interpreter}-{here.interpreter}-manylinux_2_{floor}_x86_64.whl"
    assert (best_wheel([link(name)], here) is not None) == (have >= floor)


@given(PYTHONS, MINORS)
def test_no_wheel_of_another_machine(python: str, glibc: int) -> None:
    assert (
        target(python, glibc, "linux/arm64")
        .tags.keys()
        .isdisjoint(tag for tag in target(python, glibc).tags if tag.platform != "any")
    )


def test_our_tags_are_packagings_own_for_this_host() -> None:
    """For the interpreter that runs the tests, packaging knows the answer."""
    import platform
    import sys

    name, version = platform.libc_ver()
    if name != "glibc" or platform.machine() != "x86_64":
        pytest.fail("the tests run on x86_64 Linux with glibc")
    here = Target(python=f"3.{sys.version_info.minor}", platform="linux/amd64", glibc=version)
    theirs = list(sys_tags())
    ours = sorted(here.tags, key=here.tags.__getitem__)
    assert ours == [tag for tag in theirs if tag in here.tags]
    assert set(theirs) - set(ours) == set()


def test_best_file_is_best_tag_then_highest_build() -> None:
    names = [
        "torch-2.10.0-cp311-cp311-manylinux_2_28_x86_64.whl",
        "torch-2.10.0-3-cp311-cp311-manylinux_2_28_x86_64.whl",
        "torch-2.10.0-12-cp311-cp311-manylinux_2_17_x86_64.whl",
        "torch-2.10.0-3-cp312-cp312-manylinux_2_28_x86_64.whl",
        "torch-2.10.0.tar.gz",
    ]
    for order in itertools.permutations(names):
        found = best_wheel([link(name) for name in order], target("3.11", 36))
        assert found is not None and found.filename == names[1]


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("torch-2.7.1-cp311-cp311-manylinux_2_28_x86_64.whl", "2.7.1"),
        ("torch-2.10.0-3-cp311-cp311-manylinux_2_28_x86_64.whl", "2.10.0"),
        ("torch-2.7.1+cu128-cp311-cp311-manylinux_2_28_x86_64.whl", "2.7.1+cu128"),
        ("flash_attn-2.8.3.post2.tar.gz", "2.8.3.post2"),
        ("strange.whl", None),
    ],
)
def test_version_of_a_file_name(name: str, version: str | None) -> None:
    assert version_of(name) == (Version(version) if version else None)


def test_pythons_of_an_abi3_wheel_end_at_what_is_released() -> None:
    files = [link("xformers-0.0.31-cp39-abi3-manylinux_2_28_x86_64.whl")]
    assert pythons_of(files, target("3.11", 36)) == ("3.9", "3.10", "3.11", "3.12", "3.13", "3.14")


# ── GPUs and drivers ─────────────────────────────────────────────────────────────────────────────

SM = st.sampled_from(["5.0", "6.0", "7.0", "7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0"])


@given(st.sets(SM, min_size=1), SM, SM)
def test_more_machine_code_never_loses_a_gpu(sass: set[str], more: str, gpu: str) -> None:
    assert covers(sass, gpu) <= covers(sass | {more}, gpu)


@given(st.sets(SM, min_size=1), SM)
def test_machine_code_runs_on_later_chips_of_its_generation_only(sass: set[str], gpu: str) -> None:
    major, minor = gpu.split(".")
    expected = any(code.split(".")[0] == major and int(code.split(".")[1]) <= int(minor) for code in sass)
    assert covers(sass, gpu) == expected


@pytest.mark.parametrize(
    ("sass", "sm", "fits"),
    [(["9.0a"], "9.0", True), (["10.0a"], "10.3", False), (["8.0"], "8.9", True), (["8.6"], "8.0", False)],
)
def test_arch_specific_code_runs_on_its_chip_only(sass: list[str], sm: str, fits: bool) -> None:
    assert covers(sass, sm) == fits


def test_measured_table_agrees_with_itself() -> None:
    """Never an older GPU comes back, never a newer one goes."""
    ordered = [
        set(sass) for _, sass in sorted(measured_releases().items(), key=lambda item: Version(item[0]))
    ]
    assert len(ordered) > 20
    for older, newer in itertools.pairwise(ordered):
        lowest = min(newer, key=Version)
        assert {sm for sm in older if Version(sm) >= Version(lowest)} <= newer


DRIVERS = st.builds(lambda a, b: f"{a}.{b}", st.integers(450, 700), st.integers(10, 99))


@given(DRIVERS, DRIVERS, st.sampled_from(["525", "580", "570.26", "580.65.06"]))
def test_a_newer_driver_reaches_whatever_an_older_one_does(one: str, two: str, floor: str) -> None:
    older, newer = sorted((one, two), key=Version)
    assert driver_reaches(older, floor) <= driver_reaches(newer, floor)


def test_driver_floor_is_the_highest_of_all() -> None:
    assert driver_floor(cuda="12.8") == driver_floor(cuda="12.1", extensions=("12.9",))
    assert (driver_floor(cuda="12.8") or ("",))[0] == "525"
    assert (driver_floor(cuda="12.8", extensions=("13.0",)) or ("",))[0] == "580"
    # Triton 3.9 takes its second ptxas, of CUDA 13, from compute capability 9.0 on
    assert (driver_floor(cuda="12.8", triton="3.9.0", sm="9.0") or ("",))[0] == "580"
    assert (driver_floor(cuda="12.8", triton="3.9.0", sm="8.9") or ("",))[0] == "525"
    assert driver_floor(cuda=None) is None
    assert driver_reaches("580.65", "580.65.06") and not driver_reaches("580.64", "580.65.06")
    assert (toolkit_driver("12.6") or ("",))[0] == "560.28.03" and toolkit_driver("99.9") is None


def test_an_older_driver_of_the_same_family_is_only_noted() -> None:
    cell = replace(V73, smoke_on=(Gpu(name="A100", sm="8.0", driver="535.104"),))
    (finding,) = judge(cell, facts()["v73"])
    assert (finding.rule, finding.severity) == ("driver", "note")
    assert state_of(cell, (finding,)) == "planned"


# ── what wheels say ──────────────────────────────────────────────────────────────────────────────


@given(st.binary(max_size=3000), st.integers(65, 400), st.sampled_from([11, 12, 13]))
def test_a_needed_runtime_is_found_wherever_the_pieces_break(noise: bytes, size: int, major: int) -> None:
    head = b"\x7fELF" + b"\0" * 60  # no program headers: nothing bounds the search
    data = head + noise.replace(b"libcudart", b"") + f"\0libcudart.so.{major}\0".encode() + noise
    found = cudart_needed(data[i : i + size] for i in range(0, len(data), size))
    assert found == f"libcudart.so.{major}"


@given(st.integers(1, 64), st.binary(max_size=200))
def test_architectures_are_found_wherever_the_pieces_break(size: int, noise: bytes) -> None:
    data = noise + b"hsm_70 sm_80 sm_100a compute_90\0" + noise
    assert sass_of(data[i : i + size] for i in range(0, len(data), size)) == ("7.0", "8.0", "10.0a")


def test_no_elf_no_answer() -> None:
    assert cudart_needed([b"#!/bin/sh\n" + b"x" * 100]) is None
    assert cudart_needed([]) is None
    assert sass_of([b"nothing"]) == ()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("try:\n import f\n FLASH_VER_MIN = (2, 5, 2)"
         "\n FLASH_VER_LAST = (2, 5, 6)\nexcept ImportError:\n pass",
         ("2.5.2", "2.5.6", True)),
        ('if x:\n V = 1\nelif y:\n FLASH_VER_MIN = parse_version("2.7.1")'
         '\n FLASH_VER_LAST = parse_version("2.8.4")',
         ("2.7.1", "2.8.4", False)),
        ("try:\n if flash_ver_parsed != (2, 3, 6) and x:\n  raise ImportError\nexcept ImportError:\n pass",
         ("2.3.6", "2.3.6", True)),
        ("try:\n FLASH_VER_MIN = (2, 7, 1)\n FLASH_VER_LAST = (2, 8, 0)\nexcept ValueError:\n pass",
         ("2.7.1", "2.8.0", False)),
        ("FLASH_VERSION = '0.0.0'", None),
        ("def broken(:", None),
    ],
)  # fmt: skip
def test_flash_window(source: str, expected: tuple[str, str, bool] | None) -> None:
    found = members.flash_window(source)
    assert (found and (found.first, found.last, found.guarded)) == expected


def test_version_files() -> None:
    assert members.torch_cuda("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n") == (
        "2.13.0+cpu",
        None,
    )
    assert members.torch_cuda("__version__ = '2.1.2+cu121'\ncuda = '12.1'\n") == ("2.1.2+cu121", "12.1")
    assert members.cpp_lib('{"version": {"cuda": null, "torch": null}}') is None
    assert members.cpp_lib("no json") is None


@pytest.mark.parametrize(
    ("line", "python", "applies"),
    [
        ('triton==2.3.1; platform_system == "Linux" and python_version < "3.12"', "3.11", True),
        ('triton==2.3.1; platform_system == "Linux" and python_version < "3.12"', "3.12", False),
        ('pytest; extra == "test"', "3.11", False),
        ('importlib-metadata; python_version < "3.10"', "3.9", True),
        ('thing; sys_platform == "win32"', "3.11", False),
        ("torch ==2.1.2", "3.11", True),
    ],
)
def test_markers_are_the_cells_not_this_machines(line: str, python: str, applies: bool) -> None:
    (wish,) = wishes([line], target(python, 36))
    assert wish.applies == applies


# ── the rules together ───────────────────────────────────────────────────────────────────────────


@settings(max_examples=60)
@given(st.sampled_from(sorted(CELLS)), st.permutations(range(len(RULES))))
def test_no_rule_depends_on_another(name: str, order: list[int]) -> None:
    cell = CELLS[name]
    shuffled = {finding for index in order for finding in RULES[index](cell, facts()[name])}
    assert shuffled == set(judge(cell, facts()[name]))


@given(st.sampled_from(sorted(CELLS)), st.sets(SM))
def test_fewer_targets_never_make_a_cell_worse(name: str, dropped: set[str]) -> None:
    cell = CELLS[name]
    fewer = replace(cell, targets=tuple(target for target in cell.targets if target not in dropped))
    assert set(judge(fewer, facts()[name])) <= set(judge(cell, facts()[name]))


@pytest.mark.parametrize("name", sorted(CELLS))
def test_every_finding_says_what_why_and_what_to_do(name: str) -> None:
    for finding in judge(CELLS[name], facts()[name]):
        assert finding.message and finding.source and finding.fix
        assert "None" not in finding.message + finding.fix


@pytest.mark.parametrize("name", sorted({*POSITIVE} - {"numpy1"}))
def test_any_positive_cell_without_a_compiler_is_refused_for_that_alone(name: str) -> None:
    (finding,) = judge(replace(POSITIVE[name], compiler=False), facts()[name])
    assert finding.rule == "compiler"


def test_foreign_pairs_of_real_releases_are_judged_without_a_table() -> None:
    """Every torch recorded against every xFormers recorded: those built for each other fit, no others."""
    wheels = {w.filename: w for one in facts().values() for w in (*one.wheels, *one.alternatives)}.values()
    torches = [w for w in wheels if w.name == "torch"]
    native = [w for w in wheels if w.name == "xformers" and w.cpp_lib is not None]
    assert len(torches) > 12 and len(native) > 12
    for torch, xformers in itertools.product(torches, native):
        built = xformers.cpp_lib
        assert built is not None and built.cuda is not None and torch.cuda is not None
        same_torch = Version(built.torch).base_version == Version(torch.version).base_version
        same_cuda = Version(built.cuda).major == Version(torch.cuda).major
        fits = not odds(torch, xformers)
        assert fits == (same_torch and same_cuda), (torch.filename, xformers.filename)


def test_cuda_of_the_cell_must_be_the_wheels() -> None:
    cell = replace(V73, cuda="12.8")
    (finding,) = judge(cell, facts()["v73"])
    assert (finding.rule, finding.fix) == ("cuda", 'write cuda: "12.6"')
    assert "torch 2.7.1 of this index is built for CUDA 12.6" in finding.message


def test_degraded_needs_leave() -> None:
    findings = (Finding(rule="cudart", severity="degraded", message="m", source="s", fix="f"),)
    assert not is_buildable(V73, findings)
    assert is_buildable(replace(V73, allow=("degraded",)), findings)
    assert state_of(V73, ()) == "planned"


def test_numpy_window() -> None:
    assert numpy_window("2.1.2") != numpy_window("2.7.1")
    assert {numpy_window(torch)[0] for torch in ("2.1.2", "2.7.1", "2.15.0")} == {"<2"}
    assert "N21" in NEGATIVE
