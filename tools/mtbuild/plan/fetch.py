"""HTTP for plans: retries, byte ranges, credentials that never leave their host, every byte counted."""

from __future__ import annotations

import base64
import netrc
import os
import ssl
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urljoin, urlsplit

from mtbuild.errors import InfrastructureError
from mtbuild.plan.index_settings import redact

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from mtbuild.plan.index_settings import IndexSettings

__all__ = ["Answer", "Fetcher", "NoRanges"]

_ATTEMPTS = 5
_FLAKY = frozenset({408, 425, 429, 500, 502, 503, 504})
_REDIRECTS = 8
_LONGEST_WAIT_S = 20.0
_CHUNK = 65536
_T = TypeVar("_T")


class NoRanges(Exception):  # noqa: N818 - an answer, not an error: the next rung of the ladder is taken
    """Raised when a server answers a byte range with the whole file, or refuses it."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A response: `status` is any 2xx, 304 or 4xx; `total` is the file's size if a range told it."""

    status: int
    content: bytes
    headers: Mapping[str, str]
    total: int | None = None


class Fetcher:
    """GETs with retries. Thread-safe; `bytes` and `requests` count what went over the wire.

    Credentials belong to an origin (scheme, host, port): each hop of a redirect looks up its own, so that
    none reaches another host.
    """

    def __init__(self, settings: IndexSettings, *, backoff_s: float = 0.3, timeout_s: float = 30.0) -> None:
        self._settings = settings
        self._backoff_s = backoff_s
        self._timeout_s = timeout_s
        self._client: Any = None
        self._lock = threading.Lock()
        self._netrc = _netrc()
        self.bytes = 0
        self.requests = 0

    def get(self, url: str, headers: Mapping[str, str] | None = None) -> Answer:
        """The whole body. Raises InfrastructureError where no answer comes or the server keeps failing."""
        return self._retry(url, lambda: self._get(url, dict(headers or {})))

    def range(self, url: str, first: int, last: int) -> Answer:
        """Bytes `first`…`last` inclusive; a negative `first` counts from the end. Raises NoRanges."""
        return self._retry(url, lambda: self._range(url, first, last))

    def chunks(self, url: str, first: int, last: int, size: int = 1 << 20) -> Iterator[bytes]:
        """The same range piece by piece, so that a reader can stop early."""
        while first <= last:
            end = min(first + size - 1, last)
            yield self.range(url, first, end).content
            first = end + 1

    def download(self, url: str, path: Path, progress: Callable[[int], None]) -> None:
        """The whole file to `path`; `progress` gets the bytes so far."""

        def once() -> None:
            with self._open(url, {}) as response, path.open("wb") as out:
                self._expect(response, url, {200})
                done = 0
                for piece in response.iter_raw(_CHUNK):
                    out.write(piece)
                    done += len(piece)
                    self._count(len(piece))
                    progress(done)

        self._retry(url, once)

    def _get(self, url: str, headers: dict[str, str]) -> Answer:
        with self._open(url, headers) as response:
            content = b"".join(response.iter_bytes())
            self._count(response.num_bytes_downloaded)
            self._raise_flaky(response)
            return Answer(status=response.status_code, content=content, headers=response.headers)

    def _range(self, url: str, first: int, last: int) -> Answer:
        wanted = f"bytes={first}" if first < 0 else f"bytes={first}-{last}"
        # identity: a compressed range would be a range of something else
        with self._open(url, {"Range": wanted, "Accept-Encoding": "identity"}) as response:
            self._raise_flaky(response)
            if response.status_code != 206:
                self._expect(response, url, {200, 400, 405, 406, 416, 501})
                raise NoRanges(url)  # the body, perhaps a gigabyte, is left unread
            content = b"".join(response.iter_raw())
            self._count(len(content))
        total = response.headers.get("content-range", "").rpartition("/")[2]
        return Answer(
            status=206,
            content=content,
            headers=response.headers,
            total=int(total) if total.isdigit() else None,
        )

    def _open(self, url: str, headers: dict[str, str]) -> Any:
        return _Hops(self, url, headers)

    def _authorization(self, url: str) -> dict[str, str]:
        parts = urlsplit(url)
        here = (parts.scheme, parts.hostname, parts.port)
        for source in self._settings.sources:
            its = urlsplit(source.url)
            if source.user and (its.scheme, its.hostname, its.port) == here:
                return _basic(source.user, source.password)
        found = self._netrc.authenticators(parts.hostname or "") if self._netrc else None
        return _basic(found[0] or "", found[2] or "") if found else {}

    def _retry(self, url: str, once: Callable[[], _T]) -> _T:
        import httpx

        for attempt in range(_ATTEMPTS):
            try:
                return once()
            except (_Flaky, httpx.TransportError) as error:
                if attempt == _ATTEMPTS - 1:
                    why = str(error) or type(error).__name__
                    msg = f"{redact(url)} could not be read after {_ATTEMPTS} attempts: {why}"
                    raise InfrastructureError(msg, fix=_fix(error)) from error
                wait_s = self._backoff_s * 2**attempt
                if isinstance(error, _Flaky) and error.retry_after_s is not None:
                    wait_s = min(error.retry_after_s, _LONGEST_WAIT_S)
                time.sleep(wait_s)
        raise AssertionError  # the last attempt returned or raised

    def _raise_flaky(self, response: Any) -> None:
        if response.status_code in _FLAKY:
            after = response.headers.get("retry-after", "")
            raise _Flaky(response.status_code, float(after) if after.isdigit() else None)

    def _expect(self, response: Any, url: str, allowed: set[int]) -> None:
        self._raise_flaky(response)
        if response.status_code not in allowed:
            msg = f"{redact(url)} answered with HTTP status {response.status_code}"
            raise InfrastructureError(msg, fix=_status_fix(response.status_code))

    def _count(self, size: int) -> None:
        with self._lock:
            self.bytes += size

    def client(self) -> Any:
        """The connection pool, made on first use: a warm plan never needs one."""
        with self._lock:
            if self._client is None:
                import httpx

                self._client = httpx.Client(
                    verify=_context(self._settings.ca_file, self._settings.ca_dir),
                    timeout=self._timeout_s,
                    follow_redirects=False,
                    limits=httpx.Limits(max_connections=32, max_keepalive_connections=32),
                )
            self.requests += 1
            return self._client


