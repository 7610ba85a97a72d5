"""Signed envelopes: DSSE 1.0 inside a Sigstore bundle 0.3, the form that cosign stores and verifies.

The bundle's bytes are kept as they were read: their digest is how a verdict names its evidence.
Sources: the DSSE protocol (secure-systems-lab/dsse), sigstore_bundle.proto.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mtbuild.digest import Digest
from mtbuild.errors import InputError, MtbuildError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from mtbuild.publish.keys import PrivateKey, PublicKey

__all__ = ["BUNDLE", "IN_TOTO", "Envelope", "UnverifiedError", "pae", "sign", "verify"]

BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
IN_TOTO = "application/vnd.in-toto+json"


class UnverifiedError(MtbuildError):
    """Raised when a signed document is malformed, or signed by none of the keys that are believed."""


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """A signed payload. `hint` names the key that claims to have signed it; `body` is the bundle's bytes."""

    body: bytes
    payload: bytes
    payload_type: str
    signature: bytes
    hint: str

    @property
    def digest(self) -> Digest:
        """Of the bundle's bytes."""
        return Digest.of(self.body)

    @classmethod
    def from_bytes(cls, body: bytes, *, where: str = "bundle") -> Envelope:
        """From a bundle; UnverifiedError if it is none. Nothing is verified yet."""
        fix = "sign the evidence again, or name the right file"
        try:
            data = json.loads(body)
            envelope = data["dsseEnvelope"]
            media_type, signatures = data["mediaType"], envelope["signatures"]
            parsed = cls(
                body=body,
                payload=base64.b64decode(envelope["payload"], validate=True),
                payload_type=envelope["payloadType"],
                signature=base64.b64decode(signatures[0]["sig"], validate=True),
                hint=str((data["verificationMaterial"].get("publicKey") or {}).get("hint", "")),
            )
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, binascii.Error) as error:
            msg = f"is not a Sigstore bundle with a DSSE envelope ({type(error).__name__}: {error})"
            raise UnverifiedError(msg, where=where, fix=fix) from error
        if media_type != BUNDLE or len(signatures) != 1 or not isinstance(parsed.payload_type, str):
            msg = f"is not a Sigstore bundle 0.3 with one signature (media type {media_type!r})"
            raise UnverifiedError(msg, where=where, fix=fix)
        return parsed

    @classmethod
    def load(cls, path: Path) -> Envelope:
        """From a file that the user named; InputError if it is missing or no bundle."""
        fix = "name what `mtbuild smoke --out FILE` wrote"
        try:
            return cls.from_bytes(path.read_bytes())
        except FileNotFoundError as error:
            msg = "there is no such evidence"
            raise InputError(msg, where=str(path), fix=fix) from error
        except UnverifiedError as error:
            raise InputError(error.message, where=str(path), fix=fix) from error

    def write(self, path: Path) -> None:
        """To a file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_bytes(self.body)
        part.replace(path)


def pae(payload_type: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: what is signed, so that no type can pass for another."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def sign(payload: bytes, key: PrivateKey, *, payload_type: str = IN_TOTO) -> Envelope:
    """Sign a payload; the bundle names the key by the SHA-256 of its DER, as cosign does."""
    signature = key.sign(pae(payload_type, payload))
    hint = key.public.hint
    bundle = {
        "mediaType": BUNDLE,
        "verificationMaterial": {"publicKey": {"hint": hint}},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": payload_type,
            "signatures": [{"sig": base64.b64encode(signature).decode()}],
        },
    }
    return Envelope(
        body=json.dumps(bundle, separators=(",", ":")).encode(),
        payload=payload,
        payload_type=payload_type,
        signature=signature,
        hint=hint,
    )


def verify(envelope: Envelope, keys: Iterable[PublicKey], *, where: str = "evidence") -> PublicKey:
    """The key among `keys` that signed it; UnverifiedError if none did. The hint only sorts them."""
    message = pae(envelope.payload_type, envelope.payload)
    known = sorted(keys, key=lambda key: key.hint != envelope.hint)
    for key in known:
        if key.verifies(envelope.signature, message):
            return key
    names = ", ".join(key.name or key.hint for key in known) or "none"
    msg = f"is signed by no key that is believed (it names {envelope.hint or 'no key'}; tried: {names})"
    raise UnverifiedError(
        msg, where=where, fix="put the signer's public key under .mtbuild/keys/, if you believe it"
    )
