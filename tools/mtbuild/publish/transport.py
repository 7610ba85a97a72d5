"""How mtbuild speaks HTTP to a registry: credentials, tokens, retries, and what each failure means.

Plain HTTP on loopback only, TLS everywhere else. Credentials come from docker's own configuration and
never leave the registry's host, except to the token service that it names. What is not there is never
asked for twice; what may come back (a lost connection, 429, 5xx) is, a bounded number of times.
"""

from __future__ import annotations

import base64
import ipaddress
import json
import os
import random
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

import httpx

from mtbuild import proc
from mtbuild.errors import CommandError, InfrastructureError, InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

__all__ = [
    "Credentials",
    "NotInRegistryError",
    "RegistryDeniedError",
    "RegistryError",
    "RegistryUnavailableError",
    "Transport",
    "credentials_for",
]

T = TypeVar("T")

_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_HUB_NAMES = ("docker.io", "index.docker.io")
_DOCKER_HUB = "https://index.docker.io/v1/"  # how docker's configuration calls it
_PATIENCE = httpx.Timeout(60, connect=10, read=300, pool=30)  # a registry hashes gigabytes before it answers


class RegistryError(InfrastructureError):
    """Raised when a registry answers something that it should not."""


class RegistryUnavailableError(RegistryError):
    """Raised when a registry can't be reached, or keeps failing; the step was not done."""


class RegistryDeniedError(RegistryError):
    """Raised when a registry refuses these credentials, or their lack."""


class NotInRegistryError(InputError):
    """Raised when a manifest or blob that must be there is not. Never retried."""


class _TryAgainError(Exception):
    """One attempt failed in a way that may pass; `wait_s` is what the registry asked for."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """A user's name and password, or an identity token (an OAuth2 refresh token)."""

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)

    @property
    def basic(self) -> str:
        raw = f"{self.username}:{self.password}".encode()
        return "Basic " + base64.b64encode(raw).decode()


def credentials_for(host: str) -> Credentials | None:
    """What docker's configuration (DOCKER_CONFIG, else ~/.docker) holds for a registry; None for nothing.

    Raises InputError if that file is broken, and CommandError if a credential helper fails.
    """
    folder = os.environ.get("DOCKER_CONFIG")
    path = (Path(folder) if folder else Path.home() / ".docker") / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        msg = f"docker's configuration can't be read: {error}"
        raise InputError(msg, where=str(path), fix="repair that file, or `docker login` again") from error
    names = [host, f"https://{host}", f"http://{host}", f"https://{host}/v1/", f"https://{host}/v2/"]
    if host in (*_HUB_NAMES, "registry-1.docker.io"):
        names.append(_DOCKER_HUB)
    helpers = config.get("credHelpers") or {}
    helper = next((helpers[name] for name in names if name in helpers), config.get("credsStore"))
    if helper:
        found = _ask_helper(str(helper), host)
        if found is not None:
            return found
    auths = config.get("auths") or {}
    for name in names:
        entry = auths.get(name)
        if not entry:
            continue
        if entry.get("identitytoken"):
            return Credentials(identity_token=entry["identitytoken"])
        if entry.get("auth"):
            try:
                user, _, password = base64.b64decode(entry["auth"]).decode().partition(":")
            except ValueError as error:
                msg = f"auths[{name!r}].auth is not base64 of user:password"
                raise InputError(msg, where=str(path), fix=f"`docker login {host}` again") from error
            return Credentials(username=user, password=password.rstrip("\0"))
        if entry.get("username"):
            return Credentials(username=entry["username"], password=entry.get("password", ""))
    return None


