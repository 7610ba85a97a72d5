"""Second opinions: cosign, crane and oras on what mtbuild published, and what cosign signed, by mtbuild."""

from __future__ import annotations

import base64
import json
import secrets
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "publish"))

from publish_samples import H200, NOW, V73, build_of, policy_of, push_image, report_of, signed

from mtbuild.paths import Paths
from mtbuild.prove.local_registry import ensure_registry, stop_registry
from mtbuild.prove.programs import public_clients
from mtbuild.publish import dsse
from mtbuild.publish.keys import Keys, PublicKey
from mtbuild.publish.promote import publish
from mtbuild.publish.referrers import attached
from mtbuild.publish.registry import Repository

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mtbuild.publish.promote import Promotion

pytestmark = pytest.mark.engine  # needs Debian's mirror for the public programs

TEST_RESULT = "https://in-toto.io/attestation/test-result/v0.1"
VSA = "https://slsa.dev/verification_summary/v1"


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs, unpacked from Debian's packages."""
    return public_clients(Paths.of(tmp_path_factory.mktemp("clients")))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    paths = Paths.of(tmp_path_factory.mktemp("registry"))
    yield ensure_registry(paths)
    stop_registry(paths)


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys.ensure(tmp_path / ".mtbuild" / "keys")


@pytest.fixture
def published(host: str, keys: Keys, tmp_path: Path) -> Promotion:
    """A verified image of random layers, published by mtbuild."""
    unique = secrets.token_hex(6)
    with Repository.open(f"{host}/e{unique}/staging") as staging:
        manifest = push_image(staging, layers=3)
        build = build_of(staging, manifest)
    return publish(
        build.ref,
        cell=V73,
        build=build,
        envelopes=[signed(report_of(build.ref, gpu=H200), build, keys)],
        release=f"{host}/e{unique}/release",
        channel="verified",
        paths=Paths(root=tmp_path, cache=tmp_path / "cache"),
        keys=keys,
        policy=policy_of(build, keys, channel="verified"),
        aliases=("latest-cu126",),
        now=NOW,
    )


def run(*words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    home = {
        "HOME": str(cwd or "/nonexistent"),
        "PATH": "/usr/bin:/bin",
        "COSIGN_PASSWORD": "",
        "TUF_ROOT": str(cwd),
    }
    return subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        timeout=120,
        env=home,
    )


def cosign_verify(
    programs: Path, ref: str, key: Path, kind: str, cwd: Path
) -> subprocess.CompletedProcess[str]:
    return run(
        programs / "cosign", "verify-attestation", "--key", key, "--insecure-ignore-tlog", "--type", kind,
        "--allow-insecure-registry", ref, cwd=cwd,
    )  # fmt: skip


@pytest.mark.parametrize("kind", [TEST_RESULT, VSA])
def test_cosign_verifies_our_evidence_with_our_public_key(
    programs: Path, published: Promotion, tmp_path: Path, kind: str
) -> None:
    ref = f"{published.repository}@{published.digest}"
    public = tmp_path / ".mtbuild" / "keys" / "mtbuild.pub"
    done = cosign_verify(programs, ref, public, kind, tmp_path)
    assert done.returncode == 0, done.stderr
    envelope = json.loads(done.stdout.splitlines()[0])
    statement = json.loads(base64.b64decode(envelope["payload"]))
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == kind
    assert statement["subject"][0]["digest"] == {"sha256": published.digest.hex}


def test_cosign_refuses_another_key_and_another_image(
    programs: Path, published: Promotion, host: str, tmp_path: Path
) -> None:
    ref = f"{published.repository}@{published.digest}"
    Keys.ensure(tmp_path / "stranger")
    assert (
        cosign_verify(programs, ref, tmp_path / "stranger" / "mtbuild.pub", TEST_RESULT, tmp_path).returncode
        != 0
    )
    with Repository.open(published.repository) as repository:
        other = push_image(repository)
    public = tmp_path / ".mtbuild" / "keys" / "mtbuild.pub"
    done = cosign_verify(programs, f"{published.repository}@{other.digest}", public, TEST_RESULT, tmp_path)
    assert done.returncode != 0


def test_what_cosign_signs_mtbuild_verifies(programs: Path, published: Promotion, tmp_path: Path) -> None:
    ref = f"{published.repository}@{published.digest}"
    made = run(programs / "cosign", "generate-key-pair", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    config = run(programs / "cosign", "signing-config", "create", "--out", "sc.json", cwd=tmp_path)
    assert config.returncode == 0, config.stderr
    (tmp_path / "predicate.json").write_text('{"result": "PASSED"}')
    done = run(
        programs / "cosign", "attest", "--yes", "--key", "cosign.key", "--signing-config", "sc.json",
        "--predicate", "predicate.json", "--type", "https://example.org/mine",
        "--allow-insecure-registry", ref, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    theirs = PublicKey.load(tmp_path / "cosign.pub")
    with Repository.open(published.repository) as repository:
        envelopes = attached(repository, published.digest)
    assert len(envelopes) == 3  # ours stayed where they were
    (envelope,) = [one for one in envelopes if one.hint == theirs.hint]
    assert dsse.verify(envelope, [theirs]) == theirs


def test_crane_sees_one_digest_behind_every_tag(programs: Path, published: Promotion, tmp_path: Path) -> None:
    for tag in published.tags:
        done = run(programs / "crane", "digest", "--insecure", f"{published.repository}:{tag}", cwd=tmp_path)
        assert done.stdout.strip() == str(published.digest), done.stderr
    assert set(published.tags) == {f"{V73.id}-{published.tags[0][-12:]}", V73.id, "v73", "latest-cu126"}


def test_oras_finds_the_evidence_and_pulls_the_catalog(
    programs: Path, published: Promotion, tmp_path: Path
) -> None:
    ref = f"{published.repository}@{published.digest}"
    found = run(programs / "oras", "discover", "--plain-http", "--format", "json", ref, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    listed = json.loads(found.stdout)
    kinds = [one["artifactType"] for one in listed.get("referrers") or listed["manifests"]]
    assert kinds == ["application/vnd.dev.sigstore.bundle.v0.3+json"] * 2
    manifest = run(
        programs / "oras",
        "manifest",
        "fetch",
        "--plain-http",
        f"{published.repository}:catalog",
        cwd=tmp_path,
    )
    layers = {one["mediaType"]: one["digest"] for one in json.loads(manifest.stdout)["layers"]}
    blob = run(
        programs / "oras", "blob", "fetch", "--plain-http", "--output", "-",
        f"{published.repository}@{layers['application/vnd.mtbuild.catalog.v1+json']}", cwd=tmp_path,
    )  # fmt: skip
    assert json.loads(blob.stdout)["entries"][0]["digest"] == str(published.digest)
