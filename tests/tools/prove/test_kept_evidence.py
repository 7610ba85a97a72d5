"""The evidence kept under docs/evidence is still what was signed there: every envelope, against its key.

A run of the whole chain (it has a `promotion.json`) is judged again as well: the gate by the policy that it
names, the pick from the entry that it kept, the videos by the hashes that the host signed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from mtbuild.digest import Digest
from mtbuild.prove.report import SmokeReport
from mtbuild.publish import evidence
from mtbuild.publish.catalog import Catalog, Entry
from mtbuild.publish.dsse import Envelope, UnverifiedError
from mtbuild.publish.keys import trusted_keys
from mtbuild.publish.pick import Wish, pick
from mtbuild.publish.policy import Policy, judge

KEPT = Path(__file__).parents[3] / "docs/evidence"
ENVELOPES = sorted(KEPT.glob("**/evidence.json"))
CHAINS = sorted(file.parent for file in KEPT.glob("**/promotion.json"))
GPU_CHAIN = KEPT / "t211/run-h200"
# What is kept names no place of the machine that it comes from, holds no private key and no foreign host
# (but the page that xFormers names in its own message).
STRAY = re.compile(
    r"(?<![\w.])/(?:root|home|work|mnt|srv|Users)/|PRIVATE KEY|https?://(?!github\.com/facebookresearch/)"
)


def verified(file: Path) -> evidence.Statement:
    keys = trusted_keys(file.parent, tuple(sorted(file.parent.glob("*.pub"))))
    return evidence.verify(Envelope.load(file), keys, where=str(file))


def test_there_is_some() -> None:
    assert KEPT / "t211/evidence.json" in ENVELOPES
    assert {GPU_CHAIN, KEPT / "rehearsal-cpu"} <= set(CHAINS)
    assert {folder / "evidence.json" for folder in CHAINS} <= set(ENVELOPES)


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


def moment(text: str) -> datetime:
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


whole_chains = pytest.mark.parametrize("folder", CHAINS, ids=lambda folder: str(folder.relative_to(KEPT)))


@whole_chains
def test_the_gate_says_again_what_it_said_of_a_chain(folder: Path) -> None:
    found = verified(folder / "evidence.json")
    said = read(folder / "promotion.json")["verdict"]
    policy = Policy.from_json(said["policy"])
    assert judge(found.subject, [found], policy, now=moment(said["at"])).to_json() == said
    assert policy.required == found.report.required, "no check was let off"
    assert policy.signers == (found.signer,)
    assert (policy.cell_id, policy.build_id) == (found.report.cell_id, found.build_id)


@whole_chains
def test_a_chain_s_manifest_and_build_record_are_the_image_s(folder: Path) -> None:
    found = verified(folder / "evidence.json")
    body = (folder / "manifest.json").read_bytes()
    assert Digest.of(body) == found.subject
    manifest, build = json.loads(body), read(folder / "build.json")
    assert build["ref"] == str(found.report.ref)
    assert build["cell_id"] == found.report.cell_id
    assert build["config_digest"] == manifest["config"]["digest"]
    assert build["size_bytes"] == sum(layer["size"] for layer in manifest["layers"])
    assert build["override"] is None


@whole_chains
def test_a_chain_s_pick_is_what_its_entry_gives(folder: Path) -> None:
    found, said = verified(folder / "evidence.json"), read(folder / "pick.json")
    promotion = read(folder / "promotion.json")
    entry = Entry.from_json(said["entry"])
    catalog = Catalog(repository=said["repository"], entries=(entry,))
    if (folder / "catalog.json").exists():
        catalog = Catalog.from_bytes((folder / "catalog.json").read_bytes())
        assert catalog.entries == (entry,)
    (run,) = entry.runs
    assert (run.evidence, run.device, run.passed) == (found.envelope, found.device, True)
    assert (entry.digest, entry.channel) == (found.subject, promotion["channel"])
    assert (entry.verified_at, entry.expires) == (promotion["verdict"]["at"], promotion["verdict"]["expires"])
    assert entry.image.build_id == found.build_id
    device = found.device
    wish = Wish.of(
        gpu=device.name if device else None,
        sm=None,
        driver=device.driver if device else None,
        vram_gib=None,
        channel=promotion["channel"],
        expected=False,
    )
    again = pick(catalog, wish, now=moment(entry.verified_at)).to_json()
    assert json.loads(json.dumps(again)) == said
    assert said["name"] == promotion["name"]


@whole_chains
def test_a_chain_s_videos_are_those_that_the_host_hashed(folder: Path) -> None:
    facts = verified(folder / "evidence.json").report.host_facts["artefacts"]
    assert isinstance(facts, list)
    named = {fact["name"]: (fact["size_bytes"], fact["sha256"]) for fact in facts}
    bodies = {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix in (".mp4", ".png")}
    assert named == {name: (len(body), hashlib.sha256(body).hexdigest()) for name, body in bodies.items()}
    assert named


@whole_chains
def test_a_chain_s_logs_tell_what_the_report_does(folder: Path) -> None:
    report = verified(folder / "evidence.json").report
    log = (folder / "run.log").read_text(encoding="utf-8")
    for result in report.results:
        assert re.search(rf"{re.escape(result.check)} +[\d.]+ s  {re.escape(result.message)}\n", log), result
    end = log[log.index("== verify") :].splitlines()
    steps = [line for line in end if re.match(r"\d+\. ", line)]
    assert [line[:4] for line in steps] == [f"{n}. ✓" for n in range(1, 8)]
    assert "verified" in end
    assert str(report.digest) in (folder / "commands.txt").read_text(encoding="utf-8")
    by_key = {(r.check, r.user): (r.status, r.seconds, r.message) for r in report.results}
    for raw in folder.glob("log-*.txt"):  # what the containers themselves said
        first, *events = [json.loads(line) for line in raw.read_text(encoding="utf-8").splitlines()]
        told = {(e["check"], first["user"]): e for e in events if e["event"] == "result"}
        assert [check for check, _ in told] == first["checks"]
        assert all(by_key[key] == (e["status"], e["seconds"], e["message"]) for key, e in told.items())


def test_the_chain_on_a_gpu_is_that() -> None:
    found, said = verified(GPU_CHAIN / "evidence.json"), read(GPU_CHAIN / "promotion.json")
    assert (found.report.tier, found.result, found.report.cell_name) == ("gpu", "PASSED", "t211")
    assert found.device is not None
    assert found.device.name == "NVIDIA H200"
    assert {"libcuda", "triton.jit", "generate", "generate.gpu"} <= set(found.tests("passed"))
    assert not found.tests("failed") and not found.tests("degraded")
    assert said["channel"] == "verified"
    assert read(GPU_CHAIN / "pick.json")["match"] == "same-gpu"


@pytest.mark.parametrize("envelope", ENVELOPES, ids=lambda file: str(file.parent.relative_to(KEPT)))
def test_what_is_kept_names_no_machine_s_places_and_no_secret(envelope: Path) -> None:
    folder = envelope.parent
    kept = [file for file in folder.iterdir() if file.suffix in (".json", ".txt", ".log", ".pub", "")]
    for file in (file for file in kept if file.is_file()):
        assert not STRAY.search(file.read_text(encoding="utf-8")), file
    assert not STRAY.search(json.dumps(verified(envelope).report.to_json()))
