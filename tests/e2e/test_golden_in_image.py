"""The model inside the V73 image gives the reference's numbers: golden DiT outputs, computed there."""

from __future__ import annotations

import json
from typing import Any

import pytest
from commands import ROOT

from mtbuild.paths import Paths
from mtbuild.prove.build import builds_of
from mtbuild.prove.engine import connect

pytestmark = pytest.mark.engine

GATE = 2e-5  # of the largest value: the specification's gate for the DiT in fp32


def test_the_dit_in_the_v73_image_equals_the_reference(outcomes: dict[str, dict[str, Any]]) -> None:
    paths = Paths.of(ROOT)
    (build, *_) = [b for b in builds_of(paths) if str(b.ref.digest) == outcomes["v73"]["digest"]]
    tests = {str(ROOT / "tests"): {"bind": "/tests", "mode": "ro"}}
    log = connect(paths).client.containers.run(
        str(build.ref),
        ["python3", "/tests/e2e/golden_dit.py", "/tests"],
        volumes=tests,
        read_only=True,
        network_mode="none",
        cap_drop=["ALL"],
        tmpfs={"/tmp": "size=64m"},
        environment={"OMP_NUM_THREADS": "2"},
        remove=True,
    )
    said = json.loads(log.decode().splitlines()[-1])
    assert said["torch"].startswith("2.7.1")
    assert said["wan"].startswith("/opt/venv/"), "not the image's own wan"
    assert set(said["errors"]) == {"dit_single_fp32", "dit_multi_fp32"}
    assert all(error <= GATE for error in said["errors"].values()), said["errors"]
