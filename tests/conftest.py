"""Switches that all tests share."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update", action="store_true", help="write golden files and recorded facts anew")


@pytest.fixture
def update(request: pytest.FixtureRequest) -> bool:
    """True where golden files are to be written, not compared."""
    return bool(request.config.getoption("--update"))