def _ask_helper(helper: str, host: str) -> Credentials | None:
    try:
        done = proc.run([f"docker-credential-{helper}", "get"], timeout_s=60, stdin=host, check=False)
    except CommandError as error:
        error.fix = f"install docker-credential-{helper}, or take it out of docker's configuration"
        raise
    if done.returncode != 0:
        if "not found" in (done.output + done.errors):
            return None
        msg = f"docker-credential-{helper} failed for {host}"  # its output may hold a secret
        raise RegistryDeniedError(msg, fix=f"`docker login {host}` again")
    answer = json.loads(done.output)
    if answer.get("Username") == "<token>":
        return Credentials(identity_token=answer.get("Secret", ""))
    return Credentials(username=answer.get("Username", ""), password=answer.get("Secret", ""))


def is_loopback(host: str) -> bool:
    """Whether `host[:port]` is this machine, and so may be spoken to without TLS."""
    name = host.rsplit(":", 1)[0] if not host.startswith("[") else host[1:].split("]")[0]
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class Transport:
    """One registry's HTTP. `send` does one request with its credentials, `retried` an operation.

    Use as a context manager, or `close` it. Not shared between threads.
    """

    def __init__(
        self,
        host: str,
        *,
        credentials: Credentials | None = None,
        attempts: int = 4,
        pause_s: float = 0.25,
        client: httpx.Client | None = None,
    ) -> None:
        self.host = host
        local = is_loopback(host)
        api = "registry-1.docker.io" if host in _HUB_NAMES else host  # Docker Hub's name is not its address
        self.base = httpx.URL(f"{'http' if local else 'https'}://{api}")
        # A proxy of the environment must not see, or break, what stays on this machine.
        self._client = client or httpx.Client(timeout=_PATIENCE, trust_env=not local)
        self._credentials = credentials
        self._asked_docker = credentials is not None
        self._attempts = attempts
        self._pause_s = pause_s
        self._authorization: dict[tuple[str, ...], str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    def retried(self, what: str, operation: Callable[[], T]) -> T:
        """Do an operation that may be begun again; raises RegistryUnavailableError in the end."""
        reason = ""
        wait_s = 0.0
        for attempt in range(self._attempts):
            time.sleep(wait_s)
            wait_s = self._pause_s * 2**attempt * (1 + random.random() / 4)  # noqa: S311 - jitter
            try:
                return operation()
            except _TryAgainError as error:
                reason = str(error)
                if error.wait_s is not None:
                    wait_s = min(error.wait_s, 30.0)
            except httpx.TransportError as error:
                reason = str(error) or type(error).__name__
        msg = f"the registry {self.host} does not answer ({what}: {reason}; tried {self._attempts} times)"
        raise RegistryUnavailableError(
            msg, fix="check that it runs and is reachable, then run the same command again"
        )

    def send(
        self,
        method: str,
        target: str | httpx.URL,
        *,
        scopes: tuple[str, ...],
        accept: Iterable[int],
        headers: Mapping[str, str] | None = None,
        content: bytes | Callable[[], Iterator[bytes]] | None = None,
        stream: bool = False,
    ) -> httpx.Response:
        """One request, signed in if the registry asks for it. An answer not in `accept` is raised.

        `target` is a path under the registry, or the address that it gave for an upload. With `stream`
        the caller closes the response.
        """
        url = self.base.join(target)
        response = self._once(method, url, scopes, headers, content, stream)
        if response.status_code == 401 and self._same_host(url):
            challenge = response.headers.get("WWW-Authenticate", "")
            response.close()
            self._authorization[scopes] = self._sign_in(challenge, scopes)
            response = self._once(method, url, scopes, headers, content, stream)
        if response.status_code in accept:
            return response
        response.read()
        response.close()
        raise self._failure(method, url, response)

    def _once(
        self,
        method: str,
        url: httpx.URL,
        scopes: tuple[str, ...],
        headers: Mapping[str, str] | None,
        content: bytes | Callable[[], Iterator[bytes]] | None,
        stream: bool,
    ) -> httpx.Response:
        sent = dict(headers or {})
        if self._same_host(url) and scopes in self._authorization:
            sent["Authorization"] = self._authorization[scopes]
        body = content() if callable(content) else content
        request = self._client.build_request(method, url, headers=sent, content=body)
        # httpx drops Authorization where a redirect leaves the host; only reads are redirected.
        return self._client.send(request, stream=stream, follow_redirects=method in ("GET", "HEAD"))

    def _same_host(self, url: httpx.URL) -> bool:
        return (url.scheme, url.netloc) == (self.base.scheme, self.base.netloc)

    def _known(self) -> Credentials | None:
        if not self._asked_docker:
            self._credentials, self._asked_docker = credentials_for(self.host), True
        return self._credentials

    def _sign_in(self, challenge: str, scopes: tuple[str, ...]) -> str:
        """The Authorization header that answers a challenge (RFC 7235; distribution's token protocol)."""
        scheme, _, rest = challenge.partition(" ")
        known = self._known()
        if scheme.lower() == "basic":
            if known is None:
                msg = f"the registry {self.host} asks for a user, and docker's configuration has none for it"
                raise RegistryDeniedError(msg, fix=f"`docker login {self.host}`")
            return known.basic
        fields = dict(re.findall(r'(\w+)="([^"]*)"', rest))
        realm = fields.get("realm", "")
        if scheme.lower() != "bearer" or not realm:
            msg = f"the registry {self.host} asks to sign in by {challenge!r}, which mtbuild does not know"
            raise RegistryError(msg, fix="use a registry that takes basic or bearer tokens")
        service = httpx.URL(realm)
        if service.scheme != "https" and not is_loopback(service.netloc.decode()):
            msg = f"the registry {self.host} names a token service without TLS: {realm}"
            raise RegistryDeniedError(
                msg, fix="ask the registry's operator for one with TLS; nothing was sent to it"
            )
        if known is not None and known.identity_token:
            data = {
                "grant_type": "refresh_token",
                "refresh_token": known.identity_token,
                "client_id": "mtbuild",
                "service": fields.get("service", ""),
                "scope": " ".join(scopes),
            }
            answer = self._client.post(service, data=data)
        else:
            params = [("service", fields["service"])] if "service" in fields else []
            params += [("scope", scope) for scope in scopes]
            headers = {"Authorization": known.basic} if known is not None else {}
            answer = self._client.get(service.copy_merge_params(params), headers=headers)
        if answer.status_code != 200:
            raise self._failure(answer.request.method, service, answer)
        token = answer.json().get("token") or answer.json().get("access_token")
        if not token:
            msg = f"the token service {realm} gave no token"
            raise RegistryDeniedError(msg, fix=f"`docker login {self.host}`")
        return f"Bearer {token}"

    def _failure(self, method: str, url: httpx.URL, response: httpx.Response) -> Exception:
        said = _error_text(response)
        what = f"{method} {url.path} on {self.host}"
        if response.status_code == 404:
            msg = f"{what}: not found ({said})"
            return NotInRegistryError(msg, fix="check the repository and the digest")
        if response.status_code in (401, 403):
            self._authorization.clear()
            msg = f"{what}: denied ({said})"
            return RegistryDeniedError(msg, fix=f"`docker login {self.host}` as a user with that right")
        if response.status_code in _TRANSIENT:
            after = response.headers.get("Retry-After", "")
            wait_s = float(after) if re.fullmatch(r"\d{1,4}", after) else None
            return _TryAgainError(f"status {response.status_code}: {said}", wait_s)
        msg = f"{what}: status {response.status_code} ({said})"
        return RegistryError(msg, fix="see the registry's own log for the reason")


def _error_text(response: httpx.Response) -> str:
    """What the registry says of it (`errors[].code, message`), or the start of its answer."""
    try:
        errors = response.json()["errors"]
        return "; ".join(f"{e.get('code', '')}: {e.get('message', '')}".strip(": ") for e in errors)[:300]
    except (ValueError, KeyError, TypeError, AttributeError):
        return response.text[:200].strip() or response.reason_phrase
