"""Plan of all cells: bytes and seconds, cold and warm, beside `uv pip compile` (and pip) for the same pins.

    python benchmarks/plan.py                 JSON to stdout, progress to stderr
    python benchmarks/plan.py --pip v73       also pip's dry run of one cell (may read a gigabyte)
    python benchmarks/plan.py --out FILE

Every program runs as its own process through one counting proxy on loopback, so that bytes are those on the
wire (TLS included) and are counted in the same way for all. All in one run; the ratios are the result.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtbuild.plan.index import Index
from mtbuild.plan.matrix import load

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mtbuild.plan.cell import Cell

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 600


class CountingProxy:
    """A CONNECT proxy on loopback that counts what comes down. It sees no content, only lengths."""

    def __init__(self) -> None:
        self.received = 0
        self._lock = threading.Lock()
        self._server = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.address = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                piece = client.recv(4096)
                if not piece:
                    return
                head += piece
            method, where, _ = head.split(b"\r\n", 1)[0].decode().split(" ", 2)
            if method != "CONNECT":  # a plain-HTTP index: not counted here, and said so by a refusal
                client.sendall(b"HTTP/1.1 501 Only CONNECT\r\n\r\n")
                return
            host, port = where.rsplit(":", 1)
            with socket.create_connection((host.strip("[]"), int(port)), timeout=30) as upstream:
                client.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
                self._pump(client, upstream)

    def _pump(self, client: socket.socket, upstream: socket.socket) -> None:
        while True:
            ready, _, _ = select.select([client, upstream], [], [], 60)
            if not ready:
                return
            for side in ready:
                data = side.recv(1 << 16)
                if not data:
                    return
                if side is upstream:
                    with self._lock:
                        self.received += len(data)
                    client.sendall(data)
                else:
                    upstream.sendall(data)

    def close(self) -> None:
        self._server.close()


def measure(proxy: CountingProxy, words: list[str], env: dict[str, str], stdin: str = "") -> dict[str, Any]:
    """One process: seconds, bytes, exit status."""
    proxies = dict.fromkeys(("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"), proxy.address)
    before, started = proxy.received, time.perf_counter()
    done = subprocess.run(
        words,
        env={**os.environ, **proxies, **env},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    return {
        "seconds": time.perf_counter() - started,
        "bytes": proxy.received - before,
        "status": done.returncode,
        "output": done.stdout,
        "errors": done.stderr,
    }


def pins(cell: Cell) -> str:
    return "".join(f"{name}=={version}\n" for name, version in cell.pins.items())


def mtbuild(proxy: CountingProxy, cache: Path) -> dict[str, Any]:
    """`mtbuild matrix --plan --json`, as a user runs it."""
    words = [sys.executable, "-c", "from mtbuild.cli import main; main()", "--root", str(ROOT)]
    found = measure(proxy, [*words, "matrix", "--plan", "--json"], {"MTBUILD_CACHE": str(cache)})
    if found["status"] not in {0, 1}:
        msg = f"mtbuild matrix --plan failed:\n{found['errors']}"
        raise SystemExit(msg)
    cells = json.loads(found["output"])["cells"]
    return {
        "seconds": round(found["seconds"], 3),
        "bytes": found["bytes"],
        "verdicts": {cell["name"]: cell["state"] for cell in cells},
    }


def uv(proxy: CountingProxy, cells: tuple[Cell, ...], cache: Path, env: dict[str, str]) -> dict[str, Any]:
    """`uv pip compile` of each cell's pins in turn, one cache; its verdict is whether they resolve."""
    total: dict[str, Any] = {"seconds": 0.0, "bytes": 0, "verdicts": {}}
    for cell in cells:
        words = [
            sys.executable,
            "-m",
            "uv",
            "pip",
            "compile",
            "--no-build",
            "--quiet",
            "--cache-dir",
            str(cache),
        ]
        words += ["--python-version", cell.python, "--python-platform", "x86_64-manylinux_2_28", "-"]
        found = measure(proxy, words, {**env, "UV_PYTHON_DOWNLOADS": "never"}, pins(cell))
        total["seconds"] += found["seconds"]
        total["bytes"] += found["bytes"]
        total["verdicts"][cell.name] = "resolves" if found["status"] == 0 else "refused"
    return total | {"seconds": round(total["seconds"], 3)}


def pip(proxy: CountingProxy, cell: Cell) -> dict[str, Any]:
    """`pip install --dry-run --report` of one cell, without its cache."""
    words = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--quiet",
        "--no-cache-dir",
        "--ignore-installed",
    ]
    words += ["--only-binary", ":all:", "--report", os.devnull, *pins(cell).split()]
    found = measure(proxy, words, {"PIP_DISABLE_PIP_VERSION_CHECK": "1"})
    return {
        "cell": cell.name,
        "seconds": round(found["seconds"], 3),
        "bytes": found["bytes"],
        "status": found["status"],
    }


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="mtbuild-bench-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pip", metavar="CELL", help="also pip's dry run of this cell")
    parser.add_argument("--out", type=Path, help="write the JSON there too")
    options = parser.parse_args()
    matrix = load(ROOT / "matrix.yaml")
    env = Index.from_environment().uv_env()
    proxy = CountingProxy()
    result: dict[str, Any] = {
        "what": "plan of all cells of matrix.yaml; bytes on the wire, seconds of whole processes",
        "command": "python benchmarks/plan.py" + (f" --pip {options.pip}" if options.pip else ""),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "cells": len(matrix.cells),
    }
    with scratch() as folder:
        for tool, run in (
            ("mtbuild", lambda: mtbuild(proxy, folder / "mtbuild")),
            ("uv", lambda: uv(proxy, matrix.cells, folder / "uv", env)),
        ):
            for state in ("cold", "warm"):
                sys.stderr.write(f"{tool}, {state} …\n")
                result.setdefault(tool, {})[state] = run()
        if options.pip:
            sys.stderr.write("pip …\n")
            result["pip"] = pip(proxy, matrix.cell(options.pip))
    proxy.close()
    ours, theirs = result["mtbuild"], result["uv"]
    result["ratios"] = {
        f"{what}, {state}: mtbuild / uv": round(ours[state][what] / theirs[state][what], 3)
        for state in ("cold", "warm")
        for what in ("seconds", "bytes")
        if theirs[state][what]
    }
    result["only mtbuild tells"] = sorted(
        name
        for name, verdict in ours["cold"]["verdicts"].items()
        if verdict != "planned" and theirs["cold"]["verdicts"][name] == "resolves"
    )
    text = json.dumps(result, indent=2)
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
