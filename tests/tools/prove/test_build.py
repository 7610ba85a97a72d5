"""Builds on a real engine: tiny wheels with the real names go the same way as the large ones."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import secrets
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from tiny_cell import commit, tiny

from mtbuild.digest import Digest, Reference
from mtbuild.errors import InputError
from mtbuild.paths import Paths
from mtbuild.plan.cell import Base
from mtbuild.plan.index import Index
from mtbuild.plan.lock import Lock
from mtbuild.proc import run
from mtbuild.prove import debian, wheel_store
from mtbuild.prove.build import Build, BuildFailed, build, builds_of
from mtbuild.prove.engine import Engine, retire
from mtbuild.prove.layers import wheels_in_layers

RECORD = Build(
    cell_id="torch2.7.1-cu126-xf0.0.31-py311",
    cell_name="v73",
    build_id="0" * 64,
    ref=Reference.parse(f"127.0.0.1:5000/staging@sha256:{'1' * 64}"),
    config_digest=Digest("2" * 64),
    base_digest=Digest("3" * 64),
    size_bytes=2_700_000_000,
    seconds=170.5,
    override=None,
    created="2026-11-22T18:23:55.315832+00:00",
    runtime_sha256="4" * 64,
)


def test_a_record_survives_its_file() -> None:
    assert Build.from_json(RECORD.to_json()) == RECORD
    marked = dataclasses.replace(RECORD, override="to see it refused")
    assert Build.from_json(marked.to_json()) == marked


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": 2}', RECORD.to_json().replace("sha256:2", "md5:2")]
)
def test_a_broken_record_is_an_input_error(text: str) -> None:
    with pytest.raises(InputError):
        Build.from_json(text)


# --- the engine ------------------------------------------------------------------------------------------


@pytest.fixture
def marked_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A word that stands in everything the host tells a build in secret: CA, package sources, settings."""
    needle = f"needle-{secrets.token_hex(8)}"
    bundle = tmp_path / "ca-bundle.pem"
    host = os.environ.get("SSL_CERT_FILE") or "/etc/ssl/certs/ca-certificates.crt"
    bundle.write_text(f"# {needle}\n{Path(host).read_text()}")
    sources = tmp_path / "own.sources"
    sources.write_text(f"# {needle}\n{debian.sources('bookworm')}")
    monkeypatch.setenv("SSL_CERT_FILE", str(bundle))
    monkeypatch.setenv("MTBUILD_APT_SOURCES", str(sources))
    return needle


def in_container(engine: Engine, ref: Reference, script: str, user: str) -> str:
    """Run a script as the suite is run: read-only root, no network, no capabilities."""
    engine.client.images.pull(str(ref))
    output: bytes = engine.client.containers.run(
        str(ref),
        ["-c", script],
        entrypoint="/bin/sh",
        user=user,
        remove=True,
        read_only=True,
        network_mode="none",
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
        init=True,
        stderr=True,
        tmpfs={"/tmp": "", "/cache": "exec"},
    )
    return output.decode()


def drop(engine: Engine, *builds: Build) -> None:
    retire(engine, [one.ref for one in builds])


@pytest.mark.engine
def test_a_build_from_files_to_digest(
    engine: Engine, registry: str, base: Reference, project: Paths, marked_host: str
) -> None:
    """One image, looked at from all sides: it takes most of a minute, so it is built once."""
    cell = tiny(compiler=True)
    commit(cell, project, secrets.token_hex(4))
    staging = f"{registry}/test-staging"
    done = build(cell, paths=project, engine=engine, staging=staging, base=base, override="a test of builds")
    try:
        look_at_the_record(done, project, engine, staging)
        look_inside(done, engine)
        look_for_leaks(done, engine, marked_host)
        again = build(
            cell, paths=project, engine=engine, staging=staging, base=base, override="a test of builds"
        )
        assert again == done  # the same record: nothing was built
        hashes = {one.sha256 for one in Lock.load(project.images / cell.id).wheels}
        assert hashes <= wheels_in_layers(engine), "the engine itself says what it holds"
        (project.root / "wan" / "__init__.py").write_text("ANSWER = 43\n")
        other = build(cell, paths=project, engine=engine, staging=staging, base=base)
        drop(engine, other)
        assert other.build_id != done.build_id and other.override is None
        assert [one.build_id for one in builds_of(project)] == [other.build_id, done.build_id]
    finally:
        drop(engine, done)


def look_at_the_record(done: Build, project: Paths, engine: Engine, staging: str) -> None:
    file = project.cell(done.cell_id, done.build12) / "build.json"
    assert Build.load(file) == done
    raw = run([*engine.buildx, "imagetools", "inspect", "--raw", str(done.ref)], timeout_s=60).output
    manifest = json.loads(raw)
    assert Digest.of(raw.encode()) == done.ref.digest
    assert manifest["config"]["digest"] == str(done.config_digest)
    assert {layer["mediaType"] for layer in manifest["layers"]} == {
        "application/vnd.oci.image.layer.v1.tar+zstd"
    }
    assert done.size_bytes == sum(layer["size"] for layer in manifest["layers"])
    assert done.ref.repository == staging
    tagged = run(
        [*engine.buildx, "imagetools", "inspect", "--raw", f"{staging}:bld-{done.build12}"], timeout_s=60
    )
    assert Digest.of(tagged.output.encode()) == done.ref.digest  # the keep-alive tag


