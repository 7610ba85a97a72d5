"""RunPod's worker: through the SDK's local API server, and through the SDK's own loop against a stand-in for
RunPod's queue; what it does with errors of the GPU, progress, cancellation and the start-up check."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.server
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from runtime_helpers import QUICK, as_base64, end, free_port, image_bytes, wait_until, wav_bytes

from multitalk_runtime import settings as settings_module
from multitalk_runtime.clock import Progress
from multitalk_runtime.core import Throttle, Worker, health_check
from multitalk_runtime.errors import CudaFault
from multitalk_runtime.handler import fitness_check, make_handler
from multitalk_runtime.job import parse_job
from multitalk_runtime.settings import Settings
from multitalk_runtime.storage import Storage

if TYPE_CHECKING:
    from collections.abc import Iterator

HANDLER = [sys.executable, "-u", "-m", "multitalk_runtime.handler"]
GOOD = {**QUICK, "image": as_base64(image_bytes()), "audio": {"person1": as_base64(wav_bytes())}}
LONG = {**GOOD, "frame_num": 81, "sample_steps": 100}


def environment(models: Path, temporary: Path, **more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "BUCKET_", "MT_", "RUNPOD_"))}
    temporary.mkdir(exist_ok=True)
    return {
        **kept,
        "MODEL_PATH": str(models),
        "MT_DEVICE": "cpu",
        "TMPDIR": str(temporary),
        "OMP_NUM_THREADS": "1",
        "RUNPOD_SKIP_GPU_CHECK": "true",
        "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
        **more,
    }


def post(url: str, body: Any) -> dict[str, Any]:
    request = urllib.request.Request(
        url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())  # type: ignore[no-any-return]


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith("mt-")]


@pytest.fixture(scope="module")
def api(
    tiny_models: Path, s3_server: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path]]:
    """The SDK's local API server around the real handler, with the tiny model and S3."""
    port, folder = free_port(), tmp_path_factory.mktemp("api")
    env = environment(
        tiny_models,
        folder / "tmp",
        AWS_ACCESS_KEY_ID="test-key",
        AWS_SECRET_ACCESS_KEY="test-secret",
        AWS_REGION="us-east-1",
        AWS_S3_BUCKET_NAME="media",
        BUCKET_ENDPOINT_URL=s3_server,
    )
    serve = ["--rp_serve_api", "--rp_api_host", "127.0.0.1", "--rp_api_port", str(port)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*HANDLER, *serve], env=env, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: urllib.request.urlopen(url, timeout=5).status == 200, seconds=120)
        yield url, folder
    finally:
        end(process)


def test_jobs_through_the_local_api(api: tuple[str, Path], s3: Any) -> None:
    url, folder = api
    health = post(f"{url}/runsync", {"input": {"test": "health_check"}})["output"]
    assert health["health"]["healthy"], health
    assert health["deprecations"][0]["key"] == "test"

    first = post(f"{url}/runsync", {"input": GOOD})
    assert first["status"] == "COMPLETED", first
    video = base64.b64decode(first["output"]["video_base64"])
    assert video[4:8] == b"ftyp"

    bad = post(f"{url}/runsync", {"input": {**GOOD, "image": "file:///etc/passwd"}})
    assert bad["status"] == "FAILED"
    assert json.loads(bad["error"])["code"] == "forbidden.scheme"

    second = post(f"{url}/runsync", {"input": GOOD})["output"]
    assert second["result"]["sha256"] == first["output"]["result"]["sha256"]
    assert second["result"]["phases"]  # the models were not loaded again: the process is the same
    assert leftovers(folder / "tmp") == []
    assert (folder / "log").read_text().count("models loaded") == 1


def test_a_job_of_the_old_images_from_s3_to_s3(api: tuple[str, Path], s3: Any) -> None:
    url, folder = api
    s3.put_object(Bucket="media", Key="in/voice.wav", Body=wav_bytes())
    s3.put_object(Bucket="media", Key="in/face.png", Body=image_bytes())
    old = {
        "audio_s3_key": "in/voice.wav",
        "image_s3_key": "in/face.png",
        "prompt": "A woman speaks.",
        "output_format": "s3",
        "sampling_steps": 1,
        "frame_num": 5,
        "motion_frame": 1,
    }
    reply = post(f"{url}/runsync", {"input": old})
    assert reply["status"] == "COMPLETED", reply
    output = reply["output"]
    assert {note["key"] for note in output["deprecations"]} == {
        "audio_s3_key", "image_s3_key", "output_format", "sampling_steps",
    }  # fmt: skip
    with urllib.request.urlopen(output["video_url"], timeout=10) as answer:
        assert answer.read()[4:8] == b"ftyp"
    assert "video_base64" not in output
    log = (folder / "log").read_text()
    assert "test-secret" not in log
    assert "X-Amz-Signature" not in log, "a presigned URL is a secret while it lives"


