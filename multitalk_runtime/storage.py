"""Files in and out of S3, at any endpoint, so that what was stored is what arrives.

The endpoint and the credentials are the operator's (boto3's usual chain, or RunPod's `BUCKET_ACCESS_KEY_ID`
pair); a job only names bucket and key, and only those on the allowlist. Uploads carry an MD5 for each part,
which the server checks, and the ETag that comes back is checked here. Downloads are resumed where they broke
off, of the same version of the object, and compared with its SHA-256 (which our own uploads leave in the
metadata) or its ETag.
"""

from __future__ import annotations

import base64
import hashlib
import os
import time
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from multitalk_runtime.errors import FetchFault, ForbiddenFault, StorageFault, TooLargeFault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from multitalk_runtime.settings import Settings

__all__ = ["Storage", "check_allowed"]

PART = 8 << 20  # bytes; files above this go up in parts
_SHA256 = "mt-sha256"  # the metadata key of our uploads
_BLOCK = 1 << 18
_TRIES = 5  # breaks in a row without a byte coming
_DENIED = {
    "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken",
    "Forbidden", "AllAccessDisabled", "AccountProblem",
}  # fmt: skip
_ABSENT = {"404", "NoSuchKey", "NoSuchBucket", "NotFound", "NoSuchVersion"}
_CHANGED = {"412", "PreconditionFailed"}
_MANGLED = {"BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"}


def check_allowed(bucket: str, key: str, *, settings: Settings, field: str) -> None:
    """Whether the operator's allowlist has this bucket, or a prefix in it that the key lies under.

    Raises ForbiddenFault, also for keys that a storage made of folders could read as a path out of a prefix.
    """
    steps = key.split("/")
    plain = all(step not in ("", ".", "..") for step in steps) and key.isprintable() and "\\" not in key
    if plain:
        for entry in settings.s3_allowed:
            name, _, prefix = entry.removeprefix("s3://").strip("/").partition("/")
            if name == bucket and (not prefix or key.startswith(prefix + "/")):
                return
    msg = "this bucket or prefix is not on the worker's allowlist" if plain else "the key is not a plain path"
    raise ForbiddenFault("forbidden.bucket", msg, field=field)


class Storage:
    """One client, made on first use. Every method raises StorageFault with the job's `field`."""

    def __init__(self, settings: Settings, *, wait: Callable[[float], None] = time.sleep) -> None:
        self._settings = settings
        self._wait = wait
        self._made: Any = None

    def check_credentials(self, *, field: str) -> None:
        """Raises StorageFault if there are none at all: known before hours of work, not after."""
        with _faults(field):
            if not _own_pair() and self._session.get_credentials() is None:
                msg = "the worker has no credentials for object storage"
                raise StorageFault("storage.credentials", msg, field=field)

    def get(self, bucket: str, key: str, target: Path, *, max_bytes: int, field: str) -> int:
        """Download to `target`; its size in bytes. Raises TooLargeFault too. A failure leaves no file."""
        check_allowed(bucket, key, settings=self._settings, field=field)
        deadline = time.monotonic() + self._settings.fetch_s
        try:
            with _faults(field):
                for last in (False, True):  # bytes that came wrong are fetched once more
                    head = self._client.head_object(Bucket=bucket, Key=key)
                    size = int(head["ContentLength"])
                    if size > max_bytes:
                        msg = f"{size} bytes; at most {max_bytes} are taken"
                        raise TooLargeFault("too_large.bytes", msg, field=field)
                    target.unlink(missing_ok=True)
                    self._download(bucket, key, head, target, deadline=deadline, field=field)
                    if self._intact(bucket, key, head, target):
                        return size
                    if last:
                        msg = "the bytes that came don't have the object's checksum"
                        raise StorageFault("storage.checksum", msg, field=field)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
        return 0

    def _download(
        self, bucket: str, key: str, head: dict[str, Any], target: Path, *, deadline: float, field: str
    ) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        size, breaks = int(head["ContentLength"]), 0
        with target.open("xb") as file:
            while (at := file.tell()) < size:
                try:
                    answer = self._client.get_object(
                        Bucket=bucket, Key=key, IfMatch=head["ETag"], Range=f"bytes={at}-"
                    )
                    for block in answer["Body"].iter_chunks(_BLOCK):
                        file.write(block)
                        if time.monotonic() > deadline:
                            msg = "the storage was too slow"
                            raise FetchFault("fetch.timeout", msg, field=field)
                except ClientError:
                    raise  # the server has spoken; botocore has tried again already where that helps
                except (BotoCoreError, OSError):
                    breaks = 0 if file.tell() > at else breaks + 1
                    if breaks >= _TRIES or time.monotonic() > deadline:
                        raise
                    self._wait(min(0.2 * 2**breaks, 5.0))

    def _intact(self, bucket: str, key: str, head: dict[str, Any], file: Path) -> bool:
        if file.stat().st_size != int(head["ContentLength"]):
            return False
        told = head.get("Metadata", {}).get(_SHA256)
        if told is not None:
            return _digest(file, hashlib.sha256()) == told
        etag = head["ETag"].strip('"')
        if head.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in head:
            return True  # such ETags say nothing of the content; TLS has to do
        if len(etag) == 32:
            return _digest(file, hashlib.md5(usedforsecurity=False)) == etag
        if "-" in etag:
            part = self._client.head_object(Bucket=bucket, Key=key, PartNumber=1)
            return _etag_of_parts(file, int(part["ContentLength"])) in (etag, None)
        return True

    def put(self, file: Path, bucket: str, key: str, *, content_type: str, field: str) -> None:
        """Upload, in parts if it is large; nothing half done stays behind."""
        size = file.stat().st_size
        given = {
            "Bucket": bucket,
            "Key": key,
            "ContentType": content_type,
            "Metadata": {_SHA256: _digest(file, hashlib.sha256())},
        }
        with _faults(field):
            if size <= PART:
                body = file.read_bytes()
                answer = self._client.put_object(**given, Body=body, ContentMD5=_md5(body))
                self._check_etag(answer, hashlib.md5(body, usedforsecurity=False).hexdigest(), field)
                return
            upload = self._client.create_multipart_upload(**given)
            where = {"Bucket": bucket, "Key": key, "UploadId": upload["UploadId"]}
            try:
                parts = self._parts(file, where, field)
                self._client.complete_multipart_upload(**where, MultipartUpload={"Parts": parts})
            except BaseException:
                with _quiet():
                    self._client.abort_multipart_upload(**where)
                raise
            head = self._client.head_object(Bucket=bucket, Key=key)
            if int(head["ContentLength"]) != size:
                msg = "the stored object has another size than the file"
                raise StorageFault("storage.checksum", msg, field=field)

    def _parts(self, file: Path, where: dict[str, str], field: str) -> list[dict[str, Any]]:
        parts = []
        with file.open("rb") as source:
            while body := source.read(PART):
                number = len(parts) + 1
                answer = self._client.upload_part(
                    **where, PartNumber=number, Body=body, ContentMD5=_md5(body)
                )
                self._check_etag(answer, hashlib.md5(body, usedforsecurity=False).hexdigest(), field)
                parts.append({"PartNumber": number, "ETag": answer["ETag"]})
        return parts

    def _check_etag(self, answer: dict[str, Any], md5: str, field: str) -> None:
        etag = answer["ETag"].strip('"')
        if answer.get("ServerSideEncryption", "AES256") == "AES256" and len(etag) == 32 and etag != md5:
            msg = "the storage took other bytes than were sent"
            raise StorageFault("storage.checksum", msg, field=field)

    def presign(self, bucket: str, key: str, *, expires_s: int, field: str) -> str:
        """A URL that reads the object for `expires_s` seconds, without credentials."""
        with _faults(field):
            url: str = self._client.generate_presigned_url(
                "get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=expires_s
            )
            return url

    @property
    def _client(self) -> Any:
        if self._made is None:
            from botocore.config import Config

            settings = self._settings
            self._made = self._session.client(
                "s3",
                endpoint_url=settings.s3_endpoint,
                region_name=settings.s3_region or (None if not settings.s3_endpoint else "us-east-1"),
                config=Config(
                    signature_version="s3v4",
                    connect_timeout=10,
                    read_timeout=min(30.0, settings.fetch_s),
                    retries={"mode": "standard", "total_max_attempts": 5},
                    # Names as hosts exist at AWS alone; and newer checksum headers are not known everywhere.
                    s3={"addressing_style": "path" if settings.s3_endpoint else "auto"},
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                ),
                **_own_pair(),
            )
        return self._made

    @cached_property
    def _session(self) -> Any:
        import boto3

        return boto3.session.Session()


