"""Colour matching against the reference (scikit-image's L*a*b*)."""

from __future__ import annotations

import goldens
import pytest

from wan.color import lab_to_rgb, match_and_blend_colors, rgb_to_lab


@pytest.mark.parametrize(("key", "strength"), [("s1", 1.0), ("s05", 0.5)])
def test_match(key: str, strength: float, measured) -> None:
    z = goldens.load("color")
    got = match_and_blend_colors(z["src"], z["ref"], strength)
    measured("color", f"strength {strength}", goldens.error(got, z[key], absolute=True), 1e-4, metric="abs")


def test_there_and_back() -> None:
    rgb = goldens.seeded.rand("colors", (2, 3, 8, 8))
    assert goldens.error(lab_to_rgb(rgb_to_lab(rgb)), rgb) < 1e-4


def test_flat_frame(measured) -> None:
    """A frame without variation takes the reference's mean; its neighbours are as before."""
    z = goldens.load("color")
    source = z["src"].clone()
    source[:, :, 1] = 0.2
    got = match_and_blend_colors(source, z["ref"], 1.0)
    measured("color", "flat frame", goldens.error(got, z["flat_out"], absolute=True), 1e-4, metric="abs")


def test_wrong_input_says_what() -> None:
    z = goldens.load("color")
    assert match_and_blend_colors(z["src"], z["ref"], 0.0) is z["src"]
    with pytest.raises(ValueError, match="outside 0"):
        match_and_blend_colors(z["src"], z["ref"], 1.5)
    with pytest.raises(ValueError, match="expected"):
        match_and_blend_colors(z["src"][0], z["ref"], 1.0)
