"""The base image: the same packages give the same digest, and nothing of this machine is in it."""

from __future__ import annotations

import io
import secrets
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from mtbuild.digest import Digest, Reference
from mtbuild.errors import InputError
from mtbuild.paths import Paths
from mtbuild.plan.cell import Base
from mtbuild.proc import run
from mtbuild.prove import base, debian, embedded
from mtbuild.prove.engine import Engine, connect, retire

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[3]
BOOKWORM = Base(name="bookworm", kind="bootstrap", glibc="2.36", python=("3.11",), suite="bookworm")
SOURCES = "Types: deb\nURIs: http://mirror.example/debian\nSuites: bookworm\nComponents: main\n"


@pytest.fixture
def private_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Paths:
    """Sources and a CA bundle of a user's own."""
    (tmp_path / "own.sources").write_text(SOURCES)
    (tmp_path / "ca.crt").write_text("a company's certificate")
    monkeypatch.setenv("MTBUILD_APT_SOURCES", str(tmp_path / "own.sources"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.crt"))
    return Paths(root=tmp_path, cache=tmp_path / "cache")


def test_the_secrets_are_the_hosts_settings_and_private(private_mirror: Paths) -> None:
    folder = base.apt_secret(private_mirror)
    assert (folder / "apt.sources").read_text() == SOURCES
    assert (folder / "ca.pem").read_text() == "a company's certificate"
    config = (folder / "apt.conf").read_text()
    assert 'Dir::Etc::SourceList "/run/secrets/apt.sources";' in config
    assert 'Acquire::https::CaInfo "/run/secrets/ca.pem";' in config
    assert folder.stat().st_mode & 0o077 == 0
    assert all(file.stat().st_mode & 0o077 == 0 for file in folder.iterdir())
    flags = base.secret_flags(private_mirror)
    assert flags[:2] == ("--secret", f"id=apt.conf,src={folder}/apt.conf")
    assert len(flags) == 2 * len(list(folder.iterdir()))


def test_a_foreign_image_keeps_its_own_sources(private_mirror: Paths) -> None:
    folder = base.apt_secret(private_mirror, suite="")
    assert sorted(file.name for file in folder.iterdir() if file.name != "apt.auth") == ["apt.conf", "ca.pem"]
    assert "SourceList" not in (folder / "apt.conf").read_text()


def ensure(one: Base, tmp_path: Path) -> Reference:
    engine = Engine(socket="unix:///none", docker=Path("/none"), buildx=("/none",), origin="embedded")
    return base.ensure_base(
        one, engine=engine, registry="127.0.0.1:1", paths=Paths(root=tmp_path, cache=tmp_path / "cache")
    )


def test_an_image_is_taken_by_its_digest_only(tmp_path: Path) -> None:
    ref = f"ghcr.io/some/image@sha256:{'a' * 64}"
    one = Base(name="given", kind="image", glibc="2.39", python=("3.12",), ref=ref)
    assert str(ensure(one, tmp_path)) == ref
    with pytest.raises(InputError, match="names no digest"):
        ensure(
            Base(name="given", kind="image", glibc="2.39", python=("3.12",), ref="ghcr.io/some/image:1"),
            tmp_path,
        )


def test_bases_that_cant_be_made_here_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="file system of another host") as raised:
        ensure(Base(name="gpu-host", kind="import", glibc="2.39", python=("3.12",)), tmp_path)
    assert raised.value.where == "matrix.yaml bases.gpu-host"
    assert "tar" in raised.value.fix
    with pytest.raises(InputError, match="another cell's image"):
        ensure(Base(name="v72", kind="cell", glibc="2.36", python=("3.11",)), tmp_path)
    with pytest.raises(InputError, match="names no Debian release"):
        base.make_tar("", paths=Paths(root=tmp_path, cache=tmp_path / "cache"))


# --- for real ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared() -> Paths:
    return Paths.of(ROOT)


@pytest.fixture(scope="module")
def engine(shared: Paths) -> Engine:
    return connect(shared, bootstrap=True)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, shared: Paths) -> Iterator[tuple[Paths, str]]:
    """A project of its own with its registry; engine programs and base tar come from the user's cache."""
    paths = Paths(root=tmp_path_factory.mktemp("project"), cache=shared.cache)
    yield paths, embedded.ensure_registry(paths)
    embedded.stop_registry(paths)


@pytest.fixture(scope="module")
def reference(own: tuple[Paths, str], engine: Engine) -> Iterator[Reference]:
    paths, registry = own
    made = base.ensure_base(BOOKWORM, engine=engine, registry=registry, paths=paths)
    yield made
    retire(engine, [made])


@pytest.mark.engine
def test_made_twice_the_digest_is_the_same(
    own: tuple[Paths, str], reference: Reference, engine: Engine, tmp_path: Path
) -> None:
    paths, registry = own
    notes: list[str] = []
    again = Paths(root=tmp_path, cache=tmp_path / "cache")  # an empty cache: bootstrapped once more
    tar = base.make_tar("bookworm", paths=again, note=notes.append)
    assert any("bootstrapping" in note for note in notes)
    kept = base.make_tar("bookworm", paths=paths)
    assert Digest.of(tar.read_bytes()) == Digest.of(kept.read_bytes())
    built = base._import(
        tar, BOOKWORM, engine=engine, registry=registry, paths=again, note=notes.append, cached=False
    )
    assert built == reference


