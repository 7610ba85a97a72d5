"""Debian's packages, from the machine's own mirrors and without changing the machine's apt.

Engine, registry and public clients are unpacked into the user's cache (`dpkg -x`) instead of installed:
no maintainer script runs, so no second daemon comes up on a machine with systemd, nothing of the machine
is upgraded, and `make clean-engine` takes all of it away again. The package lists of the other release
live in a temporary folder for as long as that takes. No mirror's address is known here: the machine's
configuration is read through apt's own parser, and only the release's name in it is changed.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mtbuild.errors import InfrastructureError
from mtbuild.proc import run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["Mirror", "acquire_options", "codename", "install", "mirrors", "need_root", "sources", "unpack"]

_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_ROLLING = ("sid", "unstable")  # releases without -updates and -security
_SOURCES_VARIABLE = "MTBUILD_APT_SOURCES"
_FORMAT = "$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(ORIGIN)"
_UPDATE_S, _DOWNLOAD_S, _INSTALL_S = 600, 1200, 1800


@dataclass(frozen=True, kw_only=True)
class Mirror:
    """One line of the machine's package sources: `release` is "bookworm", "bookworm-security" …"""

    uri: str
    release: str
    component: str


def codename() -> str:
    """This machine's Debian release, e.g. "bookworm"; InfrastructureError on another system."""
    try:
        facts = platform.freedesktop_os_release()
    except OSError:
        facts = {}
    if facts.get("ID") != "debian" or not shutil.which("apt-get"):
        msg = f"this machine runs {facts.get('PRETTY_NAME', platform.system())}, not Debian"
        raise InfrastructureError(
            msg, fix="install Docker with buildx in your system's own way, then run the same command again"
        )
    return facts.get("VERSION_CODENAME", "") or "sid"


def need_root(what: str) -> None:
    """InfrastructureError unless this process is root."""
    if os.geteuid() != 0:
        msg = f"{what} needs root, and this process runs as uid {os.geteuid()}"
        raise InfrastructureError(
            msg, fix="run it as root (sudo make matrix), or set DOCKER_HOST to an engine that you may use"
        )


def mirrors() -> tuple[Mirror, ...]:
    """The machine's Debian sources, as apt itself reads them; other vendors' sources are left out."""
    listed = run(["apt-get", "indextargets", "--format", _FORMAT, "Created-By: Packages"], timeout_s=60)
    found: list[Mirror] = []
    for line in listed.output.splitlines():
        uri, release, component, origin = line.split("|")
        # Before the first `apt-get update` apt knows no origin and repeats the placeholder.
        if component == "main" and origin in ("Debian", "$(ORIGIN)"):
            mirror = Mirror(uri=uri, release=release, component=component)
            if mirror not in found:
                found.append(mirror)
    return tuple(found)


def sources(suite: str) -> str:
    """Package sources (deb822) for a release, on this machine's own mirrors.

    MTBUILD_APT_SOURCES names a file to use instead, for machines that are not Debian or whose mirror
    signs with a key of its own.
    """
    override = os.environ.get(_SOURCES_VARIABLE)
    if override:
        return Path(override).read_text(encoding="utf-8")
    return render_sources(mirrors(), own=codename(), suite=suite)


def render_sources(known: Iterable[Mirror], *, own: str, suite: str) -> str:
    """The pure part of `sources`: the release's name changed from `own` to `suite`, nothing else."""
    stanzas: list[str] = []
    for mirror in known:
        base, dash, pocket = mirror.release.partition("-")
        if base != own or (suite in _ROLLING and dash):
            continue
        stanzas.append(
            f"Types: deb\nURIs: {mirror.uri}\nSuites: {suite}{dash}{pocket}\n"
            f"Components: {mirror.component}\nSigned-By: {_KEYRING}\n"
        )
    if not stanzas:
        msg = f"apt on this machine has no Debian source for {own}"
        raise InfrastructureError(
            msg,
            fix=f"configure Debian's mirror in /etc/apt, or name a .sources file in {_SOURCES_VARIABLE}",
        )
    return "\n".join(stanzas)


