"""The catalog is made of tags, verdicts and evidence alone, so it can be made anew at any time."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
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
    push_image,
    report_of,
    signed,
)

from mtbuild.digest import Digest
from mtbuild.publish import catalog, dsse
from mtbuild.publish.dsse import UnverifiedError
from mtbuild.publish.keys import Keys
from mtbuild.publish.pick import NoPickError, Wish, pick
from mtbuild.publish.promote import RefusedError, publish
from mtbuild.publish.registry import MANIFEST, Manifest
from mtbuild.publish.verify import parse_name, verify

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

    from mtbuild.paths import Paths
    from mtbuild.plan.cell import Cell
    from mtbuild.prove.report import SmokeReport
    from mtbuild.publish.catalog import Catalog
    from mtbuild.publish.registry import Repository

T280 = cell_of(name="t280", torch="2.8.0", cuda="12.8", triton="3.4.0", xformers="0.0.32.post2")


@pytest.fixture
def history(staging: Repository, release: Repository, keys: Keys, paths: Paths) -> Catalog:
    """Three builds of two cells, one in both channels, one with a GPU that failed later."""

    def out(cell: Cell, created: str, channel: str, *runs: dict[str, str] | None, image: Manifest) -> None:
        build = build_of(staging, image, cell, created=created)
        publish(
            build.ref,
            cell=cell,
            build=build,
            envelopes=[
                signed(report_of(build.ref, cell=cell, gpu=gpu), build, keys, cell=cell) for gpu in runs
            ],
            release=release.name,
            channel=channel,  # type: ignore[arg-type]
            paths=paths,
            keys=keys,
            policy=policy_of(build, keys, cell=cell, channel=channel),
            now=NOW,
        )

    one, two, three = (push_image(staging) for _ in range(3))
    out(V73, "2026-11-20T00:00:00Z", "checked", None, image=one)
    out(V73, "2026-11-20T00:00:00Z", "verified", H200, RTX4090, image=one)
    out(T280, "2026-11-21T00:00:00Z", "checked", None, image=two)
    out(V73, "2026-11-22T00:00:00Z", "verified", H200, image=three)
    read = catalog.read(release, keys.trusted)
    assert read is not None
    return read


def test_made_anew_it_is_the_same_to_the_byte(history: Catalog, release: Repository, keys: Keys) -> None:
    assert [(e.image.cell_name, e.channel) for e in history.entries] == [
        ("v73", "verified"),
        ("v73", "checked"),
        ("v73", "verified"),
        ("t280", "checked"),
    ]
    assert catalog.rebuild(release, keys).to_bytes() == history.to_bytes()


def test_lost_or_spoilt_it_comes_back(
    history: Catalog, release: Repository, keys: Keys, tmp_path: Path
) -> None:
    stranger = Keys.ensure(tmp_path / "stranger")
    catalog.rebuild(release, replace(stranger, trusted=(*stranger.trusted, *keys.trusted)))
    with pytest.raises(UnverifiedError, match="signed by no key that is believed"):
        catalog.read(release, keys.trusted)
    notes: list[str] = []
    assert catalog.update(release, history.entries[0].digest, keys, note=notes.append)
    assert any("making it anew" in note for note in notes)
    assert catalog.read(release, keys.trusted) == history


def test_a_tag_without_a_verdict_is_in_no_catalog(history: Catalog, release: Repository, keys: Keys) -> None:
    smuggled = push_image(release)
    release.put_manifest(smuggled, tag="torch9-cu999-deadbeef0000")
    # ... nor does a write-once tag that was moved onto other bytes stand for what it was
    release.put_manifest(smuggled, tag=history.entries[0].image.tag)
    made = catalog.rebuild(release, keys)
    assert made.entries == history.entries[1:]


def test_a_verdict_does_not_count_in_another_repository(
    history: Catalog, release: Repository, staging: Repository, keys: Keys
) -> None:
    entry = history.entries[0]
    manifest = release.manifest(entry.digest)
    staging.put_manifest(manifest, tag=entry.image.tag)
    from mtbuild.publish.referrers import attach, attached

    for envelope in attached(release, entry.digest):
        attach(staging, manifest, envelope)  # the same signed verdict, copied over
    statements, summaries = catalog.proof_of(staging, entry.digest, keys.trusted)
    assert statements
    assert summaries == ()


def test_a_catalog_signed_for_other_bytes_is_refused(
    history: Catalog, release: Repository, keys: Keys
) -> None:
    """The old signature beside new entries."""
    manifest = release.manifest(catalog.TAG).data
    bent = json.loads(history.to_bytes())
    bent["entries"][0]["channel"] = "checked"
    layer = release.put_blob(json.dumps(bent).encode(), media_type=catalog.MEDIA_TYPE)
    manifest["layers"][0] = layer.to_json()
    release.put_manifest(Manifest(body=json.dumps(manifest).encode(), media_type=MANIFEST), tag=catalog.TAG)
    with pytest.raises(UnverifiedError, match="signature of something else"):
        catalog.read(release, keys.trusted)


def test_a_signature_of_another_kind_is_refused(history: Catalog, release: Repository, keys: Keys) -> None:
    manifest = release.manifest(catalog.TAG).data
    body = {"predicateType": "tag:other", "subject": [{"digest": {"sha256": "0" * 64}}]}
    bundle = release.put_blob(dsse.sign(json.dumps(body).encode(), keys.own).body, media_type=dsse.BUNDLE)
    manifest["layers"][1] = bundle.to_json()
    release.put_manifest(Manifest(body=json.dumps(manifest).encode(), media_type=MANIFEST), tag=catalog.TAG)
    with pytest.raises(UnverifiedError, match="signature of something else"):
        catalog.read(release, keys.trusted)
    assert history.entries


def test_the_catalog_of_another_repository_is_refused(
    history: Catalog, release: Repository, staging: Repository, keys: Keys
) -> None:
    manifest = release.manifest(catalog.TAG)
    for blob in manifest.blobs:
        staging.copy_blob(release, blob)
    staging.put_manifest(manifest, tag=catalog.TAG)
    with pytest.raises(UnverifiedError, match=f"is the catalog of {release.name}"):
        catalog.read(staging, keys.trusted)


def test_what_does_not_fit_the_schema_is_named(history: Catalog) -> None:
    data = json.loads(history.to_bytes())
    data["entries"][0]["image"]["torch"] = 2.7
    with pytest.raises(UnverifiedError) as caught:
        catalog.Catalog.from_bytes(json.dumps(data).encode())
    assert "entries.0.image.torch" in caught.value.message
    del data["entries"][0]["image"], data["entries"][0]["expires"]
    with pytest.raises(UnverifiedError, match=r"entries\.0: '(image|expires)' is a required property"):
        catalog.Catalog.from_bytes(json.dumps(data).encode())
    for body in (
        b"",
        b"[]",
        b'{"schema": 2}',
        b'{"schema": 3, "repository": "a/b", "updated": "", "entries": []}',
    ):
        with pytest.raises(UnverifiedError):
            catalog.Catalog.from_bytes(body)


def test_no_catalog_is_no_error(release: Repository, keys: Keys) -> None:
    assert catalog.read(release, keys.trusted) is None
    assert catalog.rebuild(release, keys).entries == ()


def test_the_newest_run_on_a_gpu_is_the_one_that_is_listed(
    history: Catalog, release: Repository, staging: Repository, keys: Keys
) -> None:
    from mtbuild.publish.referrers import attach

    entry = history.entries[-2]
    build = build_of(staging, release.manifest(entry.digest))
    for hours, bad in ((3, {"triton.jit": "failed"}), (2, {}), (30, {"triton.jit": "failed"})):
        report = report_of(build.ref, gpu=RTX4090, finished=NOW - timedelta(hours=hours), bad=bad)
        attach(release, release.manifest(entry.digest), signed(report, build, keys))
    catalog.update(release, entry.digest, keys)
    read = catalog.read(release, keys.trusted)
    assert read is not None
    runs = {run.device.name: run for run in read.entries[-2].runs if run.device}
    assert runs[RTX4090["name"]].passed
    assert len(runs) == 2


def test_a_pass_that_the_gate_does_not_hear_vouches_for_no_gpu(
    history: Catalog, release: Repository, staging: Repository, keys: Keys
) -> None:
    """Another suite's pass neither takes a failure on that model back, nor makes a model tried."""
    from mtbuild.publish.referrers import attach

    entry = history.entries[-2]
    manifest = release.manifest(entry.digest)
    build = build_of(staging, manifest)
    other = Digest.of(b"another suite")
    failed = report_of(
        build.ref, gpu=RTX4090, finished=NOW - timedelta(hours=3), bad={"triton.jit": "failed"}
    )
    for report in (
        failed,
        report_of(build.ref, gpu=RTX4090, suite=other),
        report_of(build.ref, gpu={**RTX4090, "name": "NVIDIA L4"}, suite=other),
    ):
        attach(release, manifest, signed(report, build, keys))
    catalog.update(release, entry.digest, keys)
    read = catalog.read(release, keys.trusted)
    assert read is not None
    runs = {run.device.name: run.passed for run in read.entries[-2].runs if run.device}
    assert runs == {H200["name"]: True, RTX4090["name"]: False}