def look_inside(done: Build, engine: Engine) -> None:
    script = """
        set -eu
        python3 -c 'import torch, triton, xformers, numpy, wan; print("answer", wan.ANSWER)'
        python3 -c 'import importlib.util as u, wan; print("cached", u.cache_from_source(wan.__file__))'
        python3 - <<'EOF'
import importlib.util, pathlib, torch
code = pathlib.Path(importlib.util.cache_from_source(torch.__file__)).read_bytes()
print("flags", int.from_bytes(code[4:8], "little"))  # 1: hash-based, unchecked (PEP 552)
print("cut", pathlib.Path(torch.__file__).parent.joinpath("bin/protoc").exists())
EOF
        printf '#include <Python.h>\\nint one(void) { return PY_MAJOR_VERSION; }\\n' > /cache/a.c
        $CC -shared -fPIC -I"$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')" \\
            -o /cache/a.so /cache/a.c
        python3 -c 'import ctypes; print("header", ctypes.CDLL("/cache/a.so").one())'
        printf '#include <vector>\\nint main() { return std::vector<int>().size(); }\\n' > /cache/b.cc
        $CXX -o /cache/b /cache/b.cc && /cache/b
        /sbin/ldconfig -p | grep -q libc.so.6
        alias ff='ffmpeg -hide_banner -loglevel error'
        ff -f lavfi -i testsrc=d=0.2:s=64x64 -c:v libx264 -f mp4 -y /tmp/a.mp4
        ff -i /tmp/a.mp4 -f null - && echo ffmpeg works
        mkdir -p "$TRITON_CACHE_DIR" "$TORCHINDUCTOR_CACHE_DIR" "$XDG_CACHE_HOME" "$HF_HOME" && echo caches
        ! touch /opt/venv/x 2>/dev/null
    """
    for user in ("65532", "65532:65532", f"{secrets.randbelow(50_000) + 10_000}:0"):
        text = in_container(engine, done.ref, script, user)
        assert "answer 42" in text and "flags 1" in text and "cut False" in text
        assert "header 3" in text and "ffmpeg works" in text and "caches" in text
    config = engine.client.images.get(str(done.ref)).attrs["Config"]
    assert config["User"] == "65532:65532"
    assert config["Labels"]["mtbuild.override"] == "a test of builds"
    assert config["Labels"]["mtbuild.runtime.sha256"] == done.runtime_sha256
    assert config["Labels"]["mtbuild.build"] == done.build_id


def look_for_leaks(done: Build, engine: Engine, needle: str) -> None:
    """No layer and no configuration holds what the host told in secret, or where its mirrors are."""
    words = {needle.encode()}
    # The base's own packages name Debian's public mirrors in their documents; an address of this machine's
    # configuration would stand in apt's files.
    mirrors = {urlsplit(mirror.uri).netloc.encode() for mirror in debian.mirrors()}
    settings = Index.from_environment().settings
    if not settings.default_is_builtin:  # the public index's name stands in Python's own files
        words |= {urlsplit(source.url).netloc.encode() for source in settings.sources}
    history = json.dumps(engine.client.images.get(str(done.ref)).history()).encode()
    config = json.dumps(engine.client.images.get(str(done.ref)).attrs).encode()
    for word in words | mirrors:
        assert word not in history and word not in config
    container = engine.client.containers.create(str(done.ref), ["true"])
    seen = 0
    try:
        spool = io.BytesIO(b"".join(container.export()))
    finally:
        container.remove(force=True)
    with tarfile.open(fileobj=spool) as tar:
        for member in tar:
            if not member.isfile():
                continue
            content = tar.extractfile(member)
            assert content is not None
            data = content.read()
            seen += 1
            assert not any(word in data for word in words), member.name
            if member.name.startswith(("etc/apt/", "var/lib/apt/", "var/cache/apt/")):
                assert not any(word in data for word in mirrors), member.name
            assert not member.name.startswith(("run/secrets/", "var/log/")), member.name
            assert not member.name.endswith((".deb", ".whl")), member.name
    assert seen > 2000


