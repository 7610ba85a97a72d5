"""Downloads of URLs that strangers wrote.

Only http and https; the host's addresses are resolved here, every one of them must be public (or allowed by
the operator), and the connection goes to the very address that was checked, so that a name can't change its
mind in between. The same for every redirect. Size and time are bounded, proxies of the environment are not
used, and no credentials, cookies or worker headers are sent.
"""

from __future__ import annotations

import ipaddress
import socket
import time
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

import httpcore

from multitalk_runtime.errors import FetchFault, ForbiddenFault, TooLargeFault

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterable
    from pathlib import Path

    from multitalk_runtime.settings import Network, Settings

__all__ = ["fetch_url"]

_REDIRECTS = 5
_STATUS_REDIRECT = (301, 302, 303, 307, 308)
_CHUNK_S = 20.0  # a server that sends nothing for so long is given up
_HEADERS = [
    (b"User-Agent", b"multitalk-runtime"),
    (b"Accept", b"*/*"),
    (b"Accept-Encoding", b"identity"),  # the size that is announced is the size that comes
]


def fetch_url(url: str, target: Path, *, max_bytes: int, settings: Settings, field: str) -> int:
    """Download to `target`; returns its size in bytes.

    Raises ForbiddenFault (scheme, address), FetchFault (name, status, redirects, time, truncated) or
    TooLargeFault. A failed download leaves no file.
    """
    deadline = time.monotonic() + settings.fetch_s
    guard = _Guard(allowed=settings.allow_addresses, field=field, deadline=deadline)
    try:
        with httpcore.ConnectionPool(network_backend=guard, max_connections=1, retries=0) as pool:
            for _ in range(_REDIRECTS + 1):
                _check_scheme(url, field)
                following = _one(pool, url, target, max_bytes=max_bytes, deadline=deadline, field=field)
                if following is None:
                    return target.stat().st_size
                url = urljoin(url, following)
        msg = f"more than {_REDIRECTS} redirects"
        raise FetchFault("fetch.redirects", msg, field=field)
    except httpcore.TimeoutException as error:
        msg = "the server did not answer in time"
        raise FetchFault("fetch.timeout", msg, field=field) from error
    except (httpcore.RemoteProtocolError, httpcore.ReadError) as error:
        msg = "the connection ended before everything had come"
        raise FetchFault("fetch.truncated", msg, field=field) from error
    except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.UnsupportedProtocol) as error:
        msg = "the server can't be reached"
        raise FetchFault("fetch.unreachable", msg, field=field) from error


def _check_scheme(url: str, field: str) -> None:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        msg = "this is not a URL"
        raise FetchFault("fetch.unreachable", msg, field=field, hint="correct the URL") from error
    if parts.scheme not in ("http", "https"):
        msg = f"the scheme {parts.scheme[:20]!r} is not fetched"
        raise ForbiddenFault("forbidden.scheme", msg, field=field)
    if not parts.hostname or port == 0:
        msg = "the URL names no host"
        raise FetchFault("fetch.unreachable", msg, field=field, hint="correct the URL")
    if parts.username is not None or parts.password is not None:
        msg = "the URL carries credentials"
        raise ForbiddenFault("forbidden.option", msg, field=field, hint="use a presigned URL")
    if any(ord(letter) < 33 or ord(letter) > 126 for letter in url):
        msg = "the URL has characters that must be percent-encoded"
        raise FetchFault("fetch.unreachable", msg, field=field, hint="percent-encode the URL")


def _one(
    pool: httpcore.ConnectionPool, url: str, target: Path, *, max_bytes: int, deadline: float, field: str
) -> str | None:
    """One request; the next URL for a redirect, None when the file is there."""
    wait = max(0.1, min(_CHUNK_S, deadline - time.monotonic()))
    timeout = {"connect": wait, "read": wait, "write": wait, "pool": wait}
    with pool.stream("GET", url, headers=_HEADERS, extensions={"timeout": timeout}) as response:
        headers = {name.lower(): value.decode("latin-1") for name, value in response.headers}
        if response.status in _STATUS_REDIRECT:
            if b"location" not in headers:
                msg = "a redirect without a target"
                raise FetchFault("fetch.redirects", msg, field=field)
            return headers[b"location"]
        if response.status != 200:
            msg = f"the server answered with status {response.status}"
            raise FetchFault("fetch.status", msg, field=field)
        announced = headers.get(b"content-length", "")
        if announced.isdigit() and int(announced) > max_bytes:
            raise _too_large(int(announced), max_bytes, field)
        _store(response.iter_stream(), target, max_bytes=max_bytes, deadline=deadline, field=field)
        return None


