"""What stands in front of `serve`'s routes: the host's name, the bearer token, and the size of bodies.

Plain ASGI, because it has to act before anything is parsed. A body is read here, up to the limit and within
the time, and handed on whole.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from typing import TYPE_CHECKING, Any

from multitalk_runtime.errors import Fault, RequestFault, TooLargeFault

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping

    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]
    App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

__all__ = ["Guard"]

OPEN = ("/livez", "/readyz")  # for probes, which have no token
_NAMES = ("localhost", "127.0.0.1", "[::1]")
_HEADERS = [
    (b"content-type", b"application/json"),
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
]


class Guard:
    """ASGI middleware. `names_only` refuses hosts that are not this machine's own name: without a token, a
    web page that a user of this machine looks at must not be able to submit jobs by a name of its own."""

    def __init__(
        self, app: App, *, token: str | None, max_body: int, body_s: float, names_only: bool
    ) -> None:
        self._app, self._token, self._max, self._body_s = app, token, max_body, body_s
        self._names_only = names_only

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self._check(scope["path"], headers)
            body = await asyncio.wait_for(self._body(headers, receive), self._body_s)
        except TimeoutError:
            msg = "the body did not come in time"
            await _refuse(RequestFault("request.timeout", msg), send)
            return
        except Fault as fault:
            await _refuse(fault, send)
            return
        sent = False

        async def whole() -> Message:
            nonlocal sent
            if sent:
                return await receive()  # a client that goes away
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, whole, send)

    def _check(self, path: str, headers: dict[bytes, str]) -> None:
        if self._names_only:
            host = headers.get(b"host", "")
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if name.lower() not in _NAMES:
                msg = "without a token, only requests to this machine's own name are answered"
                raise RequestFault("request.host", msg)
        if self._token is not None and path not in OPEN:
            given = headers.get(b"authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {self._token}".encode()):
                msg = "the bearer token is missing or wrong"
                raise RequestFault("request.token", msg)

    async def _body(self, headers: dict[bytes, str], receive: Receive) -> bytes:
        announced = headers.get(b"content-length", "0")
        if announced.isdigit() and int(announced) > self._max:
            raise self._too_large()
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return b""
            size += len(message.get("body", b""))
            if size > self._max:
                raise self._too_large()
            parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                return b"".join(parts)

    def _too_large(self) -> TooLargeFault:
        return TooLargeFault("too_large.body", f"at most {self._max} bytes are taken in one request")


async def _refuse(fault: Fault, send: Send) -> None:
    body = json.dumps({"error": fault.to_json()}).encode()
    headers = [*_HEADERS, (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    if fault.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": fault.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