@pytest.mark.engine
def test_a_second_call_makes_nothing(own: tuple[Paths, str], reference: Reference, engine: Engine) -> None:
    paths, registry = own
    notes: list[str] = []
    assert (
        base.ensure_base(BOOKWORM, engine=engine, registry=registry, paths=paths, note=notes.append)
        == reference
    )
    assert notes == []
    embedded.clean_registry(paths)  # it is gone: the record alone is not believed
    embedded.ensure_registry(paths)
    assert (
        base.ensure_base(BOOKWORM, engine=engine, registry=registry, paths=paths, note=notes.append)
        == reference
    )
    assert any("pushing" in note for note in notes)


@pytest.mark.engine
def test_nothing_of_this_machine_is_in_it(shared: Paths) -> None:
    hosts = {urlsplit(mirror.uri).hostname or "" for mirror in debian.mirrors()} - {""}
    assert hosts
    with tarfile.open(base.make_tar("bookworm", paths=shared)) as tar:
        names = {member.name.removeprefix("./").rstrip("/"): member for member in tar}
        assert not [name for name in names if name.startswith(("etc/apt/sources.list", "var/lib/apt/lists/"))
                    and names[name].size]  # fmt: skip
        assert "etc/resolv.conf" not in names
        assert "etc/hostname" not in names
        for name, member in names.items():
            # Packages' own files may name Debian's default host; what this machine could add is in these.
            if member.isfile() and name.startswith(("etc/", "var/log/", "root/", "home/", "tmp/")):
                file = tar.extractfile(member)
                text = file.read() if file else b""
                assert not [host for host in hosts if host.encode() in text], name
        assert max(member.mtime for member in names.values()) <= base.EPOCH
        assert "usr/share/doc/bash/copyright" in names, "licences stay"
        assert not [name for name in names if name.startswith("usr/share/man/man1/")]


@pytest.mark.engine
def test_apt_works_in_a_build_and_leaves_nothing(
    shared: Paths,
    reference: Reference,
    engine: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The instruction in base.py's docstring, with a canary in each secret that no layer may hold."""
    canary = f"canary-{secrets.token_hex(16)}"
    (tmp_path / "own.sources").write_text(f"# {canary}\n{debian.sources('bookworm')}")
    (tmp_path / "ca.crt").write_text(f"# {canary}\n{base._ca_bundle()}")
    monkeypatch.setenv("MTBUILD_APT_SOURCES", str(tmp_path / "own.sources"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.crt"))
    documented = base.__doc__ or ""
    words = documented[documented.index("    RUN ") : documented.index(" gcc …")].replace("    RUN", "RUN", 1)
    context = tmp_path / "context"
    context.mkdir()
    (context / "Dockerfile").write_text(f"FROM {reference}\n{words} tini\n")
    archive = tmp_path / "image.tar"
    project = Paths(root=tmp_path, cache=shared.cache)
    run(
        [
            *engine.buildx, "build", "--no-cache", "--provenance=false", *base.secret_flags(project),
            f"--output=type=oci,dest={archive},compression=uncompressed,force-compression=true", context,
        ],
        timeout_s=600,
    )  # fmt: skip
    seen: set[str] = set()
    with tarfile.open(archive) as image:
        for member in image:
            file = image.extractfile(member) if member.isfile() else None
            blob = file.read() if file else b""
            assert canary.encode() not in blob, f"{member.name} holds a build secret"
            try:
                with tarfile.open(fileobj=io.BytesIO(blob)) as layer:
                    seen |= {entry.name for entry in layer if entry.size}
            except tarfile.TarError:
                continue  # a manifest or configuration
    assert "usr/bin/tini" in seen, "the package was not installed"
    assert not [name for name in seen if name.startswith(("run/secrets", "var/lib/apt/lists/", "var/log/"))]


@pytest.mark.engine
def test_a_tar_of_another_host_becomes_a_base(own: tuple[Paths, str], engine: Engine, tmp_path: Path) -> None:
    paths, registry = own
    tar = tmp_path / "host.tar"
    with tarfile.open(tar, "w") as archive:
        entry = tarfile.TarInfo("etc/of-that-host")
        entry.size = 5
        archive.addfile(entry, io.BytesIO(b"hello"))
    one = Base(name="gpu-host", kind="import", glibc="2.39", python=("3.12",), ref=str(tar))
    made = base.ensure_base(one, engine=engine, registry=registry, paths=paths)
    container = engine.client.containers.create(str(made), command=["/none"])
    try:
        stream, _ = container.get_archive("/etc/of-that-host")
        with tarfile.open(fileobj=io.BytesIO(b"".join(stream))) as found:
            file = found.extractfile("of-that-host")
            assert file is not None
            assert file.read() == b"hello"
    finally:
        container.remove()
        retire(engine, [made])