def _store(chunks: Iterable[bytes], target: Path, *, max_bytes: int, deadline: float, field: str) -> None:
    size = 0
    try:
        with target.open("xb") as file:
            for chunk in chunks:
                size += len(chunk)
                if size > max_bytes:
                    raise _too_large(size, max_bytes, field)
                if time.monotonic() > deadline:
                    msg = "the download took too long"
                    raise FetchFault("fetch.timeout", msg, field=field)
                file.write(chunk)
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _too_large(size: int, limit: int, field: str) -> TooLargeFault:
    return TooLargeFault("too_large.bytes", f"{size} bytes or more; at most {limit} are taken", field=field)


def _left(deadline: float, timeout: float | None) -> float:
    """Seconds that one more act may take. Raises httpcore.ReadTimeout where none are left."""
    left = deadline - time.monotonic()
    if left <= 0:
        msg = "the download took too long"
        raise httpcore.ReadTimeout(msg)
    return left if timeout is None else min(timeout, left)


class _Bounded(httpcore.NetworkStream):
    """A connection that ends at the deadline, however slowly its other end drips headers or bytes."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self._stream, self._deadline = stream, deadline

    def _left(self, timeout: float | None) -> float:
        return _left(self._deadline, timeout)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._left(timeout))

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _Bounded(
            self._stream.start_tls(ssl_context, server_hostname, self._left(timeout)), self._deadline
        )

    def get_extra_info(self, info: str) -> object:
        return self._stream.get_extra_info(info)

    def close(self) -> None:
        self._stream.close()


class _Guard(httpcore.SyncBackend):
    """Connects to addresses that were checked, and to no others."""

    def __init__(self, *, allowed: tuple[Network, ...], field: str, deadline: float) -> None:
        self._allowed = allowed
        self._field = field
        self._deadline = deadline

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        addresses = self._addresses(host, port)
        # One bad address among good ones is enough: a name that leads inside is not followed at all.
        for address in addresses:
            if not self._permitted(address):
                msg = "the host's name leads to a private or special address"
                raise ForbiddenFault("forbidden.address", msg, field=self._field)
        failed: httpcore.NetworkError | httpcore.TimeoutException | None = None
        for address in dict.fromkeys(map(str, addresses)):  # one of a host's addresses may be out of reach
            try:
                wait = _left(self._deadline, timeout)
                stream = super().connect_tcp(
                    address, port, timeout=wait, local_address=local_address, socket_options=socket_options
                )
                return _Bounded(stream, self._deadline)
            except (httpcore.NetworkError, httpcore.TimeoutException) as error:
                failed = error
                if time.monotonic() > self._deadline:
                    break
        raise failed or httpcore.ConnectError("the name has no address")

    def connect_unix_socket(self, *_: object, **__: object) -> httpcore.NetworkStream:
        msg = "a socket of this machine is never fetched from"
        raise ForbiddenFault("forbidden.address", msg, field=self._field)

    def _addresses(self, host: str, port: int) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
        try:
            found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            msg = "the host's name can't be resolved"
            raise FetchFault("fetch.unreachable", msg, field=self._field) from error
        return [ipaddress.ip_address(str(item[4][0]).partition("%")[0]) for item in found]

    def _permitted(self, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
        if isinstance(address, ipaddress.IPv6Address):
            inner = (
                address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
            )
            if inner is not None:  # an IPv4 address in disguise is judged as what it is
                return self._permitted(inner)
        if any(address.version == network.version and address in network for network in self._allowed):
            return True
        return address.is_global and not (
            address.is_multicast or address.is_reserved or address.is_unspecified
        )