class Queue(http.server.BaseHTTPRequestHandler):
    """RunPod's side of a worker: jobs to take, jobs to stop, results and progress."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        state = self.server.state  # type: ignore[attr-defined]
        waiting = state["stop"] if self.path.startswith("/job-stop") else state["jobs"]
        for _ in range(10):
            if waiting:
                break
            time.sleep(0.05)
        if not waiting:
            self._answer(204, b"")
        elif self.path.startswith("/job-stop"):
            self._answer(200, json.dumps({"jobsToStop": [waiting.pop(0)]}).encode())
        else:
            self._answer(200, json.dumps(waiting.pop(0)).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        job = self.path.split("?")[0].rsplit("/", 1)[-1]
        self.server.state["posted"].append((time.monotonic(), job, body))  # type: ignore[attr-defined]
        self._answer(200, b"{}")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def queue(models: Path, temporary: Path, *jobs: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Any]]:
    """RunPod's side on loopback: the environment of a worker that asks it for `jobs`, and its state."""
    state: dict[str, list[Any]] = {"jobs": list(jobs), "stop": [], "posted": []}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Queue) as server:
        server.state = state  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        env = environment(
            models,
            temporary,
            RUNPOD_WEBHOOK_GET_JOB=f"{base}/job-take/endpoint/$ID?gpu=none",
            RUNPOD_WEBHOOK_POST_OUTPUT=f"{base}/job-done/endpoint/$ID?gpu=none",
            RUNPOD_POD_ID="pod",
        )
        try:
            yield env, state
        finally:
            server.shutdown()


def test_the_worker_loop_with_progress_and_a_cancelled_job(tiny_models: Path, tmp_path: Path) -> None:
    with queue(tiny_models, tmp_path / "tmp") as (env, state):
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(HANDLER, env=env, stdout=log, stderr=log)

        def posted(job: str, *, progress: bool) -> list[tuple[float, dict[str, Any]]]:
            return [
                (when, body)
                for when, of, body in list(state["posted"])
                if of == job and (body.get("status") == "IN_PROGRESS") == progress
            ]

        try:
            state["jobs"].append({"id": "long", "input": LONG})
            wait_until(
                lambda: any(b["output"].get("step", 0) > 0 for _, b in posted("long", progress=True)),
                seconds=180,
            )
            state["stop"].append("long")
            state["jobs"].append({"id": "next", "input": GOOD})
            state["jobs"].append({"id": "theirs", "input": GOOD, "s3Config": {"endpointUrl": "http://x"}})
            (done,) = wait_until(lambda: posted("next", progress=False), seconds=120)
            (refused,) = wait_until(lambda: posted("theirs", progress=False), seconds=60)
        finally:
            end(process)
    assert done[1]["output"]["status"] == "completed", done
    assert json.loads(refused[1]["error"])["code"] == "forbidden.endpoint"
    assert not posted("long", progress=False), "a cancelled job has no result"
    times = [when for when, _ in posted("long", progress=True)]
    assert all(later - sooner > 0.7 for sooner, later in itertools.pairwise(times)), times
    report = posted("long", progress=True)[-1][1]["output"]
    assert {"stage", "step", "total", "elapsed_s", "seconds_left"} <= set(report)
    assert leftovers(tmp_path / "tmp") == []
    log_text = (tmp_path / "log").read_text()
    assert log_text.index("models loaded") < log_text.index("All fitness checks passed")


# What needs a failing GPU is shown with a generator that fails as torch does.


class Failing:
    """A generator whose runs end with an error."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def run(self, *_: Any, **__: Any) -> Any:
        raise self.error


class Endless:
    """A generator that works until it is cancelled."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.ended = threading.Event()

    def run(self, _: Any, *, progress: Any = None, cancelled: Any = None) -> Any:
        from multitalk_runtime.errors import CancelledFault

        self.began.set()
        while not cancelled():
            if progress:
                progress(Progress(stage="denoise", step=1, total=2))
            time.sleep(0.01)
        self.ended.set()
        code = "cancelled.by_caller"
        raise CancelledFault(code, "stopped")


def worker(generator: Any, tmp_path: Path, **settings: Any) -> Worker:
    chosen = Settings(**settings)
    return Worker(settings=chosen, generator=generator, storage=Storage(chosen), folder=tmp_path)


