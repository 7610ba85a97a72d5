"""The evidence kept under docs/evidence is still what was signed there: every envelope, against its key."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from mtbuild.digest import Digest
from mtbuild.prove.report import SmokeReport
from mtbuild.publish import evidence
from mtbuild.publish.dsse import Envelope, UnverifiedError
from mtbuild.publish.keys import trusted_keys

KEPT = Path(__file__).parents[3] / "docs/evidence"
ENVELOPES = sorted(KEPT.glob("**/evidence.json"))


def verified(file: Path) -> evidence.Statement:
    keys = trusted_keys(file.parent, tuple(sorted(file.parent.glob("*.pub"))))
    return evidence.verify(Envelope.load(file), keys, where=str(file))


def test_there_is_some() -> None:
    assert KEPT / "t211/evidence.json" in ENVELOPES


@pytest.mark.parametrize("file", ENVELOPES, ids=lambda file: str(file.parent.relative_to(KEPT)))
def test_an_envelope_holds_and_what_lies_beside_it_belongs_to_it(file: Path) -> None:
    found = verified(file)
    assert found.subject == found.report.digest
    assert SmokeReport.load(file.with_name("report.json")) == found.report
    if found.report.tier == "gpu":
        assert found.device is not None, "a GPU by the host's word"
    manifest = file.with_name("manifest.json")
    if manifest.exists():  # the image's own manifest, byte for byte
        assert Digest.of(manifest.read_bytes()) == found.subject
    build = file.with_name("build.json")
    if build.exists():
        record = json.loads(build.read_text())
        assert record["ref"].endswith(f"@{found.subject}")
        assert record["build_id"] == found.build_id
    promotion = file.with_name("promotion.json")
    if promotion.exists():  # nothing is called published that this very evidence does not carry
        said = json.loads(promotion.read_text())
        assert said["digest"] == str(found.subject)
        assert said["verdict"]["passed"] and found.report.passed()
        assert str(found.envelope) in said["verdict"]["evidence"]
        assert said["channel"] == ("verified" if found.device is not None else "checked")


@pytest.mark.parametrize("file", ENVELOPES, ids=lambda file: str(file.parent.relative_to(KEPT)))
def test_a_touched_envelope_does_not(file: Path, tmp_path: Path) -> None:
    bundle: dict[str, Any] = json.loads(file.read_text())
    payload = base64.b64decode(bundle["dsseEnvelope"]["payload"])
    touched = payload.replace(b'"passed":true', b'"passed":null').replace(b'"passed":false', b'"passed":true')
    assert touched != payload
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(touched).decode()
    (tmp_path / "evidence.json").write_text(json.dumps(bundle))
    for key in file.parent.glob("*.pub"):
        (tmp_path / key.name).write_bytes(key.read_bytes())
    with pytest.raises(UnverifiedError):
        verified(tmp_path / "evidence.json")