def schema_1(made: Catalog) -> Catalog:
    """As it was written before entries said when they expire."""
    entries = tuple(
        replace(
            entry,
            expires=None,
            objections=(),
            runs=tuple(replace(run, expires=None) for run in entry.runs),
        )
        for entry in made.entries
    )
    return replace(made, entries=entries, schema=1)


def test_a_catalog_of_schema_1_is_read_and_the_next_publication_makes_it_anew(
    history: Catalog, release: Repository, keys: Keys
) -> None:
    old = schema_1(history)
    assert "expires" not in json.loads(old.to_bytes())["entries"][0]
    catalog._write(release, old, keys)
    assert catalog.read(release, keys.trusted) == old
    assert catalog.update(release, history.entries[0].digest, keys)
    assert catalog.read(release, keys.trusted) == history


def test_an_entry_says_when_its_proof_is_too_old(history: Catalog) -> None:
    finished = NOW - timedelta(hours=1)
    end = f"{finished + timedelta(days=90):%Y-%m-%dT%H:%M:%SZ}"
    assert {entry.expires for entry in history.entries} == {end}
    assert {run.expires for entry in history.entries for run in entry.runs} == {end}
    assert all(entry.objections == () for entry in history.entries)


@pytest.mark.parametrize("gpu", [None, RTX4090], ids=["cpu", "another-gpu"])
def test_pick_and_verify_agree_after_a_newer_suite_found_a_failure(
    history: Catalog,
    release: Repository,
    staging: Repository,
    keys: Keys,
    paths: Paths,
    gpu: dict[str, str] | None,
) -> None:
    """A released digest fails by a suite that asks more: neither offers it until a new run passes."""
    entry = history.entries[-2]
    assert (entry.channel, entry.image.created) == ("verified", "2026-11-22T00:00:00Z")
    name = f"{release.name}:{entry.image.tag}@{entry.digest}"
    wish = Wish.of(gpu="H200", sm=None, driver=None, vram_gib=None, channel="verified", expected=False)
    build = build_of(staging, release.manifest(entry.digest), created=entry.image.created)
    newer = Digest.of(b"a suite that asks more")
    moment = NOW + timedelta(days=1)

    def runs(*reports: SmokeReport, suite: Digest) -> None:
        publish(
            build.ref,
            cell=V73,
            build=build,
            envelopes=[signed(report, build, keys) for report in reports],
            release=release.name,
            channel="verified",
            paths=paths,
            keys=keys,
            policy=replace(policy_of(build, keys, channel="verified"), suite=suite),
            now=moment,
        )

    def answers(at: datetime) -> tuple[bool, bool]:
        listed = catalog.read(release, keys.trusted)
        assert listed is not None
        try:
            picked = pick(listed, wish, now=at).winner.entry.digest == entry.digest
        except NoPickError:
            picked = False
        steps = verify(release, parse_name(name), keys.trusted, now=at)
        return picked, all(step.passed for step in steps)

    assert answers(moment) == (True, True)
    later = NOW + timedelta(hours=20)  # after every verdict: nothing but the failure itself tells of it
    bad = report_of(build.ref, gpu=gpu, finished=later, bad={"imports.wan": "failed"}, suite=newer)
    with pytest.raises(RefusedError):
        runs(bad, suite=newer)
    assert answers(moment) == (False, False)
    listed = catalog.rebuild(release, keys, now=moment)
    told = {e.image.tag: e for e in listed.entries}[entry.image.tag]
    assert "imports.wan" in told.objections[0]
    assert told.expires is None
    assert answers(NOW + timedelta(days=200)) == (False, False)  # a failure does not wear off
    again = {"finished": moment, "suite": newer}
    runs(
        report_of(build.ref, gpu=gpu, **again),
        report_of(build.ref, gpu=H200, **again),
        suite=newer,
    )
    assert answers(moment) == (True, True)
    assert answers(moment + timedelta(days=90)) == (True, True)
    assert answers(moment + timedelta(days=90, seconds=1)) == (False, False)
