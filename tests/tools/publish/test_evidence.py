"""Envelopes and statements: what is signed comes back, and what was touched does not."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from publish_samples import H200, V73, build_of, cell_of, push_image, report_of, signed

from mtbuild.digest import Reference
from mtbuild.errors import InputError
from mtbuild.publish import dsse, evidence
from mtbuild.publish.dsse import Envelope, UnverifiedError, pae
from mtbuild.publish.evidence import EXTENSION
from mtbuild.publish.keys import Keys

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from publish_samples import SampleBuild

    from mtbuild.publish.registry import Repository

REF = Reference.parse(f"127.0.0.1:5000/staging@sha256:{'ab' * 32}")


def test_the_encoding_is_that_of_the_dsse_specification() -> None:
    # The example of the protocol's own text.
    assert pae("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


def test_the_bundle_has_the_form_that_cosign_stores(keys: Keys) -> None:
    envelope = dsse.sign(b"{}", keys.own)
    bundle = json.loads(envelope.body)
    assert bundle["mediaType"] == "application/vnd.dev.sigstore.bundle.v0.3+json"
    assert bundle["verificationMaterial"] == {"publicKey": {"hint": keys.own.public.hint}}
    assert set(bundle["dsseEnvelope"]) == {"payload", "payloadType", "signatures"}
    assert list(bundle["dsseEnvelope"]["signatures"][0]) == ["sig"]
    assert base64.b64decode(bundle["dsseEnvelope"]["payload"]) == b"{}"


@given(payload=st.binary(max_size=200), kind=st.text(max_size=20), flip=st.integers(0, 10**6))
def test_any_changed_bit_of_payload_or_type_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, payload: bytes, kind: str, flip: int
) -> None:
    own = _own(tmp_path_factory)
    envelope = dsse.sign(payload, own.own, payload_type=kind)
    assert dsse.verify(Envelope.from_bytes(envelope.body), own.trusted) == own.own.public
    bits = len(payload) * 8
    if bits:
        touched = bytearray(payload)
        touched[(flip % bits) // 8] ^= 1 << (flip % 8)
        with pytest.raises(UnverifiedError):
            dsse.verify(_with(envelope, payload=bytes(touched)), own.trusted)
    with pytest.raises(UnverifiedError):
        dsse.verify(_with(envelope, payload_type=kind + " "), own.trusted)
    moved = payload + b"x"  # length and content may not be traded for one another
    with pytest.raises(UnverifiedError):
        dsse.verify(_with(envelope, payload=moved), own.trusted)


_KEPT: list[Keys] = []


def _own(factory: pytest.TempPathFactory) -> Keys:
    if not _KEPT:
        _KEPT.append(Keys.ensure(factory.mktemp("own")))
    return _KEPT[0]


def _with(envelope: Envelope, **changes: Any) -> Envelope:
    return Envelope(**{**vars(envelope), **changes})


def test_a_statement_comes_back_whole(keys: Keys) -> None:
    for report in (report_of(REF), report_of(REF, gpu=H200), report_of(REF, bad={"triton.aot": "failed"})):
        said = evidence.statement(report, V73)
        envelope = evidence.sign(said, keys.own)
        back = evidence.verify(Envelope.from_bytes(envelope.body), keys.own.public)
        assert back.report == report
        assert (back.signer, back.envelope) == (keys.own.public.hint, envelope.digest)


def test_the_statement_is_a_test_result(keys: Keys) -> None:
    said = evidence.statement(report_of(REF, bad={"disk": "timeout"}), V73).to_json()
    assert said["_type"] == "https://in-toto.io/Statement/v1"
    assert said["predicateType"] == "https://in-toto.io/attestation/test-result/v0.1"
    assert said["subject"] == [{"name": "127.0.0.1:5000/staging", "digest": {"sha256": "ab" * 32}}]
    predicate = said["predicate"]
    assert predicate["result"] == "FAILED"
    assert predicate["failedTests"] == ["disk"]
    assert "disk" not in predicate["passedTests"]
    assert predicate[EXTENSION]["report"]["facts"]["digest"]["observed_by"] == "host"
    degraded = cell_of(allow=("degraded",))
    warned = evidence.statement(
        report_of(REF, cell=degraded, bad={"xformers.extension": "degraded"}), degraded
    )
    assert warned.to_json()["predicate"]["result"] == "WARNED"


def test_a_gpu_is_what_the_host_saw_in_use() -> None:
    whole = report_of(REF, gpu=H200)
    device = evidence.statement(whole, V73).device
    assert device is not None
    assert (device.name, device.sm, device.driver, device.vram_gib) == (*H200.values(), 24.0)
    for missing in ("gpu.name", "gpu.sm", "gpu.driver", "gpu.held_bytes"):
        facts = tuple(
            evidence_fact
            if evidence_fact.name != missing
            else type(evidence_fact)(name=missing, value=evidence_fact.value, observed_by="image")
            for evidence_fact in whole.facts
        )
        told = type(whole)(**{**vars(whole), "facts": facts})
        assert evidence.statement(told, V73).device is None, missing


def test_report_cell_and_build_must_be_about_one_thing(staging: Repository, build: SampleBuild) -> None:
    with pytest.raises(InputError, match="is about cell"):
        evidence.statement(report_of(REF), cell_of(torch="2.8.0"))
    with pytest.raises(InputError, match="the build made"):
        evidence.statement(report_of(REF), V73, build=build)
    other = build_of(staging, push_image(staging), override="to see it fail")
    assert evidence.statement(report_of(other.ref), V73, build=other).override == "to see it fail"


def _touch(change: Callable[[dict[str, Any]], None]) -> Callable[[Envelope, Keys], Envelope]:
    def apply(envelope: Envelope, keys: Keys) -> Envelope:
        data = json.loads(envelope.payload)
        change(data)
        return dsse.sign(json.dumps(data).encode(), keys.own)

    return apply


def _other_result(data: dict[str, Any]) -> None:
    data["predicate"]["result"] = "FAILED"


def _other_subject(data: dict[str, Any]) -> None:
    data["subject"][0]["digest"]["sha256"] = "cd" * 32


def _two_subjects(data: dict[str, Any]) -> None:
    data["subject"].append(data["subject"][0])


def _no_extension(data: dict[str, Any]) -> None:
    del data["predicate"][EXTENSION]


def _other_schema(data: dict[str, Any]) -> None:
    data["predicate"][EXTENSION]["schema"] = 2


def _result_turned(data: dict[str, Any]) -> None:
    data["predicate"][EXTENSION]["report"]["results"][0]["status"] = "failed"


def _other_type(data: dict[str, Any]) -> None:
    data["predicateType"] = "https://in-toto.io/attestation/other"


@pytest.mark.parametrize(
    "change",
    [_other_result, _other_subject, _two_subjects, _no_extension, _other_schema, _result_turned, _other_type],
)
def test_signed_but_contradictory_is_no_evidence(
    keys: Keys, build: SampleBuild, change: Callable[[dict[str, Any]], None]
) -> None:
    touched = _touch(change)(signed(report_of(build.ref), build, keys), keys)
    with pytest.raises(UnverifiedError):
        evidence.verify(touched, keys.trusted)


def test_another_key_is_no_evidence(keys: Keys, build: SampleBuild, tmp_path: Path) -> None:
    stranger = Keys.ensure(tmp_path / "stranger")
    envelope = signed(report_of(build.ref), build, stranger)
    with pytest.raises(UnverifiedError) as caught:
        evidence.verify(envelope, keys.trusted, where="e.json")
    assert str(caught.value).startswith("e.json: is signed by no key that is believed")


@given(
    body=st.one_of(
        st.binary(max_size=100),
        st.recursive(
            st.none() | st.booleans() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(
                        ["dsseEnvelope", "mediaType", "payload", "signatures", "sig", "verificationMaterial"]
                    ),
                    inner,
                    max_size=4,
                )
            ),
            max_leaves=12,
        ).map(lambda value: json.dumps(value).encode()),
    )
)
def test_what_is_no_bundle_is_one_error(body: bytes) -> None:
    with pytest.raises(UnverifiedError):
        Envelope.from_bytes(body)


def test_a_file_that_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        Envelope.load(tmp_path / "none.json")
    assert caught.value.where == str(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(InputError, match="is not a Sigstore bundle"):
        Envelope.load(tmp_path / "bad.json")


def test_an_envelope_is_written_and_read(tmp_path: Path, keys: Keys) -> None:
    envelope = dsse.sign(b"{}", keys.own)
    envelope.write(tmp_path / "new" / "e.json")
    assert Envelope.load(tmp_path / "new" / "e.json") == envelope