def acquire_options() -> str:
    """What this machine tells apt about its network (proxies, CA files, date checks), as apt.conf lines.

    Proxies of the environment are added. CA files of the host are not there in a container: those lines
    are left to `base.apt_secret`, which passes the bundle itself.
    """
    dumped = run(["apt-config", "dump", "--no-empty"], timeout_s=60).output.splitlines()
    kept = re.compile(r"Acquire::(?:(?:http|https)::(?!Proxy-Auto|.*Ca)|Check-|Retries)", re.IGNORECASE)
    lines = [line for line in dumped if kept.match(line)]
    for scheme in ("http", "https"):
        proxy = os.environ.get(f"{scheme}_proxy") or os.environ.get(f"{scheme.upper()}_PROXY")
        if proxy and not any(line.lower().startswith(f"acquire::{scheme}::proxy ") for line in lines):
            lines.append(f'Acquire::{scheme}::Proxy "{proxy}";')
    return "".join(f"{line}\n" for line in lines)


def install(programs: dict[str, str], note: Callable[[str], None]) -> None:
    """Install packages of the machine's own release; `programs` maps a program to its package.

    What PATH already has is left alone. `apt-get update` runs first: a fresh machine has no lists.
    """
    missing = sorted({package for program, package in programs.items() if not _there(program)})
    if not missing:
        return
    codename()
    need_root(f"installing {', '.join(missing)}")
    note(f"installing {', '.join(missing)} …")
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    run(["apt-get", "update", "-qq"], timeout_s=_UPDATE_S, env=quiet)
    # --no-remove: setting up an engine must never take something away from the machine
    run(
        ["apt-get", "install", "-qq", "-y", "--no-install-recommends", "--no-remove",
         "-o", "DPkg::Lock::Timeout=600", *missing],
        timeout_s=_INSTALL_S,
        env=quiet,
    )  # fmt: skip


def unpack(packages: Iterable[str], *, suite: str, into: Path, note: Callable[[str], None]) -> dict[str, str]:
    """Download packages of a release and unpack them into a folder; returns package → version.

    Nothing of the machine is touched. What they need of the machine is the caller's to `install`.
    """
    wanted = sorted(packages)
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mtbuild-apt-") as temporary:
        folder = Path(temporary)
        apt = _private_apt(folder, suite)
        note(f"fetching {', '.join(wanted)} from {suite} …")
        run([*apt, "update", "-qq"], timeout_s=_UPDATE_S)
        run([*apt, "download", "-qq", *wanted], timeout_s=_DOWNLOAD_S, cwd=folder)
        versions: dict[str, str] = {}
        for archive in sorted(folder.glob("*.deb")):
            described = run(["dpkg-deb", "-W", "--showformat=${Package} ${Version}", archive], timeout_s=60)
            name, _, version = described.output.partition(" ")
            versions[name] = version
            run(["dpkg-deb", "-x", archive, into], timeout_s=300)
    return versions


def _private_apt(folder: Path, suite: str) -> list[str]:
    """apt-get with its sources, lists and state in `folder`; network settings stay the machine's."""
    listed = folder / "mtbuild.sources"
    listed.write_text(sources(suite), encoding="utf-8")
    empty = folder / "empty"
    (empty / "none.d").mkdir(parents=True)
    (folder / "status").touch()  # nothing counts as installed: the release's own version is the candidate
    (folder / "lists" / "partial").mkdir(parents=True)
    (folder / "cache" / "archives" / "partial").mkdir(parents=True)
    options = {
        "Dir::Etc::SourceList": listed,
        "Dir::Etc::SourceParts": empty / "none.d",
        "Dir::Etc::Preferences": empty / "none",
        "Dir::Etc::PreferencesParts": empty / "none.d",
        "Dir::State::Lists": folder / "lists",
        "Dir::State::status": folder / "status",
        "Dir::Cache": folder / "cache",
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
    }
    return ["apt-get", *(word for key, value in options.items() for word in ("-o", f"{key}={value}"))]


def _there(program: str) -> bool:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is not None
