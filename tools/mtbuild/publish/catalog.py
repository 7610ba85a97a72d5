"""The catalog: every released digest with its proof, as one signed document that `pick` reads.

An OCI artefact at `<release>:catalog`: the JSON, and a signed statement about it. It holds nothing of its
own: every entry is made from a write-once tag, the verdict that names that tag, and the evidence attached
to the digest, so `rebuild` gives the same bytes as a history of publications. An entry says what the gate
says of all that evidence, so `pick` and `verify` give one answer: what stands against the image, and when the
proof of it is too old (docs/decisions/0004).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import jsonschema

from mtbuild.digest import Digest
from mtbuild.errors import InfrastructureError, MtbuildError
from mtbuild.publish import dsse, evidence, vsa
from mtbuild.publish.dsse import Envelope, UnverifiedError
from mtbuild.publish.evidence import STATEMENT, Device, payload_of
from mtbuild.publish.policy import end_of, standing
from mtbuild.publish.referrers import attached
from mtbuild.publish.registry import MANIFEST, Descriptor, Manifest
from mtbuild.publish.vsa import VSA, Image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from mtbuild.publish.evidence import Statement
    from mtbuild.publish.keys import Keys, PublicKey
    from mtbuild.publish.registry import Repository
    from mtbuild.publish.vsa import Summary

__all__ = ["TAG", "Catalog", "Entry", "Run", "proof_of", "read", "rebuild", "update"]

TAG = "catalog"
MEDIA_TYPE = "application/vnd.mtbuild.catalog.v1+json"
PREDICATE = "tag:mtbuild,2026:catalog/v1"
SCHEMA = 2
_LIMIT = 64 * 2**20
_TIME = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One smoke run of a digest: the newest on its GPU model, or on a CPU. `evidence` is its envelope.

    `expires` is when a pass is too old to vouch; None where the catalog does not say (schema 1).
    """

    tier: str
    device: Device | None
    passed: bool
    finished: str
    evidence: Digest
    expires: str | None = None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One released digest in one channel. `verdict` is the envelope of the summary that let it out.

    `objections` are what the gate now has against it (empty: nothing), `expires` when its proof is too old;
    None where there is an objection, and in a catalog of schema 1, which said neither.
    """

    digest: Digest
    channel: str
    verified_at: str
    verdict: Digest
    image: Image
    runs: tuple[Run, ...]
    expires: str | None = None
    objections: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "digest": str(self.digest),
            "channel": self.channel,
            "verified_at": self.verified_at,
            "verdict": str(self.verdict),
            "expires": self.expires,
            "objections": list(self.objections),
            "image": self.image.to_json(),
            "runs": [{**asdict(run), "evidence": str(run.evidence)} for run in self.runs],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Entry:
        return cls(
            digest=Digest.parse(data["digest"]),
            channel=data["channel"],
            verified_at=data["verified_at"],
            verdict=Digest.parse(data["verdict"]),
            image=Image.from_json(data["image"]),
            runs=tuple(
                Run(
                    **{
                        **run,
                        "device": Device(**run["device"]) if run["device"] else None,
                        "evidence": Digest.parse(run["evidence"]),
                    }
                )
                for run in data["runs"]
            ),
            expires=data.get("expires"),
            objections=tuple(data.get("objections", ())),
        )


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """All entries of one release repository, in a fixed order. `updated` is the newest thing it knows of."""

    repository: str
    entries: tuple[Entry, ...]
    schema: int = SCHEMA

    @property
    def updated(self) -> str:
        times = [entry.verified_at for entry in self.entries]
        times += [run.finished for entry in self.entries for run in entry.runs]
        return max(times, default="")

    def to_bytes(self) -> bytes:
        """Canonical: the same entries give the same bytes."""
        data = {
            "schema": self.schema,
            "repository": self.repository,
            "updated": self.updated,
            "entries": [_of_schema(entry.to_json(), self.schema) for entry in self.entries],
        }
        return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    @classmethod
    def from_bytes(cls, body: bytes, *, where: str = "catalog") -> Catalog:
        """From its JSON, schema 2 or 1; UnverifiedError naming the key where it does not fit the schema."""
        fix = "`mtbuild catalog rebuild` makes it anew from tags and evidence"
        try:
            data = json.loads(body)
        except ValueError as error:
            msg = f"is not JSON: {error}"
            raise UnverifiedError(msg, where=where, fix=fix) from error
        for problem in _validator().iter_errors(data):
            key = ".".join(str(part) for part in problem.absolute_path) or "the document"
            msg = f"{key}: {problem.message[:300]}"
            raise UnverifiedError(msg, where=where, fix=fix)
        entries = tuple(Entry.from_json(entry) for entry in data["entries"])
        return cls(repository=data["repository"], entries=entries, schema=data["schema"])


def _of_schema(entry: dict[str, Any], schema: int) -> dict[str, Any]:
    if schema == 1:
        del entry["expires"], entry["objections"]
        for run in entry["runs"]:
            del run["expires"]
    return entry


@cache
def _validator() -> jsonschema.Draft202012Validator:
    text = files("mtbuild.publish").joinpath("schema/catalog.schema.json").read_text(encoding="utf-8")
    return jsonschema.Draft202012Validator(json.loads(text))


def proof_of(
    repository: Repository,
    digest: Digest,
    keys: Iterable[PublicKey],
    *,
    note: Callable[[str], None] = lambda _: None,
) -> tuple[tuple[Statement, ...], tuple[Summary, ...]]:
    """The statements and the verdicts for this repository that are attached to a digest and believed."""
    believed = tuple(keys)
    statements: list[Statement] = []
    summaries: list[Summary] = []
    for envelope in attached(repository, digest, note=note):
        where = f"{repository.name}: attachment {envelope.digest.short}"
        try:
            if evidence.predicate_type(envelope) == VSA:
                summary = vsa.verify(envelope, believed, where=where)
                if summary.subject == digest and summary.repository == repository.name:
                    summaries.append(summary)
            elif evidence.predicate_type(envelope) == evidence.TEST_RESULT:
                statements.append(evidence.verify(envelope, believed, where=where))
        except UnverifiedError as error:
            note(str(error))
    return tuple(statements), tuple(summaries)


def _entries(
    statements: Sequence[Statement], summaries: Sequence[Summary], digest: Digest, now: datetime
) -> list[Entry]:
    latest: dict[str, Summary] = {}
    for summary in summaries:
        held = latest.get(summary.image.tag)
        key = (summary.verified_at, str(summary.envelope))
        if held is None or key > (held.verified_at, str(held.envelope)):
            latest[summary.image.tag] = summary
    # The clock only keeps out runs that claim to end in the future; by what is past, the same evidence gives
    # the same bytes. Never as of the verdicts alone: a failure found after them would then not be heard.
    looked = max((now, *(_moment(summary.verified_at) for summary in summaries)))
    return [
        _entry(digest, summary, statements, looked)
        for summary in latest.values()
        if summary.envelope is not None
    ]


def _entry(digest: Digest, summary: Summary, statements: Sequence[Statement], looked: datetime) -> Entry:
    assert summary.envelope is not None
    policy = summary.policy
    found = standing(digest, statements, policy, now=looked)
    newest: dict[tuple[str, str], Run] = {}
    for statement in found.newest:  # what the gate goes by: a pass by another suite makes no GPU a tried one
        if statement.envelope is None:
            continue
        device, end = statement.device, end_of(statement, policy)
        run = Run(
            tier=statement.report.tier,
            device=device,
            passed=statement.report.passed(),
            finished=statement.report.finished,
            evidence=statement.envelope,
            expires=_text(end) if end is not None else None,
        )
        group = (run.tier, device.name if device else "")
        held = newest.get(group)
        if held is None or _order(run) > _order(held):
            newest[group] = run
    return Entry(
        digest=digest,
        channel=policy.channel,
        verified_at=summary.verified_at,
        verdict=summary.envelope,
        image=summary.image,
        runs=tuple(newest[group] for group in sorted(newest)),
        expires=_text(found.expires) if found.expires is not None else None,
        objections=tuple(finding.message for finding in found.reasons) if found.expires is None else (),
    )


def _moment(text: str) -> datetime:
    return datetime.strptime(text, _TIME).replace(tzinfo=UTC)


def _text(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime(_TIME)


def _order(run: Run) -> tuple[str, bool, str]:
    return (run.finished, not run.passed, str(run.evidence))


def _catalog(repository: Repository, entries: Iterable[Entry]) -> Catalog:
    ordered = sorted(entries, key=lambda entry: (entry.image.cell_id, entry.image.created, entry.image.tag))
    return Catalog(repository=repository.name, entries=tuple(ordered))


def read(repository: Repository, keys: Iterable[PublicKey]) -> Catalog | None:
    """The catalog as it stands, verified; None where there is none.

    Raises UnverifiedError if it is unsigned, of other bytes, or another repository's.
    """
    manifest = repository.find_manifest(TAG)
    if manifest is None:
        return None
    where = f"{repository.name}:{TAG}"
    fix = "`mtbuild catalog rebuild` makes it anew from tags and evidence"
    layers = {part["mediaType"]: Descriptor.from_json(part) for part in manifest.data.get("layers") or ()}
    if MEDIA_TYPE not in layers or dsse.BUNDLE not in layers:
        msg = "is no catalog with a signature"
        raise UnverifiedError(msg, where=where, fix=fix)
    body = repository.blob(layers[MEDIA_TYPE].digest, limit=_LIMIT)
    envelope = Envelope.from_bytes(repository.blob(layers[dsse.BUNDLE].digest), where=where)
    dsse.verify(envelope, keys, where=where)
    try:
        signed = json.loads(envelope.payload)
        subject = Digest(signed["subject"][0]["digest"]["sha256"])
        sound = signed["predicateType"] == PREDICATE and subject == Digest.of(body)
    except (ValueError, KeyError, TypeError, IndexError, MtbuildError):
        sound = False
    if not sound:
        msg = "carries a signature of something else"
        raise UnverifiedError(msg, where=where, fix=fix)
    catalog = Catalog.from_bytes(body, where=where)
    if catalog.repository != repository.name:
        msg = f"is the catalog of {catalog.repository}"
        raise UnverifiedError(msg, where=where, fix=fix)
    return catalog


def rebuild(
    repository: Repository,
    keys: Keys,
    *,
    note: Callable[[str], None] = lambda _: None,
    now: datetime | None = None,
) -> Catalog:
    """Make the catalog anew from tags and evidence and write it. Call it under the release's lock.

    Runs that end after `now` (aware; else this moment) are not heard.
    """
    moment = now or datetime.now(UTC)
    entries: list[Entry] = []
    tags = [tag for tag in repository.tags() if tag != TAG and not tag.startswith("sha256-")]
    for tag in tags:
        manifest = repository.find_manifest(tag)
        if manifest is None:
            continue
        statements, summaries = proof_of(repository, manifest.digest, keys.trusted, note=note)
        listed = _entries(statements, summaries, manifest.digest, moment)
        found = [entry for entry in listed if entry.image.tag == tag]
        entries += found
        note(f"{tag}: {'in the catalog' if found else 'an alias, or no verdict names it; left out'}")
    catalog = _catalog(repository, entries)
    _write(repository, catalog, keys)
    return catalog


def update(
    repository: Repository,
    digest: Digest,
    keys: Keys,
    *,
    note: Callable[[str], None] = lambda _: None,
    now: datetime | None = None,
) -> bool:
    """Bring one digest's entries up to date; whether that changed anything. Call it under the release's lock.

    A catalog that can't be believed is made anew from tags and evidence. `now` as for `rebuild`.
    """
    try:
        current = read(repository, keys.trusted)
    except UnverifiedError as error:
        note(f"{error}\nmaking it anew")
        rebuild(repository, keys, note=note, now=now)
        return True
    if current is not None and current.schema != SCHEMA:
        note(f"{repository.name}:{TAG} has schema {current.schema}; making it anew")
        rebuild(repository, keys, note=note, now=now)
        return True
    statements, summaries = proof_of(repository, digest, keys.trusted, note=note)
    fresh = [
        entry
        for entry in _entries(statements, summaries, digest, now or datetime.now(UTC))
        if (tagged := repository.find_manifest(entry.image.tag)) is not None and tagged.digest == digest
    ]
    others = [entry for entry in current.entries if entry.digest != digest] if current else []
    catalog = _catalog(repository, [*others, *fresh])
    if current is not None and catalog.to_bytes() == current.to_bytes():
        return False
    _write(repository, catalog, keys)
    return True


def _write(repository: Repository, catalog: Catalog, keys: Keys) -> None:
    body = catalog.to_bytes()
    config = repository.put_blob(b"{}", media_type="application/vnd.oci.empty.v1+json")
    layer = repository.put_blob(body, media_type=MEDIA_TYPE)
    subject = [{"name": f"{repository.name}:{TAG}", "digest": {"sha256": layer.digest.hex}}]
    document = {
        "_type": STATEMENT,
        "subject": subject,
        "predicateType": PREDICATE,
        "predicate": {"repository": repository.name, "updated": catalog.updated},
    }
    envelope = dsse.sign(payload_of(document), keys.own)
    bundle = repository.put_blob(envelope.body, media_type=dsse.BUNDLE)
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": MEDIA_TYPE,
        "config": config.to_json(),
        "layers": [layer.to_json(), bundle.to_json()],
    }
    encoded = json.dumps(manifest, separators=(",", ":")).encode()
    repository.put_manifest(Manifest(body=encoded, media_type=MANIFEST), tag=TAG)
    back = read(repository, keys.trusted)
    if back is None or back.to_bytes() != body:
        msg = f"{repository.name}:{TAG} does not read back as it was written"
        raise InfrastructureError(msg, fix="is another publisher at work? run the same command again")
