"""A real package index on loopback, with switches for what it lacks, and small wheels to serve."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import threading
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator


@dataclass
class LocalIndex:
    """What is served and how. `seen` are (path, headers) of every request."""

    files: dict[str, bytes] = field(default_factory=dict)
    metadata: bool = True
    ranges: str = "all"  # all | no-suffix | none
    html: bool = False
    hashes: bool = True
    failures: int = 0  # so many requests are answered with 503 first
    account: str = ""  # "user:password" that every request must carry
    files_at: str = ""  # files are redirected to this server
    wrong_metadata: bool = False
    etag: str = ""
    seen: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    url: str = ""

    def paths(self, end: str) -> list[str]:
        return [path for path, _ in self.seen if path.endswith(end)]


def wheel(
    name: str, version: str, members: dict[str, bytes | str], *, requires: list[str], tag: str
) -> tuple[str, bytes]:
    """(file name, bytes) of a small but real wheel."""
    folder = f"{name}-{version}.dist-info"
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for path, content in members.items():
            file.writestr(path, content)
        file.writestr(f"{folder}/METADATA", "\n".join(lines) + "\n")
        file.writestr(f"{folder}/WHEEL", f"Wheel-Version: 1.0\nTag: {tag}\n")
        file.writestr(f"{folder}/RECORD", "")
    return f"{name}-{version}-{tag}.whl", buffer.getvalue()


def metadata_of(content: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        return file.read(next(name for name in file.namelist() if name.endswith("METADATA")))


@contextmanager
def serve(index: LocalIndex, tls: ssl.SSLContext | None = None) -> Iterator[LocalIndex]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            index.seen.append((path, {key.lower(): value for key, value in self.headers.items()}))
            if index.failures > 0:
                index.failures -= 1
                return self.answer(503, b"try later")
            if index.account:
                wanted = "Basic " + base64.b64encode(index.account.encode()).decode()
                if self.headers.get("Authorization") != wanted:
                    return self.answer(401, b"who are you?")
            if path.startswith("/simple/"):
                return self.page(path.split("/")[2])
            return self.file(path.rpartition("/")[2])

        do_HEAD = do_GET  # noqa: N815 - http.server looks for this name

        def page(self, project: str) -> None:
            own = {
                name: data
                for name, data in index.files.items()
                if name.split("-")[0].replace("_", "-") == project
            }
            if not own:
                return self.answer(404, b"no such project")
            if index.etag and self.headers.get("If-None-Match") == index.etag:
                return self.answer(304, b"")
            if index.html:
                links = "".join(
                    f'<a href="../../files/{n}#sha256={hashlib.sha256(d).hexdigest()}">{n}</a>'
                    for n, d in own.items()
                )
                return self.answer(200, f"<html><body>{links}</body></html>".encode(), kind="text/html")
            files = [
                {
                    "filename": name,
                    "url": f"../../files/{name}",
                    "hashes": {"sha256": hashlib.sha256(data).hexdigest()} if index.hashes else {},
                    "size": len(data),
                    "core-metadata": {"sha256": "0" * 64} if index.wrong_metadata else False,
                }
                for name, data in own.items()
            ]
            body = {"meta": {"api-version": "1.1"}, "name": project, "files": files, "versions": []}
            return self.answer(200, json.dumps(body).encode(), kind="application/vnd.pypi.simple.v1+json")

        def file(self, name: str) -> None:
            if index.files_at:
                return self.answer(302, b"", location=f"{index.files_at}/files/{name}")
            if name.endswith(".metadata"):
                content = index.files.get(name.removesuffix(".metadata"))
                if content is None or not index.metadata:
                    return self.answer(404, b"<html>nothing here</html>")
                return self.answer(200, metadata_of(content))
            content = index.files.get(name)
            if content is None:
                return self.answer(404, b"")
            wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
            suffix = wanted is not None and not wanted.group(1)
            if wanted is None or index.ranges == "none" or (suffix and index.ranges == "no-suffix"):
                return self.answer(200, content)
            size = len(content)
            if suffix:
                first, last = max(0, size - int(wanted.group(2))), size - 1
            else:
                first, last = int(wanted.group(1)), min(int(wanted.group(2) or size), size - 1)
            return self.answer(206, content[first : last + 1], content_range=f"bytes {first}-{last}/{size}")

        def answer(
            self, status: int, body: bytes, kind: str = "application/octet-stream", **headers: str
        ) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            if status != 304:
                self.send_header("Content-Length", str(len(body)))
            if index.etag and status == 200:
                self.send_header("ETag", index.etag)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command == "HEAD":
                return
            with suppress(BrokenPipeError, ConnectionResetError):  # the client wanted no more
                self.wfile.write(body)

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    index.url = f"{'https' if tls else 'http'}://127.0.0.1:{server.server_port}"
    try:
        yield index
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
