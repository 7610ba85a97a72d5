"""The service over plain HTTP: submit a job, ask for its status, fetch its video.

    python -m multitalk_runtime.serve [--host 127.0.0.1] [--port 8000]

    curl -s localhost:8000/v1/jobs -H 'Content-Type: application/json' -d '{"prompt": "A man speaks."}'
    curl -s localhost:8000/v1/jobs/ID                     # status and progress
    curl -s localhost:8000/v1/jobs/ID/result -o video.mp4

One job runs at a time, the others wait on disk and survive a restart. Without `MT_TOKEN` it listens on
loopback only; with it every request but `/livez` and `/readyz` needs `Authorization: Bearer TOKEN`. SIGTERM
lets the running job finish, refuses new ones, and keeps the waiting ones for the next start.
"""

from __future__ import annotations

import argparse
import fcntl
import ipaddress
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from typing import Any

from multitalk_runtime.core import start_worker
from multitalk_runtime.queue_store import QueueStore
from multitalk_runtime.settings import Settings, SettingsError

__all__ = ["main"]

log = logging.getLogger("multitalk_runtime")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return all(ipaddress.ip_address(str(item[4][0]).partition("%")[0]).is_loopback for item in found)


def main(arguments: list[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT. Exit code 1 if the models can't be loaded, 2 for bad settings."""
    parser = argparse.ArgumentParser(
        prog="python -m multitalk_runtime.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (%(default)s)")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        settings = Settings.from_environment()
        if settings.token is None and not is_loopback(given.host):
            msg = f"--host {given.host} is open to others: set MT_TOKEN, or use 127.0.0.1"
            raise SettingsError(msg)
    except SettingsError as error:
        print(f"serve: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return _serve(settings, given.host, given.port)


def _serve(settings: Settings, host: str, port: int) -> int:
    import uvicorn

    from multitalk_runtime.http_api import make_app
    from multitalk_runtime.queue_worker import QueueWorker

    settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = (settings.state_dir / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the process ends, however it does
    except OSError:
        text = f"MT_STATE_DIR {settings.state_dir} is in use by another process: give each one its own"
        print(f"serve: {text}", file=sys.stderr)  # noqa: T201
        return 2
    store = QueueStore(
        settings.state_dir,
        limit=settings.queue,
        ttl_s=settings.result_ttl_s,
        quota_bytes=settings.result_quota_bytes,
    )
    # What a killed process left behind is removed by the next one, so nobody else's folder is used.
    folder = settings.state_dir / "jobs"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    tempfile.tempdir = str(folder)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(settings.state_dir / "inductor"))  # this is kept
    queue = QueueWorker(store, settings=settings, start=lambda: start_worker(settings, folder=folder))

    class Server(uvicorn.Server):
        """uvicorn, but a first SIGTERM only stops new jobs: status and results stay until the job is done."""

        def handle_exit(self, sig: int, frame: Any) -> None:
            if queue.draining:
                super().handle_exit(sig, frame)
                return
            log.info("%s: the running job is finished first", signal.Signals(sig).name)
            threading.Thread(target=self._drain, daemon=True).start()

        def _drain(self) -> None:
            queue.drain(settings.drain_s)
            self.should_exit = True

    config = uvicorn.Config(
        make_app(queue, store, settings=settings, loopback=is_loopback(host)),
        host=host,
        port=port,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=10,
        limit_concurrency=256,
    )
    server = Server(config)
    queue.on_failure = lambda: setattr(server, "should_exit", True)
    queue.begin()
    try:
        server.run()
    finally:
        queue.drain(0)
        store.close()
    return 1 if queue.failure else 0


if __name__ == "__main__":
    sys.exit(main())
