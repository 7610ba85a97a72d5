"""The keys that evidence is signed with and believed by: ECDSA P-256, as cosign makes and verifies.

Made on first use under `.mtbuild/keys/` and never overwritten. Every further `*.pub` in that folder is
believed as well: that is how the public key of a GPU runner, which signs its own evidence, is trusted.
Where MTBUILD_SIGNING_KEY holds a private key (a secret of a CI job), that one signs and no key file is read,
made or written; nothing of the variable's value is ever printed.
"""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mtbuild.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["SIGNING_KEY", "Keys", "PrivateKey", "PublicKey", "trusted_keys"]

SIGNING_KEY = "MTBUILD_SIGNING_KEY"
_ALGORITHM = ec.ECDSA(hashes.SHA256())
_SPKI = serialization.PublicFormat.SubjectPublicKeyInfo


@dataclass(frozen=True, kw_only=True)
class PublicKey:
    """A P-256 public key. `name` says where it came from, for messages."""

    key: ec.EllipticCurvePublicKey = field(repr=False, compare=False)
    hint: str
    name: str = field(default="", compare=False)

    @classmethod
    def of(cls, key: object, *, name: str = "") -> PublicKey:
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            msg = "is not an ECDSA P-256 public key"
            raise InputError(msg, where=name, fix="make one with `cosign generate-key-pair` or let mtbuild")
        der = key.public_bytes(serialization.Encoding.DER, _SPKI)
        return cls(key=key, hint=base64.b64encode(hashlib.sha256(der).digest()).decode(), name=name)

    @classmethod
    def load(cls, path: Path) -> PublicKey:
        """From a PEM file; InputError if it is missing or holds no P-256 public key."""
        try:
            key = serialization.load_pem_public_key(path.read_bytes())
        except FileNotFoundError as error:
            msg = "there is no such key"
            raise InputError(msg, where=str(path), fix="name the publisher's public key (PEM)") from error
        except ValueError as error:
            msg = f"is not a public key in PEM: {error}"
            raise InputError(msg, where=str(path), fix="name the publisher's public key (PEM)") from error
        return cls.of(key, name=str(path))

    @property
    def pem(self) -> bytes:
        return self.key.public_bytes(serialization.Encoding.PEM, _SPKI)

    def verifies(self, signature: bytes, data: bytes) -> bool:
        """Whether `signature` (ASN.1 DER) is this key's over `data`."""
        try:
            self.key.verify(signature, data, _ALGORITHM)
        except InvalidSignature:
            return False
        return True


@dataclass(frozen=True, kw_only=True)
class PrivateKey:
    """A P-256 private key."""

    key: ec.EllipticCurvePrivateKey = field(repr=False, compare=False)

    @classmethod
    def load(cls, path: Path) -> PrivateKey:
        """From an unencrypted PEM file; InputError if it holds no P-256 private key."""
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        except (ValueError, TypeError) as error:
            msg = f"is not an unencrypted private key in PEM: {error}"
            raise InputError(
                msg, where=str(path), fix="put the right key back; mtbuild never replaces one"
            ) from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
            msg = "is not an ECDSA P-256 private key"
            raise InputError(msg, where=str(path), fix="put the right key back; mtbuild never replaces one")
        return cls(key=key)

    @classmethod
    def from_environment(cls) -> PrivateKey | None:
        """The key in MTBUILD_SIGNING_KEY; None where that is not set.

        Raises InputError, without a word of the value, if it is no unencrypted P-256 private key in PEM.
        """
        text = os.environ.get(SIGNING_KEY)
        if text is None:
            return None
        fix = f"put the PEM of an unencrypted ECDSA P-256 private key into {SIGNING_KEY}, or unset it"
        if not text.strip():
            msg = "is set, but empty: this job does not get the secret (a fork's pull request gets none)"
            raise InputError(msg, where=SIGNING_KEY, fix=fix)
        if "\n" not in text.strip():
            text = text.replace("\\n", "\n")  # some secret stores hand line ends over as two characters
        try:
            key = serialization.load_pem_private_key(text.strip().encode() + b"\n", password=None)
        except Exception:  # noqa: BLE001 - whatever the parser says could quote the key, so it is not told
            key = None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
            msg = "does not hold an unencrypted ECDSA P-256 private key in PEM"
            raise InputError(msg, where=SIGNING_KEY, fix=fix)
        return cls(key=key)

    @property
    def public(self) -> PublicKey:
        return PublicKey.of(self.key.public_key(), name="own")

    def sign(self, data: bytes) -> bytes:
        """An ASN.1 DER signature over SHA-256 of `data`."""
        return self.key.sign(data, _ALGORITHM)


@dataclass(frozen=True, kw_only=True)
class Keys:
    """The key to sign with and the public keys to believe; `own` is first among them."""

    own: PrivateKey
    trusted: tuple[PublicKey, ...]

    @classmethod
    def ensure(cls, folder: Path) -> Keys:
        """The key of MTBUILD_SIGNING_KEY (then nothing is written), else `mtbuild.key` of the folder.

        That is made, mode 0600, where there is none. Safe against a second process doing the same: the first
        one's key is the one that both use.
        """
        given = PrivateKey.from_environment()
        if given is not None:
            return cls(own=given, trusted=(given.public, *_others(folder, given.public)))
        private = folder / "mtbuild.key"
        if not private.exists():
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)
            pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            _create(private, pem, mode=0o600)
        own = PrivateKey.load(private)
        public = folder / "mtbuild.pub"
        if not public.exists():
            _create(public, own.public.pem, mode=0o644)
        elif PublicKey.load(public) != own.public:
            msg = "is not the public half of mtbuild.key beside it"
            raise InputError(
                msg, where=str(public), fix="put the key back that belongs to it; both are yours"
            )
        return cls(own=own, trusted=(own.public, *_others(folder, own.public)))


def trusted_keys(folder: Path, files: tuple[Path, ...] = ()) -> tuple[PublicKey, ...]:
    """The public keys to believe: those files, else every `*.pub` of the folder and the one of our own
    signing key, where the environment holds that. Makes none.

    Raises InputError if there is not one.
    """
    if files:
        return tuple(PublicKey.load(path) for path in files)
    given = PrivateKey.from_environment()
    own = (given.public,) if given is not None else ()
    listed = tuple(PublicKey.load(path) for path in sorted(folder.glob("*.pub")))
    found = (*own, *(key for key in listed if key not in own))
    if not found:
        msg = "there is no public key to verify with"
        raise InputError(msg, where=str(folder), fix="name the publisher's with `--key FILE`")
    return found


def _others(folder: Path, own: PublicKey) -> tuple[PublicKey, ...]:
    loaded = (PublicKey.load(path) for path in sorted(folder.glob("*.pub")))
    return tuple(key for key in loaded if key != own)


def _create(path: Path, data: bytes, *, mode: int) -> None:
    """Write a new file, whole or not at all; leaves one that is there already as it is."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(part, path)  # fails where the name exists, unlike a rename
    except FileExistsError:
        pass
    finally:
        part.unlink()
