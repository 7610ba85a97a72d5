"""Envelopes attached to a digest: OCI referrers, or the fallback tag where a registry has no such API.

Stored exactly as cosign 3 stores attestations, so that `cosign verify-attestation` finds ours. The
fallback tag `sha256-<hex>` is an index that clients keep by read-modify-write (OCI distribution 1.1,
"Referrers tag schema"); what others listed there is kept as it is.
Limits: OCI has no compare-and-swap, so two machines that write one fallback tag at the same moment can lose
an entry. Publishing holds a lock on its machine and reads everything back before the first tag.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from mtbuild.digest import Digest
from mtbuild.publish.dsse import BUNDLE, Envelope, UnverifiedError
from mtbuild.publish.evidence import predicate_type
from mtbuild.publish.registry import INDEX, MANIFEST, Descriptor, Manifest, Repository
from mtbuild.publish.transport import NotInRegistryError, RegistryError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["attach", "attached", "fallback_tag"]

_EMPTY = "application/vnd.oci.empty.v1+json"
_TRIES = 5
_EVIDENCE_LIMIT = 32 * 2**20  # two reports of 8 MiB, in base64


def fallback_tag(digest: Digest) -> str:
    return f"sha256-{digest.hex}"


def attach(repository: Repository, subject: Manifest, envelope: Envelope) -> Digest:
    """Attach a signed envelope to a manifest; attaching the same bytes again changes nothing.

    Returns the digest of the artefact's manifest. Raises RegistryError if the registry loses it.
    """
    config = repository.put_blob(b"{}", media_type=_EMPTY)
    layer = repository.put_blob(envelope.body, media_type=BUNDLE)
    annotations = {
        "dev.sigstore.bundle.content": "dsse-envelope",
        "dev.sigstore.bundle.predicateType": predicate_type(envelope),
    }
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": BUNDLE,
        "config": config.to_json(),
        "layers": [layer.to_json()],
        "subject": subject.descriptor.to_json(),
        "annotations": annotations,
    }
    body = json.dumps(document, separators=(",", ":")).encode()
    artefact = Manifest(body=body, media_type=MANIFEST)
    registered = repository.put_manifest(artefact)
    if not registered:
        _list(repository, subject.digest, artefact, annotations)
    return artefact.digest


def _list(repository: Repository, subject: Digest, artefact: Manifest, annotations: dict[str, str]) -> None:
    """Add an artefact to the fallback tag's index; tried again where another writer came between."""
    tag = fallback_tag(subject)
    entry = {**artefact.descriptor.to_json(), "artifactType": BUNDLE, "annotations": annotations}
    for _ in range(_TRIES):
        listed = _listed(repository, subject)
        if any(part.get("digest") == entry["digest"] for part in listed):
            return
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [*listed, entry]}
        body = json.dumps(index, separators=(",", ":")).encode()
        try:
            repository.put_manifest(Manifest(body=body, media_type=INDEX), tag=tag)
        except RegistryError:
            # Written over at once by another writer? Then ours is missing there; a lasting fault comes again.
            if any(part.get("digest") == entry["digest"] for part in _listed(repository, subject)):
                return
    if not any(part.get("digest") == entry["digest"] for part in _listed(repository, subject)):
        msg = f"{repository.name}:{tag} does not keep what is written to it ({_TRIES} tries)"
        raise RegistryError(msg, fix="is another writer busy there? run the same command again")


def _listed(repository: Repository, subject: Digest) -> list[dict[str, Any]]:
    index = repository.find_manifest(fallback_tag(subject))
    return list(index.data.get("manifests") or ()) if index is not None and index.is_index else []


def attached(
    repository: Repository, subject: Digest, *, note: Callable[[str], None] = lambda _: None
) -> tuple[Envelope, ...]:
    """Every bundle attached to a digest, by either way, unverified. What is broken is noted, not raised."""
    found = list(repository.referrers(subject) or ())
    known = {part.digest for part in found}
    listed = [Descriptor.from_json(part) for part in _listed(repository, subject)]
    found += [part for part in listed if part.digest not in known]
    envelopes: dict[Digest, Envelope] = {}
    for part in found:
        if part.artifact_type not in ("", BUNDLE, _EMPTY):  # cosign 3 lists its own under the empty type
            continue
        try:
            for envelope in _bundles(repository, subject, part.digest):
                envelopes[envelope.digest] = envelope
        except (NotInRegistryError, UnverifiedError) as error:
            note(f"{repository.name}: attachment {part.digest.short} is left out: {error.message}")
    return tuple(envelopes.values())


def _bundles(repository: Repository, subject: Digest, artefact: Digest) -> list[Envelope]:
    data = repository.manifest(artefact).data
    if (data.get("subject") or {}).get("digest") != str(subject):
        msg = "is about another digest"
        raise UnverifiedError(msg)
    layers = [Descriptor.from_json(part) for part in data.get("layers") or ()]
    return [
        Envelope.from_bytes(
            repository.blob(layer.digest, limit=_EVIDENCE_LIMIT), where=f"{repository.name}@{artefact}"
        )
        for layer in layers
        if layer.media_type == BUNDLE
    ]
