"""The commands publish, verify, pick and catalog as they are typed, in a project of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from publish_samples import H200, V73, report_of, signed

from mtbuild.digest import Digest
from mtbuild.prove.build import Build
from mtbuild.prove.smoke import suite_digest
from mtbuild.publish.keys import Keys

if TYPE_CHECKING:
    from mtbuild.publish.registry import Manifest, Repository

MATRIX = """\
schema: 1
bases:
  bookworm: {{kind: bootstrap, suite: bookworm, glibc: "2.36", python: ["3.11"]}}
cells:
  - name: v73
    base: bookworm
    python: "3.11"
    torch: "2.7.1"
    cuda: "12.6"
    triton: "3.3.1"
    xformers: "0.0.31"
    targets: ["8.0", "8.6", "8.9", "9.0"]
aliases: {{latest-cu126: v73}}
registry: {{staging: "{staging}", release: "{release}"}}
"""


@dataclass
class Project:
    """A folder with matrix.yaml, a key, and one build in staging."""

    root: Path
    build: Build
    keys: Keys
    release: str

    def run(self, *words: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from mtbuild.cli import main; main()", "--root", str(self.root)]
        done = subprocess.run(
            [*command, *map(str, words)], capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == expect, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    def evidence(self, name: str, **changes: Any) -> Path:
        report = report_of(
            self.build.ref, finished=datetime.now(UTC) - timedelta(hours=1), suite=suite_digest(), **changes
        )
        path = self.root / name
        signed(report, self.build, self.keys).write(path)  # type: ignore[arg-type]
        return path

    def record(self, **changes: Any) -> Path:
        path = self.root / "build.json"
        path.write_text(Build(**{**vars(self.build), **changes}).to_json())
        return path


@pytest.fixture
def project(tmp_path: Path, names: tuple[str, str], staging: Repository, image: Manifest) -> Project:
    (tmp_path / "matrix.yaml").write_text(MATRIX.format(staging=names[0], release=names[1]))
    build = Build(
        cell_id=V73.id,
        cell_name="v73",
        build_id=Digest.of(image.body).hex,
        ref=staging.reference(image.digest),
        config_digest=image.blobs[0].digest,
        base_digest=Digest.of(b"base"),
        size_bytes=1,
        seconds=1.0,
        override=None,
        created="2026-11-22T10:00:00.000000+00:00",
    )
    folder = tmp_path / ".mtbuild" / "cells" / V73.id / build.build_id[:12]
    folder.mkdir(parents=True)
    (folder / "build.json").write_text(build.to_json())
    keys = Keys.ensure(tmp_path / ".mtbuild" / "keys")
    return Project(root=tmp_path, build=build, keys=keys, release=names[1])


def test_from_evidence_to_a_verified_pick(project: Project) -> None:
    cpu, gpu = project.evidence("cpu.json"), project.evidence("gpu.json", gpu=H200)
    done = project.run(
        "publish", project.build.ref, "--cell", "v73", "--evidence", cpu, "--evidence", gpu, "--json"
    )
    document = json.loads(done.stdout)
    assert document["channel"] == "verified"
    assert document["tags"] == [f"{V73.id}-{project.build.build12}", V73.id, "v73", "latest-cu126"]
    name = document["name"]
    picked = project.run("pick", "--gpu", "H200", "--driver", "580.95.05")
    entry = json.loads(project.run("pick", "--gpu", "H200", "--json").stdout)
    assert entry["expires"] == entry["entry"]["expires"]
    assert f"\n  expires   {entry['expires']}\n" in picked.stdout
    assert picked.stdout.splitlines()[0] == name
    assert "same-gpu: passed on NVIDIA H200 with driver 580.95.05" in picked.stdout
    assert json.loads(project.run("pick", "--sm", "9.0", "--json").stdout)["name"] == name
    verified = project.run("verify", name)
    assert verified.stdout.startswith("1. ✓ the digest is served")
    assert verified.stdout.splitlines()[-1] == "verified"
    listed = project.run("catalog", "show")
    assert "1 entries" in listed.stdout
    before = project.run("catalog", "show", "--json").stdout
    assert project.run("catalog", "rebuild", "--json").stdout == before


def test_checked_and_again(project: Project) -> None:
    cpu = project.evidence("cpu.json")
    words = ("publish", project.build.ref, "--cell", V73.id, "--evidence", cpu)
    first = project.run(*words)
    assert "checked, by 1 run(s)" in first.stdout
    assert "(nothing to change)" in project.run(*words).stdout
    picked = project.run("pick", "--channel", "checked")
    assert picked.stdout.splitlines()[0] == first.stdout.splitlines()[0]
    none = project.run("pick", "--gpu", "RTX 4090", expect=1)
    assert "checked only: no GPU run stands behind it" in none.stderr


def test_a_deployer_needs_the_public_key_and_nothing_else(project: Project, tmp_path: Path) -> None:
    name = project.run(
        "publish", project.build.ref, "--cell", "v73", "--evidence", project.evidence("gpu.json", gpu=H200)
    ).stdout.splitlines()[0]
    public = project.root / ".mtbuild" / "keys" / "mtbuild.pub"
    elsewhere = Project(
        root=tmp_path / "empty", build=project.build, keys=project.keys, release=project.release
    )
    elsewhere.root.mkdir()
    options = ("--release", project.release, "--key", public)
    assert elsewhere.run("pick", "--gpu", "nvidia h200", *options).stdout.splitlines()[0] == name
    assert elsewhere.run("verify", name, "--key", public).stdout.endswith("verified\n")
    assert "there is no public key" in elsewhere.run("verify", name, expect=2).stderr
    assert not list(elsewhere.root.iterdir())


def test_a_refusal_says_what_why_and_what_to_do(project: Project) -> None:
    bad = project.evidence("bad.json", bad={"triton.aot": "failed"})
    done = project.run("publish", project.build.ref, "--cell", "v73", "--evidence", bad, expect=1)
    assert "triton.aot (as 65532:65532) failed on a CPU" in done.stderr
    assert "because: " in done.stderr
    assert "fix: " in done.stderr
    assert "has no catalog" in project.run("pick", "--channel", "checked", expect=1).stderr
    verify = project.run("verify", f"{project.release}@{project.build.ref.digest}", expect=1)
    assert "NOT verified" in verify.stdout


def test_an_overridden_build_is_refused(project: Project) -> None:
    record = project.record(override="to look at it")
    done = project.run(
        "publish", project.build.ref, "--cell", "v73", "--build", record,
        "--evidence", project.evidence("gpu.json", gpu=H200), expect=1,
    )  # fmt: skip
    assert "forced past the compatibility rules (to look at it)" in done.stderr


def test_bad_input_is_named(project: Project, tmp_path: Path) -> None:
    ref, digest = project.build.ref, project.build.ref.digest
    done = project.run("publish", f"{ref.repository}:tag", "--cell", "v73", expect=2)
    assert "names no digest" in done.stderr
    assert "Did you mean 'v73'" in project.run("publish", ref, "--cell", "v74", expect=2).stderr
    other = f"{ref.repository}@{Digest.of(b'other')}"
    assert "no record here of a build" in project.run("publish", other, "--cell", "v73", expect=2).stderr
    absent = tmp_path / "absent.json"
    missing = project.run("publish", ref, "--cell", "v73", "--evidence", absent, expect=2)
    assert str(absent) in missing.stderr
    assert "--build" in project.run("publish", ref, "--cell", "v73", "--build", absent, expect=2).stderr
    assert (
        "error: --release: 'none' is not a repository"
        in project.run("pick", "--sm", "9.0", "--release", "none", expect=2).stderr
    )
    assert "for which GPU?" in project.run("pick", expect=2).stderr
    assert "names no digest" in project.run("verify", f"{ref.repository}:tag", expect=2).stderr
    assert str(digest) not in done.stdout


def test_a_registry_that_is_away_is_infrastructure(project: Project) -> None:
    done = project.run("pick", "--sm", "9.0", "--release", "127.0.0.1:9/none", expect=3)
    assert "127.0.0.1:9 does not answer" in done.stderr
    away = f"127.0.0.1:9/none@{project.build.ref.digest}"
    project.run("publish", away, "--cell", "v73", "--build", project.record(), expect=3)