@pytest.mark.engine
def test_minimal_on_a_given_image(engine: Engine, registry: str, base: Reference, project: Paths) -> None:
    bare = tiny()
    commit(bare, project, "minimal")
    staging = f"{registry}/test-staging"
    first = build(bare, paths=project, engine=engine, staging=staging, base=base)
    assert "no compiler" in in_container(engine, first.ref, "command -v gcc || echo no compiler", "65532")
    given = Base(
        name="given", kind="image", glibc="2.36", python=("3.11",), suite="bookworm", ref=str(first.ref)
    )
    cell = tiny(name="tiny-minimal", flavour="minimal", base=given, compiler=True)
    commit(cell, project, "")
    done = build(cell, paths=project, engine=engine, staging=staging)
    try:
        assert done.base_digest == first.ref.digest
        script = "gcc --version; echo $CC $TRITON_CACHE_DIR; python3 -c 'import torch; print(torch.SALT)'"
        text = in_container(engine, done.ref, script, "65532")
        assert "gcc (Debian" in text and "gcc /cache/triton" in text and "minimal" in text
        by_cell = Base(name="v72", kind="cell", glibc="2.36", python=("3.11",), suite="bookworm", ref="tiny")
        same = tiny(name="tiny-minimal", flavour="minimal", base=by_cell, compiler=True)
        again = build(same, paths=project, engine=engine, staging=staging)
        assert again.build_id == done.build_id  # the newest build of the cell that `ref` names
    finally:
        drop(engine, done, first)


@pytest.mark.engine
def test_a_failed_step_is_quoted_and_leaves_no_record(
    engine: Engine, registry: str, base: Reference, project: Paths
) -> None:
    layer = project.templates / "partials" / "users.j2"
    layer.write_text(
        layer.read_text().replace("mkdir -p /cache", "echo 'a.bin: No space left on device' >&2; exit 7")
    )
    commit(tiny(), project, "fails")
    with pytest.raises(BuildFailed) as raised:
        build(tiny(), paths=project, engine=engine, staging=f"{registry}/test-staging", base=base)
    assert raised.value.exit_code == 3
    assert "a.bin: No space left on device" in raised.value.message
    assert "known failure: the disk filled up" in raised.value.message
    assert raised.value.log.is_file() and "No space left on device" in raised.value.log.read_text()
    assert "docker system df" in raised.value.fix and str(raised.value.log) in raised.value.fix
    assert builds_of(project) == ()


@pytest.mark.engine
def test_wheels_that_the_engine_dropped_are_handed_over_again(
    engine: Engine, registry: str, base: Reference, project: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BuildKit may clear a cache between two steps: the first hand-over is left out here, as if it had."""
    commit(tiny(), project, secrets.token_hex(4))
    fill, calls = wheel_store.fill, []

    def late(*words: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) > 1:
            fill(*words, **options)

    monkeypatch.setattr(wheel_store, "fill", late)
    told: list[str] = []
    done = build(
        tiny(), paths=project, engine=engine, staging=f"{registry}/test-staging", base=base, note=told.append
    )
    drop(engine, done)
    assert len(calls) == 2
    assert "tiny: the engine dropped wheels to make room" in told


@pytest.mark.engine
def test_a_stale_dockerfile_is_refused_before_anything_is_done(
    engine: Engine, registry: str, project: Paths
) -> None:
    commit(tiny(), project, "stale")
    (project.images / tiny().id / "Dockerfile").write_text("FROM scratch\n")
    with pytest.raises(InputError, match="is not what the templates and the lock render"):
        build(tiny(), paths=project, engine=engine, staging=f"{registry}/test-staging")


INTERRUPTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits it ignored
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tiny_cell import REAL, tiny
from mtbuild.digest import Reference
from mtbuild.paths import Paths
from mtbuild.prove.build import build
from mtbuild.prove.engine import connect
paths = Paths(root=Path(sys.argv[2]), cache=Path(sys.argv[2]) / "cache")
base = Reference.parse(sys.argv[4])
build(tiny(), paths=paths, engine=connect(REAL), staging=sys.argv[3], base=base, note=print)
"""


@pytest.fixture
def sleeper(project: Paths) -> str:
    """A build step that takes long enough to be interrupted, known by its odd number of seconds."""
    seconds = f"{300 + secrets.randbelow(10_000) / 10_000:.4f}"
    layer = project.templates / "partials" / "runtime-deps.j2"
    last = "--no-index --no-deps /run/runtime/*.whl"
    assert last in layer.read_text()
    layer.write_text(layer.read_text().replace(last, f"{last}\nsleep {seconds}"))
    return seconds


def running(word: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
        if word in words and f"/{os.getpid()}" != f"/{entry.name}":
            found.append(words)
    return found


@pytest.mark.engine
def test_ctrl_c_leaves_nothing_running(
    engine: Engine, registry: str, base: Reference, project: Paths, sleeper: str
) -> None:
    commit(tiny(), project, "interrupted")
    staging = f"{registry}/test-staging"
    words = [
        sys.executable,
        "-c",
        INTERRUPTED,
        str(Path(__file__).parent),
        str(project.root),
        staging,
        str(base),
    ]
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    end = time.monotonic() + 240
    while not any(f"sleep {sleeper}" in one for one in running(sleeper)) and time.monotonic() < end:
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
        time.sleep(0.5)
    assert running(sleeper)
    process.send_signal(signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0 and b"KeyboardInterrupt" in errors
    end = time.monotonic() + 60
    while running(sleeper) and time.monotonic() < end:
        time.sleep(0.5)
    assert running(sleeper) == []
    assert builds_of(project) == ()
