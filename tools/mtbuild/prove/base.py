"""The image that a cell starts from, and how a build reaches the package mirrors.

`ensure_base` turns each kind of base into a reference by digest. A `bootstrap` base is made here from Debian
packages (mmdebstrap, the machine's own mirrors), so that no image has to be pulled from anywhere: the same
packages give the same digest, and neither a mirror's address nor a package list is left in it.

`apt_secret` gives what `apt-get` needs during a build: as BuildKit secrets, so that no layer and no cache key
sees it. A Dockerfile mounts them so (docs/engine.md shows it in full):

    RUN --mount=type=secret,id=apt.conf --mount=type=secret,id=apt.sources --mount=type=secret,id=apt.auth \\
        --mount=type=secret,id=ca.pem --mount=type=tmpfs,target=/var/lib/apt/lists \\
        --mount=type=tmpfs,target=/var/log \\
        --mount=type=cache,target=/var/cache/apt,sharing=locked \\
        export APT_CONFIG=/run/secrets/apt.conf \\
        && apt-get update -qq && apt-get install -y -qq --no-install-recommends gcc …

and `mtbuild build` passes `*secret_flags(paths, suite=base.suite)` to buildx. `ca.pem` is the host's CA
bundle: other programs of a build use it with `SSL_CERT_FILE=/run/secrets/ca.pem`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import ssl
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtbuild.digest import Digest, Reference
from mtbuild.errors import CommandError, InputError
from mtbuild.proc import run
from mtbuild.prove import debian

if TYPE_CHECKING:
    from collections.abc import Callable

    from mtbuild.paths import Paths
    from mtbuild.plan.cell import Base
    from mtbuild.prove.engine import Engine

__all__ = ["apt_secret", "ensure_base", "make_tar", "secret_flags"]

EPOCH = 1735689600  # 2025-01-01: no file in a base is younger, whenever it is made
_RECIPE = 2  # raise it when what goes into the tar changes
# Without usr-is-merged apt chooses usrmerge instead, and with it 55 MB of Perl.
_INCLUDE = ("ca-certificates", "usr-is-merged")
_NEEDED = {"mmdebstrap": "mmdebstrap"}
# Documents are a tenth of a minbase; licences stay. dpkg in the image goes on leaving them out.
_EXCLUDE = (
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/lintian/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
)
_DOCKERFILE = "FROM scratch\nADD base.tar /\n"
_BOOTSTRAP_S, _IMPORT_S = 1800, 1800


# --- what apt-get needs during a build -------------------------------------------------------------


def apt_secret(paths: Paths, *, suite: str = "bookworm") -> Path:
    """A private folder with `apt.conf`, `apt.sources`, `ca.pem`, and `apt.auth` where the host has logins.

    Written anew at each call from this machine's own configuration. With `suite` empty, apt.sources is
    left out: a foreign image keeps the sources it has, and gets only proxy and CA.
    """
    folder = paths.state / "apt" / (suite or "none")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    lines = [
        'APT::Sandbox::User "root";',  # secrets are readable for root only
        'Acquire::https::CaInfo "/run/secrets/ca.pem";',
        'Acquire::Retries "3";',
        'Acquire::Languages "none";',
    ]
    if suite:
        lines += ['Dir::Etc::SourceList "/run/secrets/apt.sources";', 'Dir::Etc::SourceParts "/dev/null";']
        _write(folder / "apt.sources", debian.sources(suite))
    logins = _logins()
    if logins:
        lines.append('Dir::Etc::netrc "/run/secrets/apt.auth";')
        _write(folder / "apt.auth", logins)
    else:
        (folder / "apt.auth").unlink(missing_ok=True)
    options = debian.acquire_options() if shutil.which("apt-config") else ""
    _write(folder / "apt.conf", "\n".join(lines) + "\n" + options)
    _write(folder / "ca.pem", _ca_bundle())
    return folder


def secret_flags(paths: Paths, *, suite: str = "bookworm") -> tuple[str, ...]:
    """`--secret id=…,src=…` words for buildx, one pair a file of `apt_secret`."""
    folder = apt_secret(paths, suite=suite)
    return tuple(
        word
        for file in sorted(folder.iterdir())
        if file.name in ("apt.auth", "apt.conf", "apt.sources", "ca.pem")
        for word in ("--secret", f"id={file.name},src={file}")
    )


def _write(file: Path, text: str) -> None:
    """Whole or not at all: another build may read it right now."""
    fresh = file.with_name(f"{file.name}.{os.getpid()}.new")
    fresh.touch(mode=0o600)
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(file)


def _logins() -> str:
    """apt's logins for private mirrors (apt_auth.conf(5)), empty on most machines."""
    folder = Path("/etc/apt/auth.conf.d")
    files = [Path("/etc/apt/auth.conf"), *(sorted(folder.glob("*.conf")) if folder.is_dir() else [])]
    return "\n".join(file.read_text(encoding="utf-8") for file in files if file.is_file())


