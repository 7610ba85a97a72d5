"""Promotion into a real registry: what is out is proven, whatever happens on the way."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from publish_samples import (
    H200,
    NOW,
    RTX4090,
    V73,
    build_of,
    cell_of,
    policy_of,
    proxy,
    push_image,
)

from mtbuild.errors import InfrastructureError, InputError
from mtbuild.publish import catalog, promote
from mtbuild.publish.keys import Keys
from mtbuild.publish.promote import RefusedError, TagTakenError, release_tag
from mtbuild.publish.referrers import attached, fallback_tag
from mtbuild.publish.registry import Repository
from mtbuild.publish.transport import Transport
from mtbuild.publish.verify import parse_name, verify

if TYPE_CHECKING:
    from publish_samples import Desk

    from mtbuild.plan.cell import Cell
    from mtbuild.publish.job import Job
    from mtbuild.publish.registry import Manifest


def test_a_checked_image_comes_out_byte_for_byte(desk: Desk, image: Manifest) -> None:
    out = desk.publish(desk.signed())
    tag = f"{V73.id}-{desk.build.build_id[:12]}-checked"
    assert out.tags == (tag, f"{V73.id}-checked")
    assert out.name == f"{desk.release.name}:{tag}@{image.digest}"
    assert out.changed
    assert desk.tags() == {tag, f"{V73.id}-checked", "catalog"}
    assert desk.release.manifest(tag).body == image.body
    assert all(desk.release.has_blob(blob.digest) for blob in image.blobs)
    steps = verify(desk.release, parse_name(out.name), desk.keys.trusted, now=NOW)
    assert all(step.passed for step in steps), steps
    verdict = json.loads((desk.paths.cell(V73.id, desk.build.build_id[:12]) / "verdict.json").read_text())
    assert (verdict["schema"], verdict["passed"], verdict["digest"]) == (1, True, str(image.digest))


def test_a_verified_image_moves_the_aliases(desk: Desk, image: Manifest) -> None:
    out = desk.publish(desk.signed(), desk.signed(gpu=H200), channel="verified", aliases=("latest-cu126",))
    assert out.tags == (f"{V73.id}-{desk.build.build_id[:12]}", V73.id, "v73", "latest-cu126")
    assert all(desk.release.manifest(tag).body == image.body for tag in out.tags)
    read = catalog.read(desk.release, desk.keys.trusted)
    assert read is not None
    (entry,) = read.entries
    assert [floor.component for floor in entry.image.floors] == [
        "torch 2.7.1 (CUDA 12.6)",
        "xformers 0.0.31 (CUDA 12.8)",
        "ptxas of triton 3.3.1",
    ]
    assert [run.device.name if run.device else "cpu" for run in entry.runs] == ["cpu", "NVIDIA H200"]


def test_a_tag_that_another_machine_took_while_blobs_were_copied_is_not_moved(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    tag = release_tag(V73.id, desk.build.build_id, "checked")
    other = push_image(desk.release)

    def meanwhile(job: Job) -> None:
        desk.release.put_manifest(other, tag=tag)

    monkeypatch.setattr(promote, "_read_back", meanwhile)
    with pytest.raises(TagTakenError, match="write-once"):
        desk.publish(desk.signed())
    assert desk.release.manifest(tag).digest == other.digest


def test_publishing_again_changes_nothing(desk: Desk) -> None:
    first = desk.publish(desk.signed())
    before = {tag: desk.release.manifest(tag).digest for tag in desk.release.tags()}
    again = desk.publish()  # the evidence lies with the digest now
    assert (again.tags, again.changed) == (first.tags, False)
    assert {tag: desk.release.manifest(tag).digest for tag in desk.release.tags()} == before


def test_evidence_lies_in_staging_and_in_release(desk: Desk, image: Manifest) -> None:
    envelope = desk.signed()
    desk.publish(envelope)
    assert attached(desk.staging, image.digest) == (envelope,)
    there = attached(desk.release, image.digest)
    assert envelope in there
    assert len(there) == 2  # and the verdict, which is bound to this repository
    index = desk.release.manifest(fallback_tag(image.digest))
    kinds = {e["annotations"]["dev.sigstore.bundle.predicateType"] for e in index.data["manifests"]}
    assert kinds == {
        "https://in-toto.io/attestation/test-result/v0.1",
        "https://slsa.dev/verification_summary/v1",
    }


def test_a_failed_run_is_attested_and_lets_nothing_out(desk: Desk, image: Manifest) -> None:
    envelope = desk.signed(bad={"triton.aot": "failed"})
    with pytest.raises(RefusedError) as caught:
        desk.publish(envelope)
    assert caught.value.exit_code == 1
    assert "triton.aot (as 65532:65532) failed on a CPU" in str(caught.value)
    assert attached(desk.staging, image.digest) == (envelope,)
    assert desk.release.tags() == ()
    assert desk.release.find_manifest(image.digest) is None
    with pytest.raises(RefusedError):
        desk.publish()  # and it is remembered
    desk.publish(desk.signed(finished=NOW))  # until a newer run passes


def test_a_gpu_that_fails_later_is_known_bad_in_the_catalog(desk: Desk) -> None:
    desk.publish(desk.signed(gpu=H200), channel="verified")
    tags = desk.tags()
    desk.publish(desk.signed(gpu=RTX4090, bad={"triton.jit": "failed"}), channel="verified")
    assert desk.tags() == tags
    read = catalog.read(desk.release, desk.keys.trusted)
    assert read is not None
    assert {run.device.sm: run.passed for run in read.entries[0].runs if run.device} == {
        "8.9": False,
        "9.0": True,
    }


@pytest.mark.parametrize("channel", ["checked", "verified"])
def test_a_cpu_run_opens_the_checked_channel_only(desk: Desk, channel: str) -> None:
    if channel == "checked":
        assert desk.publish(desk.signed(), channel=channel).channel == "checked"
    else:
        with pytest.raises(RefusedError, match="used no GPU"):
            desk.publish(desk.signed(), channel=channel)
        assert desk.release.tags() == ()


def test_no_evidence_no_tag(desk: Desk) -> None:
    with pytest.raises(RefusedError, match="there is no evidence"):
        desk.publish()
    assert desk.release.tags() == ()
    assert attached(desk.staging, desk.build.ref.digest) == ()


def test_build_record_policy_and_repositories_must_fit(desk: Desk) -> None:
    with pytest.raises(InputError, match="the build record is about"):
        desk.publish(desk.signed(), cell=cell_of(torch="2.8.0"), policy=policy_of(desk.build, desk.keys))
    with pytest.raises(InputError, match="same repository"):
        desk.publish(desk.signed(), release=desk.staging.name)
    with pytest.raises(InputError, match="the policy is for"):
        desk.publish(desk.signed(), policy=policy_of(replace(desk.build, build_id="0" * 64), desk.keys))


def test_a_registry_with_a_referrers_api_is_used_by_it(desk: Desk, registry: str, image: Manifest) -> None:
    with proxy(registry) as (host, faults):
        faults.referrers = True
        name = f"{host}/{desk.release.path}"
        out = desk.publish(desk.signed(), release=name)
        with Repository.open(name) as release:
            assert len(attached(release, image.digest)) == 2
            assert all(s.passed for s in verify(release, parse_name(out.name), desk.keys.trusted, now=NOW))
            assert release.find_manifest(fallback_tag(image.digest)) is None


def test_between_two_registries_blobs_are_copied(desk: Desk, registry: str, image: Manifest) -> None:
    with proxy(registry) as (host, _):
        out = desk.publish(desk.signed(), release=f"{host}/{desk.release.path}")
    assert out.repository.startswith(host)
    assert desk.release.manifest(out.tags[0]).body == image.body


# Killed at any moment. "Proven" is what a stranger sees: every tag but the fallback's verifies.


def unproven(desk: Desk, name: str, cell: Cell = V73) -> list[str]:
    """Tags of the release repository that do not verify by digest, evidence and verdict."""
    bad = []
    for tag in desk.tags() - {catalog.TAG}:
        digest = desk.release.manifest(tag).digest
        reference = f"{name}@{digest}"
        bound = Repository(Transport(desk.release.transport.host), desk.release.path)
        statements, summaries = catalog.proof_of(_Named(bound, name), digest, desk.keys.trusted)
        if not statements or not summaries:
            bad.append(f"{tag} → {reference}")
    return bad


class _Named(Repository):
    """The repository as its publisher named it: a verdict is bound to that name."""

    def __init__(self, repository: Repository, name: str) -> None:
        super().__init__(repository.transport, repository.path)
        self._name = name

    @property
    def name(self) -> str:
        return self._name


@pytest.mark.parametrize("lost", [False, True], ids=["write refused", "answer lost"])
def test_cut_off_again_and_again_it_goes_on(desk: Desk, registry: str, lost: bool) -> None:
    """Each attempt is cut one write later than the one before, on what that one left behind."""
    runs = (desk.signed(), desk.signed(gpu=H200))
    with proxy(registry) as (host, faults):
        name = f"{host}/{desk.release.path}"
        faults.answer_lost = lost
        out = None
        for allowed in range(60):
            faults.writes, faults.fail_after_writes = 0, allowed
            try:
                out = desk.publish(*runs, channel="verified", release=name, aliases=("latest",))
                break
            except InfrastructureError as error:
                assert error.exit_code == 3
            assert unproven(desk, name) == []
            if aliases := desk.tags() & {V73.id, "v73", "latest"}:
                assert release_tag(V73.id, desk.build.build_id, "verified") in desk.tags(), aliases
        assert allowed >= 3
        assert out is not None
        faults.fail_after_writes = None
        with Repository.open(name) as release:
            assert all(s.passed for s in verify(release, parse_name(out.name), desk.keys.trusted, now=NOW))


@pytest.mark.slow
def test_cut_off_at_every_write_of_a_first_publication(desk: Desk, registry: str) -> None:
    """As above, but each cut meets a repository in which nothing lies yet."""
    run = desk.signed()
    with proxy(registry) as (host, faults):
        for allowed in range(60):
            path = f"{desk.release.path}-{allowed}"
            fresh = replace(desk, release=Repository(desk.release.transport, path))
            faults.writes, faults.fail_after_writes = 0, allowed
            try:
                fresh.publish(run, release=f"{host}/{path}")
                break
            except InfrastructureError:
                assert unproven(fresh, f"{host}/{path}") == []
                assert f"{V73.id}-checked" not in fresh.tags() or len(fresh.tags()) >= 2
        assert allowed > 10  # blobs, manifest, evidence, verdict, tag, alias, catalog


@pytest.mark.slow
def test_killed_by_the_system_and_run_again(desk: Desk, registry: str, tmp_path: Path) -> None:
    """SIGKILL at a dozen moments; then the same command ends the work."""
    script = tmp_path / "killed.py"
    script.write_text(
        "import sys, json\n"
        f"sys.path[:0] = {[str(Path(__file__).parent)]!r}\n"
        "from pathlib import Path\n"
        "from publish_samples import *\n"
        "from mtbuild.digest import Reference\n"
        "from mtbuild.paths import Paths\n"
        "from mtbuild.publish.keys import Keys\n"
        "from mtbuild.publish.promote import publish\n"
        "ref, release, build_id, root = sys.argv[1:]\n"
        "ref, root = Reference.parse(ref), Path(root)\n"
        "keys = Keys.ensure(root / 'keys')\n"
        "build = SampleBuild(cell_id=V73.id, cell_name='v73', build_id=build_id, ref=ref)\n"
        "print('ready', flush=True)\n"
        "runs = [signed(report_of(ref), build, keys)]\n"
        "publish(ref, cell=V73, build=build, envelopes=runs, release=release,\n"
        "        channel='checked', paths=Paths(root=root, cache=root), keys=keys, now=NOW,\n"
        "        policy=policy_of(build, keys))\n"
        "print('done', flush=True)\n"
    )
    desk.keys = Keys.ensure(tmp_path / "keys")
    command = [
        sys.executable,
        str(script),
        str(desk.build.ref),
        desk.release.name,
        desk.build.build_id,
        str(tmp_path),
    ]
    done = False
    for moment in range(12):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.01 * moment)
        process.send_signal(signal.SIGKILL)
        done = "done" in process.stdout.read()
        process.wait(10)
        process.stdout.close()
        assert unproven(desk, desk.release.name) == []
        if done:
            break
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    assert finished.stdout.splitlines()[-1] == "done"
    assert unproven(desk, desk.release.name) == []
    assert f"{V73.id}-checked" in desk.tags()


def test_two_publishers_at_once_lose_nothing(desk: Desk) -> None:
    builds = [build_of(desk.staging, push_image(desk.staging)) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        out = list(pool.map(lambda build: desk.publish(desk.signed(build=build), build=build), builds))
    read = catalog.read(desk.release, desk.keys.trusted)
    assert read is not None
    assert {entry.digest for entry in read.entries} == {one.digest for one in out}
    assert {one.tags[0] for one in out} <= desk.tags()
    assert catalog.rebuild(desk.release, desk.keys) == read


def test_old_evidence_lets_nothing_out(desk: Desk) -> None:
    with pytest.raises(RefusedError, match="91 days old"):
        desk.publish(desk.signed(finished=NOW - timedelta(days=91)))
    assert desk.release.tags() == ()
