"""The verdict as others read it: a SLSA verification summary (VSA), bound to a digest and a repository.

It names the policy with its digest, the policy itself, and every envelope that counted; so anyone can judge
again. What `pick` must know of the image (versions, floors) is in it too: signed, and so never told by the
image. Source: SLSA verification_summary v1.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from mtbuild.digest import Digest
from mtbuild.errors import InputError
from mtbuild.publish import dsse
from mtbuild.publish.dsse import UnverifiedError
from mtbuild.publish.evidence import STATEMENT, payload_of, predicate_type
from mtbuild.publish.gpus import Floor
from mtbuild.publish.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mtbuild.publish.dsse import Envelope
    from mtbuild.publish.keys import PrivateKey, PublicKey

__all__ = ["VSA", "Image", "Summary", "sign", "verify"]

VSA = "https://slsa.dev/verification_summary/v1"
VERIFIER = "tag:mtbuild,2026:gate/v1"
EXTENSION = "tag:mtbuild,2026:release/v1"


@dataclass(frozen=True, kw_only=True)
class Image:
    """What a release says of its image. `tag` is its write-once tag; `created` the time of the build."""

    cell_id: str
    cell_name: str
    build_id: str
    tag: str
    flavour: str
    platform: str
    python: str
    torch: str
    cuda: str
    triton: str
    xformers: str | None
    targets: tuple[str, ...]
    floors: tuple[Floor, ...]
    degraded: tuple[str, ...]
    size_bytes: int
    created: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Image:
        """From such a document; TypeError or KeyError if it is none."""
        return cls(
            **{
                **data,
                "targets": tuple(data["targets"]),
                "floors": tuple(Floor(**floor) for floor in data["floors"]),
                "degraded": tuple(data["degraded"]),
            }
        )


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A verdict that said yes. `inputs` are the digests of all envelopes that it rests on."""

    subject: Digest
    repository: str
    policy: Policy
    verified_at: str
    inputs: tuple[Digest, ...]
    image: Image
    signer: str = ""
    envelope: Digest | None = None

    def to_json(self) -> dict[str, Any]:
        """As an in-toto Statement v1 with SLSA's predicate."""
        return {
            "_type": STATEMENT,
            "subject": [{"name": self.repository, "digest": {"sha256": self.subject.hex}}],
            "predicateType": VSA,
            "predicate": {
                "verifier": {"id": VERIFIER, "version": {"mtbuild": version("mtbuild")}},
                "timeVerified": self.verified_at,
                "resourceUri": f"oci://{self.repository}",
                "policy": {"uri": self.policy.uri, "digest": {"sha256": self.policy.digest.hex}},
                "inputAttestations": [{"digest": {"sha256": digest.hex}} for digest in self.inputs],
                "verificationResult": "PASSED",
                "verifiedLevels": [f"MTBUILD_{self.policy.channel.upper()}"],
                "slsaVersion": "1.0",
                EXTENSION: {"schema": 1, "policy": self.policy.to_json(), "image": self.image.to_json()},
            },
        }


def sign(summary: Summary, key: PrivateKey) -> Envelope:
    """Sign a verdict."""
    return dsse.sign(payload_of(summary.to_json()), key)


def verify(envelope: Envelope, keys: Iterable[PublicKey], *, where: str = "verdict") -> Summary:
    """The verdict in an envelope, if one of `keys` signed it, it says PASSED and its policy has its digest.

    Raises UnverifiedError otherwise.
    """
    signer = dsse.verify(envelope, keys, where=where)
    if predicate_type(envelope) != VSA:
        msg = f"is no verification summary ({predicate_type(envelope) or 'no in-toto statement'})"
        raise UnverifiedError(msg, where=where)
    try:
        data = json.loads(envelope.payload)
        predicate = data["predicate"]
        extension = predicate[EXTENSION]
        policy = Policy.from_json(extension["policy"])
        summary = Summary(
            subject=Digest(data["subject"][0]["digest"]["sha256"]),
            repository=str(predicate["resourceUri"]).removeprefix("oci://"),
            policy=policy,
            verified_at=predicate["timeVerified"],
            inputs=tuple(Digest(part["digest"]["sha256"]) for part in predicate["inputAttestations"]),
            image=Image.from_json(extension["image"]),
        )
        sound = (
            predicate["verificationResult"] == "PASSED"
            and predicate["policy"] == {"uri": policy.uri, "digest": {"sha256": policy.digest.hex}}
            and predicate["verifier"]["id"] == VERIFIER
            and summary.inputs
        )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, InputError) as error:
        msg = f"is signed but malformed ({type(error).__name__}: {error})"
        raise UnverifiedError(msg, where=where, fix="publish the digest again with this mtbuild") from error
    if not sound:
        msg = "says no, names another policy than it carries, or rests on no evidence"
        raise UnverifiedError(msg, where=where, fix="publish the digest again")
    return replace(summary, signer=signer.hint, envelope=envelope.digest)
