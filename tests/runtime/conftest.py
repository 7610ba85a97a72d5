"""What the runtime's tests share: the tiny model loaded once, small media, an S3 server, a faulty proxy."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
from runtime_helpers import FaultyProxy, end, free_port, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from multitalk_runtime.generator import Generator


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete folder of small models."""
    from multitalk_runtime.tiny import write_tiny

    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_generator(tiny_models: Path) -> Generator:
    """The real generator on the small models, as a worker keeps it."""
    import torch

    torch.set_num_threads(1)  # on so small networks, threads that wait for each other cost more than they do
    from multitalk_runtime.generator import Generator
    from multitalk_runtime.model_dirs import ModelDirs

    return Generator.load(ModelDirs.under(tiny_models), device="cpu")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of moto's S3 server, a process of its own on loopback."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: urllib.request.urlopen(f"{address}/moto-api/", timeout=5).status == 200)
        yield address
    finally:
        end(process)


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A plain boto3 client of an empty S3 with the bucket `media`; the worker has its credentials."""
    import boto3

    urllib.request.urlopen(urllib.request.Request(f"{s3_server}/moto-api/reset", method="POST"), timeout=10)
    for name in [n for n in os.environ if n.startswith(("AWS_", "BUCKET_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
    client = boto3.client("s3", endpoint_url=s3_server, region_name="us-east-1")
    client.create_bucket(Bucket="media")
    return client


@pytest.fixture
def proxy(s3_server: str) -> Iterator[FaultyProxy]:
    """A faulty proxy in front of the S3 server."""
    with FaultyProxy(s3_server) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield running
        running.shutdown()


@pytest.fixture
def ffmpeg() -> Callable[..., None]:
    """Run ffmpeg with the arguments."""

    def run(*arguments: str) -> None:
        program = shutil.which("ffmpeg")
        assert program, "install ffmpeg"
        subprocess.run([program, "-v", "error", "-y", "-nostdin", *arguments], check=True, timeout=60)

    return run
