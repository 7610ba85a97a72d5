"""What an earlier run left behind is used again only where it would still be believed."""

from __future__ import annotations

import shutil
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent / "publish"))

from publish_samples import V73, SampleBuild, report_of, signed

from mtbuild.acts import LocalActs
from mtbuild.digest import Digest, Reference
from mtbuild.paths import Paths
from mtbuild.plan.matrix import load
from mtbuild.prove.smoke import suite_digest

if TYPE_CHECKING:
    from mtbuild.prove.report import SmokeReport

ROOT = Path(__file__).parents[2]
NOW = datetime.now(UTC).replace(microsecond=0)


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(root=tmp_path, cache=tmp_path / "cache")


def acts_in(paths: Paths) -> LocalActs:
    return LocalActs(paths=paths, matrix=load(ROOT / "matrix.yaml"), planned=())


def keep(paths: Paths, *, finished: datetime = NOW, suite: Digest | None = None) -> tuple[SampleBuild, Path]:
    """A passing run's two files, as `prove` leaves them."""
    ref = Reference(host="127.0.0.1:1", path="staging", digest=Digest.of(b"image"))
    build = SampleBuild(cell_id=V73.id, cell_name=V73.name, build_id=Digest.of(b"build").hex, ref=ref)
    report = report_of(ref, finished=finished, suite=suite or suite_digest())
    folder = paths.cell(V73.id, build.build_id[:12])
    folder.mkdir(parents=True)
    signed(report, build, acts_in(paths).keys).write(folder / "smoke-cpu-none.sigstore.json")
    report.write(folder / "smoke-cpu-none.json")
    return build, folder


def kept(paths: Paths, build: SampleBuild, folder: Path) -> SmokeReport | None:
    found = acts_in(paths)._kept(build, folder, "cpu")
    return found[0] if found is not None else None


def test_a_passing_run_is_not_done_again(paths: Paths) -> None:
    build, folder = keep(paths)
    report = kept(paths, build, folder)
    assert report is not None and report.passed()


def test_a_run_that_a_replaced_key_signed_is_done_again(paths: Paths) -> None:
    build, folder = keep(paths)
    shutil.rmtree(paths.keys)
    assert kept(paths, build, folder) is None


def test_a_report_that_is_not_what_was_signed_is_not_taken(paths: Paths) -> None:
    build, folder = keep(paths)
    report_of(build.ref, finished=NOW + timedelta(seconds=1), suite=suite_digest()).write(
        folder / "smoke-cpu-none.json"
    )
    assert kept(paths, build, folder) is None


def test_old_evidence_and_that_of_another_suite_are_not_taken(paths: Paths, tmp_path: Path) -> None:
    build, folder = keep(paths, finished=NOW - timedelta(days=91))
    assert kept(paths, build, folder) is None
    shutil.rmtree(folder)
    build, folder = keep(paths, suite=Digest.of(b"another"))
    assert kept(paths, build, folder) is None
