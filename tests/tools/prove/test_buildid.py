"""The build id: every input changes it, their order does not."""

from __future__ import annotations

from typing import Any

import pytest

from mtbuild.digest import Digest
from mtbuild.prove.buildid import build_id

PARTS: dict[str, Any] = {
    "dockerfile": "FROM scratch\n",
    "lock": "torch==2.7.1\n",
    "base": Digest("a" * 64),
    "runtime_sha256": "b" * 64,
    "platform": "linux/amd64",
    "output": {"compression": "zstd", "oci-mediatypes": "true"},
}


def test_it_is_the_sha256_of_the_documented_json() -> None:
    import hashlib

    text = (
        '{"base":"sha256:' + "a" * 64 + '","dockerfile":"FROM scratch\\n","lock":"torch==2.7.1\\n",'
        '"output":{"compression":"zstd","oci-mediatypes":"true"},"platform":"linux/amd64",'
        '"runtime":"' + "b" * 64 + '"}'
    )
    assert build_id(**PARTS) == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dockerfile", "FROM scratch\n\n"),
        ("lock", "torch==2.7.0\n"),
        ("base", Digest("c" * 64)),
        ("runtime_sha256", "d" * 64),
        ("platform", "linux/arm64"),
        ("output", {"compression": "gzip", "oci-mediatypes": "true"}),
        ("output", {"compression": "zstd", "oci-mediatypes": "true", "mtbuild.override": "to study it"}),
    ],
)
def test_every_input_changes_it(key: str, value: Any) -> None:
    assert build_id(**{**PARTS, key: value}) != build_id(**PARTS)


def test_the_order_of_options_does_not() -> None:
    turned = dict(reversed(PARTS["output"].items()))
    assert build_id(**{**PARTS, "output": turned}) == build_id(**PARTS)