class _Flaky(Exception):  # noqa: N818 - told apart from errors: it is tried again
    def __init__(self, status: int, retry_after_s: float | None) -> None:
        super().__init__(f"HTTP status {status}")
        self.retry_after_s = retry_after_s


class _Hops:
    """A streamed response at the end of its redirects."""

    def __init__(self, fetcher: Fetcher, url: str, headers: dict[str, str]) -> None:
        self._fetcher, self._url, self._headers = fetcher, url, headers
        self._stream: Any = None

    def __enter__(self) -> Any:
        url = self._url
        for _ in range(_REDIRECTS):
            client = self._fetcher.client()
            headers = {**self._headers, **self._fetcher._authorization(url)}
            self._stream = client.stream("GET", url, headers=headers)
            response = self._stream.__enter__()
            if response.status_code not in {301, 302, 303, 307, 308}:
                return response
            self._stream.__exit__(None, None, None)
            url = urljoin(url, response.headers.get("location", ""))
            if urlsplit(url).scheme not in {"http", "https"}:
                break
        msg = f"{redact(self._url)} redirects too often, or to what is no web address"
        raise InfrastructureError(msg, fix="check the index's URL")

    def __exit__(self, *exception: object) -> None:
        self._stream.__exit__(*exception)


def _basic(user: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


def _context(ca_file: Path | None, ca_dir: Path | None) -> ssl.SSLContext:
    if ca_file is None and ca_dir is None:
        import httpx

        return httpx.create_ssl_context()
    return ssl.create_default_context(cafile=ca_file, capath=ca_dir)


def _netrc() -> netrc.netrc | None:
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        return netrc.netrc(path) if path.is_file() else None
    except (netrc.NetrcParseError, OSError):
        return None  # as pip and curl do: an unreadable netrc is no netrc


def _fix(error: Exception) -> str:
    if "CERTIFICATE" in str(error).upper():
        return "name the CA bundle of your index in SSL_CERT_FILE"
    return "check the network and the index that uv or pip is configured with; nothing was changed"


def _status_fix(status: int) -> str:
    if status in {401, 403, 407}:
        return "put the index's credentials into its URL, UV_INDEX_<NAME>_USERNAME/_PASSWORD, or ~/.netrc"
    return "check the index that uv or pip is configured with; nothing was changed"
