"""The real thing: the project's own engine, registry and images, each CUDA image built at most once a run."""

from __future__ import annotations

from typing import Any

import pytest
from commands import ROOT, Done, mtbuild


@pytest.fixture(scope="session")
def main_job() -> Done:
    """`mtbuild matrix`, the whole of it, once for all tests that look at what it made."""
    return mtbuild("matrix", "--json")


@pytest.fixture(scope="session")
def outcomes(main_job: Done) -> dict[str, dict[str, Any]]:
    """What became of each cell, by name."""
    assert main_job.code == 0, str(main_job)
    return {cell["name"]: cell for cell in main_job.json["cells"]}


@pytest.fixture(scope="session")
def registry_host(main_job: Done) -> str:
    """HOST:PORT of the embedded registry."""
    from mtbuild.paths import Paths
    from mtbuild.prove.local_registry import registry_address

    assert main_job.code in (0, 1), str(main_job)
    host = registry_address(Paths.of(ROOT))
    assert host is not None
    return host
