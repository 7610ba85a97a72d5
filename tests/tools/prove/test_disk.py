"""Free space before a build: on real file systems, with locks that fit and locks that can't."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mtbuild.plan.lock import Lock, LockedWheel, LockInputs
from mtbuild.prove.disk import NotEnoughSpace, needs, outlook, preflight

SHM = Path("/dev/shm")


def lock(*sizes: int) -> Lock:
    wheels = tuple(
        LockedWheel(
            name=f"package{number}",
            version="1.0",
            filename=f"package{number}-1.0-py3-none-any.whl",
            sha256=f"{number:064x}",
            size=size,
            unpacked_size=2 * size,
        )
        for number, size in enumerate(sizes)
    )
    inputs = LockInputs(
        flavour="runtime-deps",
        platform="linux/amd64",
        python="3.11",
        glibc="2.36",
        pins=(),
        no_deps=(),
        requirements=(),
    )
    return Lock(cell_id="cell", name="v70", wheels=wheels, inputs=inputs)


def test_a_build_that_fits_goes_on(tmp_path: Path) -> None:
    preflight(lock(1000), tmp_path, wheels=tmp_path / "not" / "there", built=["x"], reserve=0)


def test_a_build_that_can_t_fit_says_how_much_is_missing_where_and_what_can_go(tmp_path: Path) -> None:
    cache = tmp_path / "wheels"
    (cache / ("f" * 64)).mkdir(parents=True)
    with (cache / ("f" * 64) / "other-1.0.whl").open("wb") as file:
        file.truncate(3_000_000_000)  # sparse: takes no space, counts as what it says
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(NotEnoughSpace) as raised:
        preflight(lock(10**15), tmp_path, wheels=cache, registry=tmp_path / "registry")
    error = raised.value
    assert error.exit_code == 3
    assert error.missing == pytest.approx(10**15 * (1 + 4 + 1.1 + 1 + 1.1) - free, rel=0.01)
    assert f"missing on the file system of {tmp_path}" in error.message
    assert "v70 needs" in error.message and "wheels to download" in error.message
    assert f"wheels of other cells under {cache} (3.0 GB)" in error.fix
    assert "mtbuild engine prune" in error.fix and "MTBUILD_CACHE" in error.fix


def test_each_file_system_is_asked_for_its_own_part(tmp_path: Path) -> None:
    if SHM.stat().st_dev == tmp_path.stat().st_dev:
        pytest.fail("this test needs /dev/shm to be a file system of its own")
    room = shutil.disk_usage(SHM).free
    with pytest.raises(NotEnoughSpace) as raised:
        preflight(lock(room * 2), tmp_path, wheels=SHM / "wheels", reserve=0, built=[])
    # what is missing is on the small one, and only the download is charged to it
    if raised.value.folder == SHM:
        assert raised.value.missing == pytest.approx(room, rel=0.1)
    assert "1 wheel" not in raised.value.message


def test_wheels_that_are_there_or_built_are_not_counted(tmp_path: Path) -> None:
    frozen = lock(1000, 2000)
    cache = tmp_path / "wheels"
    there = frozen.wheels[1]
    (cache / there.sha256).mkdir(parents=True)
    (cache / there.sha256 / there.filename).write_bytes(b"x")
    by = {need.purpose: need.size for need in needs(frozen, tmp_path, wheels=cache, built=["other"])}
    assert by["wheels to download"] == 1000
    assert by["wheels for the build"] == 3000
    by = {
        need.purpose: need.size
        for need in needs(frozen, tmp_path, wheels=cache, built=[frozen.wheels[0].sha256])
    }
    assert "wheels to download" not in by
    assert by["wheels for the build"] == 2000
    assert by["layers, and their unpacked copy to run"] == 2 * 4000


def test_an_unknown_unpacked_size_is_estimated() -> None:
    frozen = Lock(
        cell_id="cell",
        inputs=lock().inputs,
        wheels=(
            LockedWheel(name="a", version="1", filename="a-1-py3-none-any.whl", sha256="0" * 64, size=100),
        ),
    )
    assert frozen.unpacked_bytes == 190


def test_the_plan_of_several_builds_counts_what_they_share_once(tmp_path: Path) -> None:
    one = 10**9
    (line,) = outlook([lock(one), lock(one)], tmp_path)
    first = sum(need.size for need in needs(lock(one), tmp_path))
    assert line.startswith(
        f"disk plan: v70 {first / one:.1f} GB; {first / one + 1:.1f} GB in all at {tmp_path}, "
    )
    (full,) = outlook([lock(10**15)], tmp_path)
    assert "GB missing, so not all of them will be built" in full
    assert outlook([], tmp_path) == ()
