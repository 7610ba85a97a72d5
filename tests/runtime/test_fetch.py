"""Downloads: what is fetched, and every way in which a stranger's URL is turned away."""

from __future__ import annotations

import contextlib
import http.server
import ipaddress
import shutil
import socket
import ssl
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from multitalk_runtime.errors import Fault
from multitalk_runtime.fetch import fetch_url
from multitalk_runtime.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))
OPEN = Settings(allow_addresses=LOOPBACK, fetch_s=5)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by path."""

    seen: list[tuple[str, dict[str, str]]]

    def do_GET(self) -> None:
        self.server.seen.append((self.path, dict(self.headers)))  # type: ignore[attr-defined]
        kind, _, rest = self.path.lstrip("/").partition("/")
        if kind == "ok":
            self._answer(200, b"x" * int(rest or 10))
        elif kind == "status":
            self._answer(int(rest), b"no")
        elif kind == "to":
            self.send_response(302)
            self.send_header("Location", rest.replace("|", "/"))
            self.end_headers()
        elif kind == "loop":
            self.send_response(302)
            self.send_header("Location", f"/loop/{int(rest or 0) + 1}")
            self.end_headers()
        elif kind == "short":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"y" * 10)
        elif kind == "endless":
            self.send_response(200)
            self.end_headers()
            for _ in range(1000):
                self.wfile.write(b"z" * 1000)
        elif kind == "slow":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            for _ in range(40):
                self.wfile.write(b"s")
                self.wfile.flush()
                time.sleep(0.1)

        elif kind == "drip":
            with contextlib.suppress(OSError):
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Drip: ")
                for _ in range(300):
                    self.wfile.write(b"d")
                    self.wfile.flush()
                    time.sleep(0.1)

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[http.server.ThreadingHTTPServer]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.seen = []  # type: ignore[attr-defined]
        running.url = f"http://127.0.0.1:{running.server_port}"  # type: ignore[attr-defined]
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()


def refused(url: str, target: Path, settings: Settings = OPEN, max_bytes: int = 1000) -> str:
    with pytest.raises(Fault) as raised:
        fetch_url(url, target, max_bytes=max_bytes, settings=settings, field="image")
    assert raised.value.field == "image"
    assert raised.value.hint
    assert not target.exists(), "a failed download left a file"
    return raised.value.code


def test_a_file_is_fetched_also_behind_redirects(server: Any, tmp_path: Path) -> None:
    assert (
        fetch_url(f"{server.url}/ok/999", tmp_path / "a", max_bytes=1000, settings=OPEN, field="image") == 999
    )
    moved = f"{server.url}/to/|to||ok|5"
    assert fetch_url(moved, tmp_path / "b", max_bytes=1000, settings=OPEN, field="image") == 5
    assert (tmp_path / "b").read_bytes() == b"x" * 5


def test_nothing_of_the_worker_is_sent(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    fetch_url(f"{server.url}/ok", tmp_path / "a", max_bytes=1000, settings=OPEN, field="image")
    ((_, headers),) = server.seen
    assert set(headers) == {"Host", "User-Agent", "Accept", "Accept-Encoding"}


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/ok/1001", "too_large.bytes"),
        ("/endless", "too_large.bytes"),
        ("/status/404", "fetch.status"),
        ("/status/500", "fetch.status"),
        ("/loop", "fetch.redirects"),
        ("/short", "fetch.truncated"),
        ("/to/ftp:||127.0.0.1|x", "forbidden.scheme"),
        ("/to/file:|||etc|passwd", "forbidden.scheme"),
        ("/to/http:||169.254.169.254|latest", "forbidden.address"),
        ("/to/http:||10.0.0.1|", "forbidden.address"),
    ],
)
def test_what_a_server_may_not_do(server: Any, tmp_path: Path, path: str, code: str) -> None:
    assert refused(server.url + path, tmp_path / "a") == code


def test_a_slow_server_is_given_up_at_the_limit(server: Any, tmp_path: Path) -> None:
    limit = Settings(allow_addresses=LOOPBACK, fetch_s=1)
    for path in ("slow", "drip"):  # the content byte by byte, or the headers
        begin = time.monotonic()
        assert refused(f"{server.url}/{path}", tmp_path / "a", limit) == "fetch.timeout"
        assert time.monotonic() - begin < 25  # the drip goes on for 30 s


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("http://127.0.0.1/", "forbidden.address"),
        ("http://localhost/", "forbidden.address"),
        ("http://[::1]/", "forbidden.address"),
        ("http://0.0.0.0/", "forbidden.address"),
        ("http://10.1.2.3/", "forbidden.address"),
        ("http://192.168.0.1/", "forbidden.address"),
        ("http://172.16.0.1/", "forbidden.address"),
        ("http://169.254.169.254/latest/meta-data", "forbidden.address"),
        ("http://100.64.0.1/", "forbidden.address"),
        ("http://224.0.0.1/", "forbidden.address"),
        ("http://[::ffff:127.0.0.1]/", "forbidden.address"),
        ("http://[::ffff:169.254.169.254]/", "forbidden.address"),
        ("http://[2002:7f00:1::]/", "forbidden.address"),
        ("http://[fe80::1]/", "forbidden.address"),
        ("http://[fd00::1]/", "forbidden.address"),
        ("http://2130706433/", "forbidden.address"),
        ("http://0x7f.1/", "forbidden.address"),
        ("http://user:secret@127.0.0.1/", "forbidden.option"),
        ("ftp://127.0.0.1/", "forbidden.scheme"),
        ("file:///etc/passwd", "forbidden.scheme"),
        ("gopher://127.0.0.1/", "forbidden.scheme"),
        ("http:///nowhere", "fetch.unreachable"),
        ("http://127.0.0.1:99999/", "fetch.unreachable"),
        ("http://[broken/", "fetch.unreachable"),
        ("http://127.0.0.1/a b", "fetch.unreachable"),
    ],
)
def test_without_the_operators_leave_nothing_inside_is_reached(tmp_path: Path, url: str, code: str) -> None:
    assert refused(url, tmp_path / "a", Settings(fetch_s=5)) == code


def test_a_closed_port_is_unreachable(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert refused(f"http://127.0.0.1:{port}/", tmp_path / "a") == "fetch.unreachable"


def test_a_name_that_leads_inside_is_refused_even_beside_a_public_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def both(*_: object, **__: object) -> list[Any]:
        return [(2, 1, 6, "", (address, 80)) for address in ("93.184.216.34", "127.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    assert refused("http://rebind.example/", tmp_path / "a", Settings(fetch_s=2)) == "forbidden.address"


def test_the_address_that_was_checked_is_the_one_that_is_connected_to(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that is public when it is looked up and private a moment later gains nothing by it."""
    looked_up: list[str] = []
    connected: list[tuple[str, int]] = []
    real = socket.create_connection

    def rebinding(host: str, *_: object, **__: object) -> list[Any]:
        looked_up.append(host)
        answer = "93.184.216.34" if len(looked_up) == 1 else "127.0.0.1"
        return [(2, 1, 6, "", (answer, 80))]

    def connect(address: tuple[str, int], *arguments: Any, **options: Any) -> socket.socket:
        connected.append(address)
        monkeypatch.undo()  # the test's own connection looks its address up too
        return real(("127.0.0.1", server.server_port), *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    monkeypatch.setattr(socket, "create_connection", connect)
    fetch_url("http://rebind.example/ok/7", tmp_path / "a", max_bytes=10, settings=Settings(), field="image")
    assert looked_up == ["rebind.example"]
    assert connected == [("93.184.216.34", 80)]
    ((_, headers),) = server.seen
    assert headers["Host"] == "rebind.example"


def test_the_next_address_of_a_host_is_tried(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.getaddrinfo

    def two(host: str, port: int, *arguments: Any, **options: Any) -> list[Any]:
        if host != "two.example":
            return real(host, port, *arguments, **options)
        return [(2, 1, 6, "", (address, port)) for address in ("127.0.0.2", "127.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", two)
    url = f"http://two.example:{server.server_port}/ok/7"
    assert fetch_url(url, tmp_path / "a", max_bytes=10, settings=OPEN, field="image") == 7


def test_each_address_gets_what_is_left_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []

    def three(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        return [(2, 1, 6, "", (f"127.0.0.{n}", port)) for n in (1, 2, 3)]

    def nobody(address: Any, timeout: float, **_: Any) -> None:
        waits.append(timeout)
        time.sleep(0.5)
        raise TimeoutError

    monkeypatch.setattr(socket, "getaddrinfo", three)
    monkeypatch.setattr(socket, "create_connection", nobody)
    limit = Settings(allow_addresses=LOOPBACK, fetch_s=0.9)
    assert refused("http://three.example/", tmp_path / "a", limit) == "fetch.timeout"
    assert len(waits) == 2  # no time is left for the third
    assert waits[1] <= waits[0] - 0.5


def test_a_certificate_that_nobody_vouches_for_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    openssl = shutil.which("openssl")
    assert openssl, "install openssl"
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    new = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    new += ["-keyout", str(key), "-out", str(certificate), "-days", "1", *subject]
    subprocess.run(new, check=True, capture_output=True, timeout=30)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.seen = []  # type: ignore[attr-defined]
        running.socket = context.wrap_socket(running.socket, server_side=True)
        threading.Thread(target=running.serve_forever, daemon=True).start()
        url = f"https://127.0.0.1:{running.server_port}/ok/7"
        assert refused(url, tmp_path / "a") == "fetch.unreachable"
        assert running.seen == []  # type: ignore[attr-defined]
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))  # now somebody does
        assert fetch_url(url, tmp_path / "a", max_bytes=10, settings=OPEN, field="image") == 7
        running.shutdown()
