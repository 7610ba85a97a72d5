"""Write-once tags keep their digest; aliases follow the newest build."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from publish_samples import H200, V73, build_of, push_image

from mtbuild.errors import InputError
from mtbuild.publish.referrers import attached
from mtbuild.publish.tags import TagTakenError

if TYPE_CHECKING:
    from publish_samples import Desk

    from mtbuild.publish.registry import Manifest


def test_a_write_once_tag_keeps_its_digest(desk: Desk, image: Manifest) -> None:
    first = desk.publish(desk.signed())
    other = push_image(desk.staging)
    rebuilt = build_of(desk.staging, other, build_id=desk.build.build_id)
    with pytest.raises(TagTakenError) as caught:
        desk.publish(desk.signed(build=rebuilt), build=rebuilt)
    assert caught.value.exit_code == 2
    assert str(image.digest) in caught.value.message
    assert desk.release.manifest(first.tags[0]).digest == image.digest
    assert desk.release.find_manifest(other.digest) is None
    assert attached(desk.staging, other.digest) == ()


def test_an_alias_follows_the_newest_build_and_never_goes_back(desk: Desk) -> None:
    alias = f"{V73.id}-checked"
    newer = build_of(desk.staging, push_image(desk.staging), created="2026-11-22T11:00:00Z")
    desk.publish(desk.signed())
    desk.publish(desk.signed(build=newer), build=newer)
    assert desk.release.manifest(alias).digest == newer.ref.digest
    again = desk.publish()  # the older one once more
    assert desk.release.manifest(alias).digest == newer.ref.digest
    assert alias not in again.tags
    assert len(desk.tags()) == 4


def test_an_alias_may_not_take_a_name_of_the_repository_itself(desk: Desk) -> None:
    with pytest.raises(InputError, match="can't be an alias"):
        desk.publish(desk.signed(gpu=H200), channel="verified", aliases=("catalog",))
    assert desk.release.tags() == ()
