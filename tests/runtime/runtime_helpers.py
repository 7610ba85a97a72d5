"""Small media, processes and a faulty proxy for the runtime's tests."""

from __future__ import annotations

import base64
import io
import re
import socket
import socketserver
import struct
import subprocess
import threading
import time
import wave
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

QUICK = {"frame_num": 5, "motion_frame": 1, "sample_steps": 1}
"""Keys of the shortest job there is."""


def wav_bytes(seconds: float = 0.5, *, rate: int = 16_000, frequency: float = 220.0) -> bytes:
    """A tone with a beat: 16-bit mono."""
    import numpy as np

    times = np.arange(int(seconds * rate)) / rate
    tone = 0.4 * np.sin(2 * np.pi * frequency * times) * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * times))
    target = io.BytesIO()
    with wave.open(target, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((tone * 32767).astype("<i2").tobytes())
    return target.getvalue()


def image_bytes(width: int = 80, height: int = 80, kind: str = "PNG", **options: Any) -> bytes:
    """A gradient."""
    from PIL import Image

    target = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(target, kind, **options)
    return target.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels: what a decompression bomb looks like from outside."""
    import zlib

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100))


def as_base64(data: bytes) -> dict[str, str]:
    """A source of a job."""
    return {"base64": base64.b64encode(data).decode()}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def wait_until(true: Callable[[], Any], *, seconds: float = 60.0, every: float = 0.05) -> Any:
    """What `true` returns once it is something; AssertionError after the time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if answer := true():
                return answer
        except OSError:
            pass
        time.sleep(every)
    msg = f"not within {seconds} s"
    raise AssertionError(msg)


def end(process: subprocess.Popen[Any]) -> None:
    """End a process that a test started."""
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(10)


class FaultyProxy(socketserver.ThreadingTCPServer):
    """Stands between a client and a server and spoils requests (not HEAD) as `plan` says, one after another.

    "reset" closes at once, "stall" says nothing, a number cuts the answer's body after so many bytes, "flip"
    changes one byte of it, "mangle" one of what goes up, "503" answers so. "" is well, as is all afterwards.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, upstream: str) -> None:
        host, port = upstream.removeprefix("http://").split(":")
        self.upstream = (host, int(port))
        self.plan: list[str | int] = []
        self.requests: list[str] = []
        self.ranges: list[int] = []  # where each GET of a range began
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Forward)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Forward(socketserver.BaseRequestHandler):
    server: FaultyProxy

    def handle(self) -> None:
        """One request a connection, so that the plan counts requests."""
        request = self._request()
        if not request:
            return
        line = request.split(b"\r\n", 1)[0].decode()
        with self.server.lock:
            self.server.requests.append(line)
            if line.startswith("GET") and (begin := re.search(rb"(?i)\r\nrange: bytes=(\d+)-", request)):
                self.server.ranges.append(int(begin[1]))
            only_get = line.startswith(("GET", "PUT", "POST"))
            fault = self.server.plan.pop(0) if self.server.plan and only_get else None
        if fault == "reset":
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return
        if fault == "stall":
            time.sleep(3)
            return
        if fault == "503":
            self.request.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return
        if fault == "mangle":  # what goes up is changed on the way
            head, _, body = request.partition(b"\r\n\r\n")
            request = head + b"\r\n\r\n" + bytes([body[0] ^ 1]) + body[1:]
        self._forward(request, fault)

    def _request(self) -> bytes:
        data = b""
        while b"\r\n\r\n" not in data:
            if not (more := self.request.recv(65536)):
                return b""
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        headers = {
            line.partition(b":")[0].strip().lower(): line.partition(b":")[2].strip()
            for line in head.split(b"\r\n")[1:]
        }
        if headers.get(b"expect", b"").lower() == b"100-continue":
            self.request.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            head = b"\r\n".join(
                line for line in head.split(b"\r\n") if not line.lower().startswith(b"expect:")
            )
        length = int(headers.get(b"content-length", b"0"))
        while len(body) < length:
            if not (more := self.request.recv(1 << 20)):
                return b""
            body += more
        lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
        return b"\r\n".join([*lines, b"Connection: close"]) + b"\r\n\r\n" + body

    def _forward(self, request: bytes, fault: str | int | None) -> None:
        with socket.create_connection(self.server.upstream, timeout=30) as upstream:
            upstream.sendall(request)
            answer = b""
            while more := upstream.recv(1 << 20):
                answer += more
        head, _, body = answer.partition(b"\r\n\r\n")
        if fault == "flip" and body:
            body = body[:-1] + bytes([body[-1] ^ 1])
        if isinstance(fault, int):
            body = body[:fault]
        lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
        self.request.sendall(b"\r\n".join([*lines, b"Connection: close"]) + b"\r\n\r\n" + body)
