"""Buckets, resize and crop, masks: exact against the reference; wrong boxes are named."""

from __future__ import annotations

import goldens
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from wan.preprocess import (
    ASPECT_RATIO_627,
    ASPECT_RATIO_960,
    choose_bucket,
    resize_and_centercrop,
    speaker_masks,
    to_latent_masks,
)

TABLES = {"ASPECT_RATIO_627": ASPECT_RATIO_627, "ASPECT_RATIO_960": ASPECT_RATIO_960}


@pytest.mark.parametrize("name", TABLES)
def test_buckets(name: str, measured) -> None:
    assert {k: list(v) for k, v in TABLES[name].items()} == goldens.index("preprocess")["tables"][name]
    wrong = 0
    for ratio, height, width in goldens.load("preprocess")[f"{name}_choice"].tolist():
        wrong += choose_bucket(ratio, 1, TABLES[name]) != (height, width)
    measured("preprocess", f"bucket choice {name}", wrong, 0, metric="count")


@pytest.mark.parametrize("size", ["90x120", "150x100", "64x64", "37x201"])
def test_resize_and_crop(size: str, measured) -> None:
    z = goldens.load("preprocess")
    want = z[f"crop_{size}"]
    got = resize_and_centercrop(Image.fromarray(z[f"img_{size}"].numpy()), tuple(want.shape[-2:]))
    assert got.dtype == torch.uint8
    measured("preprocess", f"image {size}", float((got != want).sum()), 0, metric="count")
    want = z[f"maskcrop_{size}"]
    got = resize_and_centercrop(z[f"mask_{size}"], tuple(want.shape[-2:]))
    measured("preprocess", f"masks {size}", float((got != want).sum()), 0, metric="count")


@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from(sorted(TABLES)))
def test_bucket_rules(height: int, width: int, name: str) -> None:
    table = TABLES[name]
    chosen = choose_bucket(height, width, table)
    distance = {v: abs(float(k) - height / width) for k, v in table.items()}
    assert distance[chosen] == min(distance.values())
    assert all(side % 64 == 0 for side in chosen)


@given(st.integers(20, 300), st.integers(20, 300), st.sampled_from([(32, 48), (48, 32), (32, 32)]))
def test_any_image_gives_the_target_size(height: int, width: int, target: tuple[int, int]) -> None:
    image = Image.new("RGB", (width, height), (10, 20, 30))
    got = resize_and_centercrop(image, target)
    assert got.shape == (1, 3, 1, *target)
    assert (torch.tensor([10, 20, 30]) == got.flatten(2)[0].T).all()
    assert resize_and_centercrop(torch.ones(3, height, width), target).shape == (3, *target)


def test_masks_of_two_halves() -> None:
    masks = speaker_masks(100, 201, 2)
    assert masks[0].nonzero().amin(0).tolist() == [5, 5]
    assert masks[0].nonzero().amax(0).tolist() == [94, 94]
    assert masks[1].nonzero().amin(0).tolist() == [5, 105]
    assert torch.equal(masks.sum(0), torch.ones(100, 201))


def test_box_orders() -> None:
    rows_first = {"person1": [10, 20, 30, 60], "person2": [40, 70, 90, 120]}
    xyxy = {"person1": [20, 10, 60, 30], "person2": [70, 40, 120, 90]}
    assert torch.equal(speaker_masks(100, 150, 2, rows_first), speaker_masks(100, 150, 2, xyxy, order="xyxy"))


@pytest.mark.parametrize(
    ("bbox", "message"),
    [
        ({"person1": [0, 0, 10, 10]}, "exactly person1 and person2"),
        ({"person1": [0, 0, 10, 10], "person2": [0, 0, 101, 10]}, "person2.*100 rows"),
        ({"person1": [10, 0, 10, 10], "person2": [0, 0, 10, 10]}, "person1"),
        ({"person1": [0, 0, 10], "person2": [0, 0, 10, 10]}, "3 numbers"),
    ],
)
def test_wrong_boxes_are_named(bbox: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        speaker_masks(100, 150, 2, bbox)


def test_one_speaker_takes_no_box() -> None:
    with pytest.raises(ValueError, match="one speaker"):
        speaker_masks(10, 10, 1, {"person1": [0, 0, 5, 5]})
    assert speaker_masks(4, 5, 1).min() == 1


def test_a_speaker_that_the_crop_cuts_off_is_named() -> None:
    masks = speaker_masks(64, 400, 2, {"person1": [0, 0, 64, 20], "person2": [0, 190, 64, 210]})
    with pytest.raises(ValueError, match="person1 is outside"):
        to_latent_masks(masks, (64, 64), (8, 8))