def _own_pair() -> dict[str, str]:
    """RunPod's own names for credentials, which boto3 does not know."""
    names = {
        "aws_access_key_id": "BUCKET_ACCESS_KEY_ID",
        "aws_secret_access_key": "BUCKET_SECRET_ACCESS_KEY",
    }
    pair = {option: os.environ.get(name, "") for option, name in names.items()}
    return pair if all(pair.values()) else {}


@contextmanager
def _quiet() -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError, OSError):
        return


@contextmanager
def _faults(field: str) -> Iterator[None]:
    """botocore's exceptions as faults. Their texts stay here: they have addresses and key ids in them."""
    from botocore import exceptions as boto

    def fault(code: str, message: str) -> StorageFault:
        return StorageFault(code, message, field=field)

    try:
        yield
    except (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError) as error:
        raise fault("storage.credentials", "the worker has no credentials for object storage") from error
    except boto.ParamValidationError as error:
        raise fault("storage.not_found", "this is not a name that a bucket or key can have") from error
    except boto.ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        if code in _DENIED:
            raise fault("storage.credentials", "the storage refuses the worker's credentials") from error
        if code in _ABSENT:
            raise fault("storage.not_found", "there is no such object or bucket") from error
        if code in _CHANGED:
            raise fault("storage.checksum", "the object changed while it was read") from error
        if code in _MANGLED:
            raise fault("storage.checksum", "the bytes were damaged on their way") from error
        raise fault("storage.unavailable", "the storage could not serve the request") from error
    except (boto.BotoCoreError, OSError) as error:
        raise fault(
            "storage.unavailable", "the storage can't be reached, or broke off again and again"
        ) from error


def _digest(file: Path, digest: Any) -> str:
    with file.open("rb") as source:
        while block := source.read(_BLOCK):
            digest.update(block)
    text: str = digest.hexdigest()
    return text


def _md5(body: bytes) -> str:
    return base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()


def _etag_of_parts(file: Path, part: int) -> str | None:
    """S3's ETag of a file that went up in parts of this size; None if the size can't be right."""
    if part < 1 or (part < 5 << 20 and part < file.stat().st_size):
        return None  # a server that does not say the size of part 1
    digests = []
    with file.open("rb") as source:
        while block := source.read(part):
            digests.append(hashlib.md5(block, usedforsecurity=False).digest())
    return f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}"
