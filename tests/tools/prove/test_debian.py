"""Package sources: another release on the machine's own mirrors, nothing else changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mtbuild.errors import InfrastructureError
from mtbuild.prove import debian
from mtbuild.prove.debian import Mirror

if TYPE_CHECKING:
    from pathlib import Path

MIRRORS = (
    Mirror(uri="http://mirror.example/debian/", release="bookworm", component="main"),
    Mirror(uri="http://mirror.example/debian/", release="bookworm-updates", component="main"),
    Mirror(uri="http://other.example/security/", release="bookworm-security", component="main"),
    Mirror(uri="http://vendor.example/", release="stable", component="main"),
)


def test_only_the_release_changes() -> None:
    text = debian.render_sources(MIRRORS, own="bookworm", suite="trixie")
    stanzas = [dict(line.split(": ", 1) for line in part.splitlines()) for part in text.split("\n\n")]
    assert [(s["URIs"], s["Suites"]) for s in stanzas] == [
        ("http://mirror.example/debian/", "trixie"),
        ("http://mirror.example/debian/", "trixie-updates"),
        ("http://other.example/security/", "trixie-security"),
    ]
    assert all(s["Signed-By"].startswith("/usr/share/keyrings/") for s in stanzas)


def test_a_rolling_release_has_no_pockets() -> None:
    text = debian.render_sources(MIRRORS, own="bookworm", suite="sid")
    assert [line for line in text.splitlines() if line.startswith("Suites")] == ["Suites: sid"]


def test_no_source_of_the_release_is_an_error_with_its_fix() -> None:
    with pytest.raises(InfrastructureError, match="no Debian source for bookworm") as raised:
        debian.render_sources(MIRRORS[3:], own="bookworm", suite="trixie")
    assert "MTBUILD_APT_SOURCES" in raised.value.fix


def test_a_file_of_the_user_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "own.sources"
    file.write_text("Types: deb\nURIs: http://private.example/\n")
    monkeypatch.setenv("MTBUILD_APT_SOURCES", str(file))
    assert debian.sources("bookworm") == file.read_text()


def test_the_environments_proxy_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    lines = debian.acquire_options().splitlines()
    assert 'Acquire::https::Proxy "http://proxy.example:3128";' in lines
    assert not [line for line in lines if "CaInfo" in line or "AllowInsecure" in line]


def test_without_root_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(InfrastructureError, match="needs root, and this process runs as uid 1000") as raised:
        debian.install({"no-such-program-here": "no-such-package"}, note=print)
    assert "sudo" in raised.value.fix


def test_what_is_there_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)  # installing anything would raise
    debian.install({"sh": "dash"}, note=print)