def handled(generator: Any, tmp_path: Path, **settings: Any) -> dict[str, Any]:
    handler = make_handler(worker(generator, tmp_path, **settings))
    return asyncio.run(handler({"id": "j", "input": GOOD}))  # type: ignore[arg-type]


def test_only_errors_of_the_gpu_refresh_the_worker(tmp_path: Path) -> None:
    import torch

    for error, code in (
        (CudaFault("cuda.error", "the GPU reported an error"), "cuda.error"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "cuda.error"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "cuda.out_of_memory"),
    ):
        reply = handled(Failing(error), tmp_path)
        assert json.loads(reply["error"])["code"] == code
        assert reply["refresh_worker"] is True
    for other in (RuntimeError("shapes"), ValueError("bad"), KeyError("x"), MemoryError()):
        reply = handled(Failing(other), tmp_path)
        assert json.loads(reply["error"])["code"] == "internal"
        assert "refresh_worker" not in reply
    assert list(tmp_path.iterdir()) == []


def test_a_cancelled_handler_ends_its_work_first(tmp_path: Path) -> None:
    generator = Endless()

    async def run() -> None:
        task = asyncio.ensure_future(make_handler(worker(generator, tmp_path))({"id": "j", "input": GOOD}))
        while not generator.began.is_set():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert generator.ended.is_set(), "the next job would have met this one"

    asyncio.run(run())
    assert list(tmp_path.iterdir()) == []


def test_a_job_ends_at_its_time_limit(tmp_path: Path) -> None:
    reply = handled(Endless(), tmp_path, job_s=0.8)
    assert json.loads(reply["error"])["code"] == "cancelled.timeout"
    assert reply["status"] == "cancelled"


def test_reports_at_most_once_a_second_and_never_fatal() -> None:
    clock = [0.0]
    seen: list[Any] = []

    def send(report: dict[str, object]) -> None:
        seen.append((clock[0], report))
        msg = "the network is away"
        raise OSError(msg)

    throttle = Throttle(send, now=lambda: clock[0])
    for number in range(50):
        clock[0] = number / 10
        throttle({"step": number})
    assert [when for when, _ in seen] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_the_start_up_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    well = worker(Endless(), tmp_path)
    assert health_check(well)["healthy"]
    fitness_check(well)()
    monkeypatch.setenv("PATH", str(tmp_path))  # without ffmpeg
    with pytest.raises(RuntimeError, match="programs"):
        fitness_check(well)()
    assert not health_check(replace(well, generator=None))["checks"]["models"]["ok"]  # type: ignore[arg-type]


def test_an_unfit_worker_takes_no_job(tmp_path: Path) -> None:
    """The check is the SDK's to run: it ends the process before the first job is asked for."""
    code = (
        "import sys\n"
        "from multitalk_runtime import handler\n"
        "from multitalk_runtime.core import Worker\n"
        "from multitalk_runtime.storage import Storage\n"
        "handler.start_worker = lambda s: Worker(settings=s, generator=None, storage=Storage(s))\n"
        "sys.argv = ['handler']\n"
        "handler.main()\n"
    )
    with queue(tmp_path, tmp_path / "tmp", {"id": "j", "input": GOOD}) as (env, state):
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "not fit for work: models" in done.stdout + done.stderr
    assert len(state["jobs"]) == 1


@pytest.mark.parametrize(
    ("variables", "code", "text"),
    [
        ({"MT_MAX_PIXELS": "many"}, 2, "MT_MAX_PIXELS"),
        ({"MODEL_PATH": "/nonexistent"}, 1, "model.missing"),
    ],
)
def test_a_worker_that_can_not_work_says_why_and_ends(
    tmp_path: Path, variables: dict[str, str], code: int, text: str
) -> None:
    env = environment(tmp_path, tmp_path / "tmp", **variables)
    done = subprocess.run(HANDLER, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code
    assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_help_loads_nothing(tmp_path: Path) -> None:
    env = environment(tmp_path, tmp_path / "tmp")
    done = subprocess.run(
        [*HANDLER, "--help"], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0
    assert "--rp_serve_api" in done.stdout


def test_the_files_for_the_hub_say_what_this_worker_understands() -> None:
    folder = Path(__file__).parents[2] / ".runpod"
    known = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", settings_module.__doc__ or ""))
    hub, tests = (json.loads((folder / name).read_text()) for name in ("hub.json", "tests.json"))
    assert hub["type"] == "serverless"
    assert {entry["key"] for entry in [*hub["config"]["env"], *tests["config"]["env"]]} <= known
    for test in tests["tests"]:
        assert test["timeout"] > 0
        if "test" not in test["input"]:
            assert parse_job(test["input"])[1] == (), "a deprecated key"