def _ca_bundle() -> str:
    """The CA certificates that this host trusts, a company's own included."""
    defaults = ssl.get_default_verify_paths()  # honours SSL_CERT_FILE
    for place in (os.environ.get("SSL_CERT_FILE"), defaults.cafile, "/etc/ssl/certs/ca-certificates.crt"):
        if place and Path(place).is_file():
            return Path(place).read_text(encoding="utf-8", errors="replace")
    return ""


# --- the base image --------------------------------------------------------------------------------


def ensure_base(
    base: Base,
    *,
    engine: Engine,
    registry: str,
    paths: Paths,
    note: Callable[[str], None] = lambda _: None,
) -> Reference:
    """The base as a reference by digest, made and pushed to `<registry>/mt-base` if it has to be.

    A second call only asks the registry whether it still serves that digest. Raises InputError for a base
    that can't be made here, with what to do instead.
    """
    if base.kind == "image":
        return Reference.parse(base.ref)
    if base.kind == "cell":
        msg = f"base {base.name!r} is another cell's image"
        raise InputError(msg, fix="build that cell first: its digest is the base")
    if base.kind == "import":
        return _import(_named_tar(base), base, engine=engine, registry=registry, paths=paths, note=note)
    tar = make_tar(base.suite, paths=paths, note=note)
    return _import(tar, base, engine=engine, registry=registry, paths=paths, note=note)


def _named_tar(base: Base) -> Path:
    tar = Path(base.ref)
    if base.ref and tar.is_file():
        return tar
    msg = f"base {base.name!r} is the file system of another host" + (
        f", and {base.ref} is not a file here" if base.ref else ""
    )
    raise InputError(
        msg,
        where=f"matrix.yaml bases.{base.name}",
        fix=f"build such a cell on that host, or set bases.{base.name}.ref to a tar of its file system",
    )


def make_tar(suite: str, *, paths: Paths, note: Callable[[str], None] = lambda _: None) -> Path:
    """A minimal Debian file system as a tar, cached by release and recipe; the same packages, the same bytes.

    Raises InfrastructureError without root or on a machine without Debian's packages.
    """
    if not suite:
        msg = "a bootstrap base names no Debian release"
        raise InputError(msg, where="matrix.yaml bases", fix='add suite: "bookworm"')
    recipe = hashlib.sha256(repr((_RECIPE, suite, _INCLUDE, _EXCLUDE, EPOCH)).encode()).hexdigest()
    tar = paths.cache / "base" / f"{suite}-{recipe[:12]}.tar"
    if tar.exists():
        return tar
    debian.need_root("making a base image")
    debian.install(_NEEDED, note)
    tar.parent.mkdir(parents=True, exist_ok=True)
    note(f"bootstrapping Debian {suite} …")
    with tempfile.TemporaryDirectory(prefix="mtbuild-base-", dir=tar.parent) as temporary:
        folder = Path(temporary)
        listed = folder / "mtbuild.sources"
        listed.write_text(debian.sources(suite), encoding="utf-8")
        fresh = folder / "base.tar"
        paths.logs.mkdir(parents=True, exist_ok=True)
        run(
            _mmdebstrap(suite, fresh, listed),
            timeout_s=_BOOTSTRAP_S,
            env={"SOURCE_DATE_EPOCH": str(EPOCH), "TMPDIR": temporary},
            log=paths.logs / "base.log",
            fix="check that `apt-get update` works on this machine, then run the same command again",
        )
        fresh.replace(tar)
    for older in tar.parent.glob(f"{suite}-*.tar"):
        if older != tar:
            older.unlink(missing_ok=True)  # of another recipe: the image made from it is in its registry
    return tar


