"""Digests and references: what parses, and that a tag never does."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtbuild.digest import Digest, Reference
from mtbuild.errors import InputError

HEX = "ab" * 32


@given(st.binary(max_size=200))
def test_a_digest_is_the_sha256_of_the_bytes_and_survives_text(data: bytes) -> None:
    digest = Digest.of(data)
    assert digest.hex == hashlib.sha256(data).hexdigest()
    assert Digest.parse(str(digest)) == digest
    assert digest.short == digest.hex[:12]


@pytest.mark.parametrize(
    "text", ["", HEX, "sha512:" + HEX, "sha256:" + HEX[:-1], "sha256:" + HEX.upper(), f"sha256:{HEX}\n"]
)
def test_anything_else_is_not_a_digest(text: str) -> None:
    with pytest.raises(InputError):
        Digest.parse(text)


@pytest.mark.parametrize(
    "name", ["127.0.0.1:5000/mt/staging", "ghcr.example/acme/mt-staging", "localhost/a_b.c"]
)
def test_a_reference_survives_text(name: str) -> None:
    reference = Reference.parse(f"{name}@sha256:{HEX}")
    assert str(reference) == f"{name}@sha256:{HEX}"
    assert reference.repository == name
    assert f"{reference.host}/{reference.path}" == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("r.io/a:latest", "names no digest"),
        ("r.io/a", "names no digest"),
        (f"r.io/a:latest@sha256:{HEX}", "carries a tag"),
        (f"staging@sha256:{HEX}", "names no registry"),
        (f"acme/staging@sha256:{HEX}", "names no registry"),
        (f"r.io/UPPER@sha256:{HEX}", "not a repository name"),
        ("r.io/a@sha256:beef", "not a sha256 digest"),
    ],
)
def test_a_tag_or_half_a_name_is_refused_with_the_fix(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        Reference.parse(text)
    assert raised.value.fix
