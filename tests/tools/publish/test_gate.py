"""Whose evidence is believed, and what never comes out whatever the policy says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from publish_samples import H200, V73, build_of, push_image, report_of, signed

from mtbuild.errors import MtbuildError
from mtbuild.publish.gate import RefusedError
from mtbuild.publish.keys import Keys
from mtbuild.publish.referrers import attached

if TYPE_CHECKING:
    from publish_samples import Desk

    from mtbuild.publish.registry import Manifest


def test_a_run_that_failed_here_lets_nothing_out_even_where_the_policy_would(
    desk: Desk, image: Manifest
) -> None:
    with pytest.raises(RefusedError, match=r"not let out from here: triton\.jit failed"):
        desk.publish(desk.signed(), withhold="triton.jit failed")
    assert desk.tags() == set()
    assert len(attached(desk.staging, image.digest)) == 1
    verdict = json.loads((desk.paths.cell(V73.id, desk.build.build_id[:12]) / "verdict.json").read_text())
    assert verdict["passed"] is False


def test_evidence_of_a_stranger_is_none(desk: Desk, tmp_path: Path) -> None:
    stranger = Keys.ensure(tmp_path / "stranger")
    notes: list[str] = []
    with pytest.raises(RefusedError, match="there is no evidence"):
        desk.publish(signed(report_of(desk.build.ref), desk.build, stranger), note=notes.append)
    assert any("signed by no key that is believed" in note for note in notes)
    assert attached(desk.staging, desk.build.ref.digest) == ()


def test_a_forced_build_is_refused_before_anything_is_written(desk: Desk) -> None:
    forced = replace(desk.build, override="to see how it fails")
    with pytest.raises(MtbuildError, match="to see how it fails"):
        desk.publish(desk.signed(gpu=H200), channel="verified", build=forced)
    assert desk.release.tags() == ()
    # ... and a record without the mark does not help where a signed statement has it
    with pytest.raises(RefusedError, match="forced past the compatibility rules"):
        desk.publish(desk.signed(build=forced))
    assert desk.release.tags() == ()


def test_an_image_that_says_it_was_forced_is_believed(desk: Desk) -> None:
    marked = push_image(desk.staging, labels={"mtbuild.override": "for study"})
    build = build_of(desk.staging, marked)  # a record that lost the mark
    with pytest.raises(MtbuildError, match="for study"):
        desk.publish(desk.signed(build=build), build=build)
    assert desk.release.tags() == ()
    assert attached(desk.staging, marked.digest) == ()
