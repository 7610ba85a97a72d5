"""Verification says no for each thing that can be wrong, and at which step."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from publish_samples import H200, NOW, V73, policy_of, push_image, report_of, signed

from mtbuild.errors import InputError
from mtbuild.publish import catalog
from mtbuild.publish.keys import Keys
from mtbuild.publish.promote import publish
from mtbuild.publish.referrers import attach, fallback_tag
from mtbuild.publish.registry import INDEX, Manifest
from mtbuild.publish.verify import Step, parse_name, verify

if TYPE_CHECKING:
    from pathlib import Path

    from publish_samples import SampleBuild

    from mtbuild.paths import Paths
    from mtbuild.publish.promote import Promotion
    from mtbuild.publish.registry import Repository


@pytest.fixture
def out(build: SampleBuild, release: Repository, keys: Keys, paths: Paths) -> Promotion:
    return publish(
        build.ref,
        cell=V73,
        build=build,
        envelopes=[signed(report_of(build.ref, gpu=H200), build, keys)],
        release=release.name,
        channel="verified",
        paths=paths,
        keys=keys,
        policy=policy_of(build, keys, channel="verified"),
        now=NOW,
    )


def failing(steps: tuple[Step, ...]) -> list[str]:
    assert all(step.fix for step in steps if not step.passed)
    return [step.name for step in steps if not step.passed]


def test_all_is_well_by_tag_alias_and_digest(out: Promotion, release: Repository, keys: Keys) -> None:
    digest = f"@{out.digest}"
    for name in (out.name, f"{release.name}:v73{digest}", f"{release.name}{digest}"):
        steps = verify(release, parse_name(name), keys.trusted, now=NOW)
        assert failing(steps) == []
    assert len(verify(release, parse_name(out.name), keys.trusted, now=NOW)) == 7


def test_a_newer_checked_verdict_does_not_stand_for_a_verified_alias(
    out: Promotion, build: SampleBuild, release: Repository, keys: Keys, paths: Paths
) -> None:
    late = NOW + timedelta(days=100)  # the GPU's evidence has expired, a CPU passed since
    publish(
        build.ref,
        cell=V73,
        build=build,
        envelopes=[signed(report_of(build.ref, finished=late), build, keys)],
        release=release.name,
        channel="checked",
        paths=paths,
        keys=keys,
        policy=policy_of(build, keys),
        now=late,
    )
    for tag in ("v73", V73.id, out.tags[0]):
        name = parse_name(f"{release.name}:{tag}@{out.digest}")
        assert failing(verify(release, name, keys.trusted, now=late)) == ["it still holds today"]
    for front in (f":{V73.id}-checked", f":{out.tags[0]}-checked", ""):
        name = parse_name(f"{release.name}{front}@{out.digest}")
        assert failing(verify(release, name, keys.trusted, now=late)) == []


def test_a_digest_that_is_not_there(release: Repository, keys: Keys, image: Manifest) -> None:
    steps = verify(release, parse_name(f"{release.name}@{image.digest}"), keys.trusted, now=NOW)
    assert failing(steps) == ["the digest is served, with exactly its bytes"]


def test_a_tag_that_names_something_else(out: Promotion, release: Repository, keys: Keys) -> None:
    release.put_manifest(push_image(release), tag="v73")
    assert failing(
        verify(release, parse_name(f"{release.name}:v73@{out.digest}"), keys.trusted, now=NOW)
    ) == ["tag v73 names this digest"]


def test_an_image_that_someone_pushed(out: Promotion, release: Repository, keys: Keys) -> None:
    pushed = push_image(release)
    assert out.digest != pushed.digest
    assert failing(verify(release, parse_name(f"{release.name}@{pushed.digest}"), keys.trusted, now=NOW)) == [
        "signed evidence is attached",
        "a signed verdict binds digest, repository and policy",
        "the signed catalog lists it",
    ]


def test_evidence_that_a_stranger_signed(
    out: Promotion, release: Repository, keys: Keys, tmp_path: Path
) -> None:
    stranger = Keys.ensure(tmp_path / "stranger")
    steps = verify(release, parse_name(out.name), stranger.trusted, now=NOW)
    assert "signed evidence is attached" in failing(steps)
    assert "signed by no key that is believed" in steps[2].seen
    assert keys.trusted != stranger.trusted


def test_evidence_that_was_taken_away(
    out: Promotion, build: SampleBuild, release: Repository, keys: Keys
) -> None:
    """The verdict alone, without the run that it rests on."""
    index = release.manifest(fallback_tag(out.digest)).data
    kept = [one for one in index["manifests"] if "verification_summary" in str(one["annotations"])]
    import json

    body = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": kept}).encode()
    release.put_manifest(Manifest(body=body, media_type=INDEX), tag=fallback_tag(out.digest))
    assert build.ref.digest == out.digest
    names = failing(verify(release, parse_name(out.name), keys.trusted, now=NOW))
    assert "the evidence gives that verdict when judged again" in names
    assert "it still holds today" in names


def test_a_later_failure_and_old_age(
    out: Promotion, build: SampleBuild, release: Repository, keys: Keys
) -> None:
    name = parse_name(out.name)
    late = verify(release, name, keys.trusted, now=NOW + timedelta(days=91))
    assert failing(late) == ["it still holds today"]
    assert "91 days old" in next(step.seen for step in late if not step.passed)
    report = report_of(build.ref, gpu=H200, finished=NOW, bad={"triton.jit": "failed"})
    attach(release, release.manifest(out.digest), signed(report, build, keys))
    steps = verify(release, name, keys.trusted, now=NOW)
    assert failing(steps) == ["it still holds today"]
    assert "triton.jit" in next(step.seen for step in steps if not step.passed)


def test_a_catalog_that_does_not_list_it(out: Promotion, release: Repository, keys: Keys) -> None:
    catalog._write(release, catalog.Catalog(repository=release.name, entries=()), keys)
    assert failing(verify(release, parse_name(out.name), keys.trusted, now=NOW)) == [
        "the signed catalog lists it"
    ]


@pytest.mark.parametrize(
    "text", ["ghcr.io/a/b:tag", "ghcr.io/a/b", f"a@sha256:{'0' * 64}", "ghcr.io/a/b@sha256:1"]
)
def test_a_name_without_digest_or_registry_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_name(text)


def test_a_name_is_read_with_and_without_port_and_tag() -> None:
    digest = "sha256:" + "0" * 64
    for front, tag in (
        ("127.0.0.1:5000/a/b:t1", "t1"),
        ("127.0.0.1:5000/a/b", None),
        ("ghcr.io/a/b:v73", "v73"),
        ("localhost/b", None),
    ):
        name = parse_name(f"{front}@{digest}")
        assert name.tag == tag
        assert name.reference.repository == front.removesuffix(f":{tag}")