def _mmdebstrap(suite: str, tar: Path, sources: Path) -> list[str]:
    options = debian.acquire_options().splitlines()
    clean = (
        # Nothing of this machine stays: no mirror, no proxy, no list, no log.
        'rm -rf "$1"/etc/apt/sources.list "$1"/etc/apt/sources.list.d/* "$1"/etc/apt/apt.conf.d/99mmdebstrap '
        '"$1"/var/lib/apt/lists/* "$1"/var/cache/apt/*.bin "$1"/var/log/* "$1"/var/cache/ldconfig/aux-cache '
        '"$1"/etc/resolv.conf "$1"/etc/hostname'
    )
    return [
        "mmdebstrap",
        "--quiet",
        "--mode=root",
        "--variant=minbase",
        f"--include={','.join(_INCLUDE)}",
        "--hook-dir=/usr/share/mmdebstrap/hooks/maybe-merged-usr",
        *(f"--dpkgopt={option}" for option in _EXCLUDE),
        *(f"--aptopt={option}" for option in options),
        f"--customize-hook={clean}",
        suite,
        str(tar),
        str(sources),
    ]


def _import(
    tar: Path,
    base: Base,
    *,
    engine: Engine,
    registry: str,
    paths: Paths,
    note: Callable[[str], None],
    cached: bool = True,
) -> Reference:
    """The tar as a one-layer image in the registry, by BuildKit: `docker import` would add the time."""
    stat = tar.stat()
    key = f"{registry} {tar} {stat.st_size} {stat.st_mtime_ns} {_DOCKERFILE}"
    state = paths.state / "base" / f"{base.name}.json"
    known = _known(state, key) if cached else None
    if known is not None and _served(known, engine):
        return known
    note(f"pushing base {base.name} to {registry} …")
    state.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="context-", dir=tar.parent) as temporary:
        context = Path(temporary)
        os.link(tar, context / "base.tar") if _same_disk(tar, context) else shutil.copy(
            tar, context / "base.tar"
        )
        (context / "Dockerfile").write_text(_DOCKERFILE, encoding="utf-8")
        metadata = context / "metadata.json"
        name = f"{registry}/mt-base"
        run(
            [
                *engine.buildx,
                "build",
                "--progress=plain",
                *(() if cached else ("--no-cache",)),
                "--provenance=false",
                "--sbom=false",
                f"--build-arg=SOURCE_DATE_EPOCH={EPOCH}",
                f"--metadata-file={metadata}",
                f"--output=type=image,name={name}:{base.name},push=true,oci-mediatypes=true,"
                "compression=zstd,compression-level=3,force-compression=true",
                str(context),
            ],
            timeout_s=_IMPORT_S,
            log=_log(paths),
            fix="`mtbuild doctor` checks engine, buildx and disk",
        )
        digest = Digest.parse(str(json.loads(metadata.read_text())["containerimage.digest"]))
    host, _, prefix = name.partition("/")
    reference = Reference(host=host, path=prefix, digest=digest)
    _write(state, json.dumps({"schema": 1, "key": key, "ref": str(reference)}, indent=1))
    return reference


def _log(paths: Paths) -> Path:
    paths.logs.mkdir(parents=True, exist_ok=True)
    return paths.logs / "base.log"


def _same_disk(tar: Path, folder: Path) -> bool:
    return tar.stat().st_dev == folder.stat().st_dev


def _known(state: Path, key: str) -> Reference | None:
    try:
        saved: Any = json.loads(state.read_text(encoding="utf-8"))
        return Reference.parse(saved["ref"]) if saved["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError, InputError):
        return None


def _served(reference: Reference, engine: Engine) -> bool:
    """Whether the registry still has exactly this digest, asked with the user's own registry logins."""
    try:
        done = run([*engine.buildx, "imagetools", "inspect", "--raw", str(reference)], timeout_s=60)
    except CommandError:
        return False
    return Digest.of(done.output.encode()) == reference.digest
