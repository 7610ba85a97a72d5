"""A web server and a small S3 on loopback, for checks in a container that has no network."""

from __future__ import annotations

import hashlib
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY_ID = "suite-key-id"


class Server(ThreadingHTTPServer):
    """`pages`: path → bytes, or ("redirect", URL), or ("short", bytes): fewer bytes than announced.
    `objects`: "bucket/key" → bytes, by signed requests of KEY_ID, or presigned ones."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.pages: dict = {}
        self.objects: dict = {}
        self.metadata: dict = {}
        self.signed = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serving():
    """A server while the block runs."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        """Nothing: the check tells what matters."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path in self.server.pages:
            self._page(self.server.pages[path])
        else:
            self._object(body=True)

    def do_HEAD(self) -> None:
        self._object(body=False)

    def do_PUT(self) -> None:
        data = self._body()
        if not self._known():
            return
        name = self.path.partition("?")[0].lstrip("/")
        self.server.objects[name] = data
        self.server.metadata[name] = {
            k: v for k, v in self.headers.items() if k.lower().startswith("x-amz-meta-")
        }
        self._send(200, b"", {"ETag": _etag(data)})

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Content-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.close_connection = True
        return b""

    def _page(self, page: object) -> None:
        if isinstance(page, bytes):
            self._send(200, page)
        elif page[0] == "redirect":
            self._send(302, b"", {"Location": page[1]})
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(page[1]) + 1000))
            self.end_headers()
            self.wfile.write(page[1])
            self.close_connection = True

    def _known(self) -> bool:
        """Whether the request is signed (version 4) by the key of this suite; else it is refused here."""
        signed = self.headers.get("Authorization", "").startswith(f"AWS4-HMAC-SHA256 Credential={KEY_ID}/")
        presigned = f"X-Amz-Credential={KEY_ID}" in self.path and "X-Amz-Signature=" in self.path
        if signed or presigned:
            self.server.signed += 1
            return True
        self._error(403, "AccessDenied")
        return False

    def _object(self, *, body: bool) -> None:
        if self.headers.get("Authorization") is None and "X-Amz-Signature=" not in self.path:
            self._send(404, b"not found")
            return
        if not self._known():
            return
        name = self.path.partition("?")[0].lstrip("/")
        data = self.server.objects.get(name)
        if data is None:
            self._error(404, "NoSuchKey")
            return
        headers = {"ETag": _etag(data), **self.server.metadata.get(name, {})}
        status, length = 200, len(data)
        wanted = self.headers.get("Range", "")
        if body and wanted.startswith("bytes="):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{length - 1}/{length}"
            status, data = 206, data[start:]
        self._send(status, data, headers)

    def _error(self, status: int, code: str) -> None:
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>"
        self._send(status, text.encode(), {"Content-Type": "application/xml"})

    def _send(self, status: int, data: bytes, headers: dict | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'
