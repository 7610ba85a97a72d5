"""The service over HTTP: its rules with a quick generator, kill, restart and SIGTERM with the real one."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fastapi.testclient import TestClient
from runtime_helpers import QUICK, as_base64, end, free_port, image_bytes, wait_until, wav_bytes

from multitalk_runtime.clock import Progress
from multitalk_runtime.core import Worker
from multitalk_runtime.errors import CancelledFault, CudaFault
from multitalk_runtime.generator import Result
from multitalk_runtime.http_api import make_app
from multitalk_runtime.queue_store import QueueStore
from multitalk_runtime.queue_worker import QueueWorker
from multitalk_runtime.serve import is_loopback, main
from multitalk_runtime.settings import Settings
from multitalk_runtime.storage import Storage

if TYPE_CHECKING:
    from collections.abc import Iterator

GOOD = {**QUICK, "image": as_base64(image_bytes()), "audio": {"person1": as_base64(wav_bytes())}}
LONG = {**GOOD, "frame_num": 81, "sample_steps": 100}


class Quick:
    """A generator that makes a small file; while `gate` is closed it works on, and can be cancelled."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.runs = 0
        self.size = 1000
        self.error: Exception | None = None

    def run(self, request: Any, *, progress: Any = None, cancelled: Any = None) -> Result:
        self.runs += 1
        progress(Progress(stage="denoise", step=1, total=2))
        while not self.gate.wait(0.01):
            if cancelled():
                code = "cancelled.by_caller"
                raise CancelledFault(code, "stopped")
        if self.error:
            raise self.error
        request.output.write_bytes(b"v" * self.size)
        return Result(
            video=request.output, frames=5, height=8, width=8, seed=1, steps=1, clips=1, seconds=0.1,
            first_frame_s=0.1, phases={}, peak_bytes=1, device="cpu", attention="sdpa", sha256="0",
        )  # fmt: skip


class Service:
    """The app with its queue, in this process."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.settings = Settings(state_dir=folder, **settings)
        self.generator = Quick()
        self.now = 1_000_000.0
        self.store = QueueStore(
            folder,
            limit=self.settings.queue,
            ttl_s=self.settings.result_ttl_s,
            quota_bytes=self.settings.result_quota_bytes,
            now=lambda: self.now,
        )
        (folder / "jobs").mkdir(exist_ok=True)
        worker = Worker(
            settings=self.settings,
            generator=self.generator,
            storage=Storage(self.settings),
            folder=folder / "jobs",
        )
        self.queue = QueueWorker(self.store, settings=self.settings, start=lambda: worker)
        self.app = make_app(self.queue, self.store, settings=self.settings, loopback=True)
        self.http = TestClient(self.app, base_url="http://localhost", raise_server_exceptions=False)
        self.queue.begin()
        wait_until(lambda: self.queue.worker is not None)

    def submit(self, job: Any = GOOD, **headers: str) -> Any:
        return self.http.post("/v1/jobs", json=job, headers=headers)

    def status(self, job_id: str) -> dict[str, Any]:
        return self.http.get(f"/v1/jobs/{job_id}").json()  # type: ignore[no-any-return]

    def finished(self, job_id: str) -> dict[str, Any]:
        wait_until(lambda: self.store.get(job_id).done)
        return self.status(job_id)

    def running(self, job_id: str) -> None:
        wait_until(lambda: self.store.get(job_id).status == "running")

    def close(self) -> None:
        self.generator.gate.set()
        self.queue.drain(10)
        self.store.close()


@contextmanager
def service(folder: Path, **settings: Any) -> Iterator[Service]:
    made = Service(folder, **settings)
    try:
        yield made
    finally:
        made.close()


def code(answer: Any) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def test_submit_status_result(tmp_path: Path) -> None:
    with service(tmp_path) as api:
        api.generator.gate.clear()
        answer = api.submit({**GOOD, "output_format": "base64"})
        assert answer.status_code == 202
        job = answer.json()
        assert len(job["id"]) >= 32
        assert answer.headers["Location"] == job["url"]
        assert job["deprecations"] == [{"key": "output_format", "use": "output.format"}]
        api.running(job["id"])
        wait_until(lambda: (api.status(job["id"])["progress"] or {}).get("stage"))
        assert code(api.http.get(f"{job['url']}/result")) == (409, "request.unfinished")
        other = api.submit().json()
        assert api.status(other["id"])["position"] == 0
        api.generator.gate.set()
        done = api.finished(job["id"])
        assert done["status"] == "completed"
        assert done["result"]["frames"] == 5
        assert "video_base64" not in done
        result = api.http.get(done["video"])
        assert result.content == b"v" * 1000
        assert result.headers["Content-Type"] == "video/mp4"
        assert api.http.get(done["video"], headers={"Range": "bytes=0-9"}).content == b"v" * 10
        assert api.finished(other["id"])["status"] == "completed"
        assert str(tmp_path) not in json.dumps(done)
        assert list((tmp_path / "jobs").iterdir()) == []


def test_a_bad_job_is_refused_at_once_and_a_failing_one_spoils_nothing(tmp_path: Path) -> None:
    with service(tmp_path) as api:
        assert code(api.submit({"frame_num": 80})) == (422, "job.frame_num")
        assert code(api.submit([1])) == (422, "job.invalid")
        post = api.http.post
        json_type = {"Content-Type": "application/json"}
        assert code(post("/v1/jobs", content=b"{", headers=json_type)) == (400, "request.json")
        assert code(post("/v1/jobs", content=b"[" * 100_000, headers=json_type)) == (400, "request.json")
        assert code(post("/v1/jobs", content=b'{"seed": NaN}', headers=json_type)) == (400, "request.json")
        assert code(post("/v1/jobs", content=b"\xff\xfe", headers=json_type)) == (400, "request.json")
        assert code(post("/v1/jobs", data={"prompt": "x"})) == (415, "request.media_type")
        assert api.generator.runs == 0
        # What only shows when the job is done:
        failed = api.finished(api.submit({**GOOD, "image": "/etc/passwd"}).json()["id"])
        assert failed["error"]["code"] == "forbidden.path"
        assert code(api.http.get(f"{failed['url']}/result")) == (403, "forbidden.path")
        assert api.finished(api.submit().json()["id"])["status"] == "completed"


def test_unknown_things(tmp_path: Path) -> None:
    with service(tmp_path) as api:
        assert code(api.http.get("/v1/jobs/guess")) == (404, "request.job")
        assert code(api.http.get("/v1/jobs/..%2f..%2fetc%2fpasswd/result"))[0] == 404
        assert code(api.http.delete("/v1/jobs/guess")) == (404, "request.job")
        assert code(api.http.get("/nope")) == (404, "request.route")
        assert code(api.http.put("/v1/jobs")) == (405, "request.method")


def test_the_same_idempotency_key_is_the_same_job(tmp_path: Path) -> None:
    with service(tmp_path) as api:
        first = api.submit(**{"Idempotency-Key": "k1"})
        again = api.submit(**{"Idempotency-Key": "k1"})
        assert (first.status_code, again.status_code) == (202, 200)
        assert first.json()["id"] == again.json()["id"]
        assert code(api.submit({**GOOD, "seed": 7}, **{"Idempotency-Key": "k1"})) == (422, "job.conflict")
        assert api.submit(**{"Idempotency-Key": "k2"}).json()["id"] != first.json()["id"]
        assert code(api.submit(**{"Idempotency-Key": "x" * 300})) == (422, "job.invalid")
        api.finished(first.json()["id"])
        assert api.submit(**{"Idempotency-Key": "k1"}).json()["status"] == "completed"
        wait_until(lambda: api.generator.runs == 2)


def test_a_full_queue_pushes_back(tmp_path: Path) -> None:
    with service(tmp_path, queue=2) as api:
        api.generator.gate.clear()
        api.running(api.submit().json()["id"])
        waiting = [api.submit().json()["id"] for _ in range(2)]
        full = api.submit()
        assert code(full) == (429, "busy.queue")
        assert int(full.headers["Retry-After"]) >= 1
        assert [api.status(job)["position"] for job in waiting] == [0, 1]
        api.generator.gate.set()
        api.finished(waiting[-1])
        assert api.submit().status_code == 202


def test_results_have_a_time_to_live_and_a_quota(tmp_path: Path) -> None:
    with service(tmp_path, result_ttl_s=100.0, result_quota_bytes=1500) as api:
        first = api.submit().json()["id"]
        assert api.finished(first)["bytes"] == 1000
        too_much = api.finished(api.submit().json()["id"])
        assert too_much["error"]["code"] == "busy.disk"
        api.http.delete(f"/v1/jobs/{first}")
        assert code(api.http.get(f"/v1/jobs/{first}")) == (404, "request.job")
        second = api.submit().json()["id"]
        assert api.finished(second)["status"] == "completed"
        api.now += 101
        api.submit()
        assert code(api.http.get(f"/v1/jobs/{second}/result")) == (404, "request.job")
    with service(tmp_path / "b", result_quota_bytes=1000) as api:
        api.finished(api.submit().json()["id"])
        assert code(api.submit()) == (429, "busy.disk")
    assert [path.suffix for path in (tmp_path / "b" / "results").iterdir()] == [".mp4"]


def test_cancelling(tmp_path: Path) -> None:
    with service(tmp_path) as api:
        api.generator.gate.clear()
        runs, waits = api.submit().json()["id"], api.submit().json()["id"]
        wait_until(lambda: api.generator.runs == 1)
        assert api.http.delete(f"/v1/jobs/{waits}").json()["status"] == "cancelled"
        api.http.delete(f"/v1/jobs/{runs}")
        done = api.finished(runs)
        assert (done["status"], done["error"]["code"]) == ("cancelled", "cancelled.by_caller")
        assert code(api.http.get(f"/v1/jobs/{runs}/result")) == (409, "cancelled.by_caller")
        api.generator.gate.set()
        assert api.finished(api.submit().json()["id"])["status"] == "completed"
        assert api.generator.runs == 2, "the job that waited was done all the same"


def test_bodies_are_bounded_before_they_are_parsed(tmp_path: Path) -> None:
    with service(tmp_path, max_body_bytes=10_000) as api:
        assert code(api.submit({"prompt": "a" * 20_000})) == (413, "too_large.body")
        chunks = itertools.repeat(b" " * 1000, 20)  # no announced length
        answer = api.http.post("/v1/jobs", content=chunks, headers={"Content-Type": "application/json"})
        assert code(answer) == (413, "too_large.body")


def test_a_token_guards_everything_but_the_probes(tmp_path: Path) -> None:
    with service(tmp_path, token="t0ken-of-the-test") as api:
        assert api.http.get("/livez").status_code == 200
        assert api.http.get("/readyz").status_code == 200
        for path in ("/metrics", "/v1/jobs/x", "/openapi.json", "/docs"):
            assert code(api.http.get(path)) == (401, "request.token")
        assert code(api.submit()) == (401, "request.token")
        assert code(api.submit(Authorization="Bearer wrong")) == (401, "request.token")
        assert api.submit(Authorization="Bearer t0ken-of-the-test").status_code == 202
        assert "t0ken" not in api.http.get("/metrics").text


def test_without_a_token_other_names_for_this_machine_are_refused(tmp_path: Path) -> None:
    with service(tmp_path) as api:
        for host in ("evil.example", "127.0.0.1.evil.example:8000", ""):
            assert code(api.http.get("/livez", headers={"Host": host})) == (400, "request.host")
        for host in ("127.0.0.1:8000", "localhost", "[::1]:8000"):
            assert api.http.get("/livez", headers={"Host": host}).status_code == 200


def test_health_metrics_and_the_openapi_page(tmp_path: Path) -> None:
    with service(tmp_path) as api:
        assert api.http.get("/readyz").json()["ready"] is True
        api.finished(api.submit().json()["id"])
        api.finished(api.submit({**GOOD, "image": "/x"}).json()["id"])
        wait_until(lambda: 'code="forbidden.path"' in api.http.get("/metrics").text)
        text = api.http.get("/metrics").text
        assert 'multitalk_jobs_total{code="",status="completed"} 1.0' in text
        assert "multitalk_result_bytes 1000.0" in text
        schema = api.http.get("/openapi.json").json()
        assert "frame_num" in schema["components"]["schemas"]["Job"]["properties"]
        assert set(schema["paths"]) == {
            "/v1/jobs", "/v1/jobs/{job_id}", "/v1/jobs/{job_id}/result", "/livez", "/readyz", "/metrics",
        }  # fmt: skip
        assert "swagger" in api.http.get("/docs").text.lower()
        (health,) = [api.finished(api.submit({"test": "health_check"}).json()["id"])]
        assert health["health"]["healthy"] is True


def test_an_error_of_the_gpu_ends_the_process_for_its_supervisor(tmp_path: Path) -> None:
    with service(tmp_path) as api:
        ended: list[bool] = []
        api.queue.on_failure = lambda: ended.append(True)
        api.generator.error = CudaFault("cuda.error", "the GPU reported an error")
        failed = api.finished(api.submit().json()["id"])
        assert failed["error"]["code"] == "cuda.error"
        wait_until(lambda: ended)
        assert api.http.get("/readyz").status_code == 503
        assert code(api.submit()) == (503, "busy.draining")


def test_a_queue_that_can_not_be_written_ends_the_process_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with service(tmp_path) as api:
        ended: list[bool] = []
        api.queue.on_failure = lambda: ended.append(True)

        def full(*_: object) -> None:
            msg = "database or disk is full"
            raise sqlite3.OperationalError(msg)

        monkeypatch.setattr(api.store, "finish", full)
        job = api.submit().json()["id"]
        wait_until(lambda: ended)
        assert api.http.get("/readyz").json() == {"ready": False, "why": "failed"}
        assert api.http.get("/livez").status_code == 200
        assert api.status(job)["status"] == "running", "it runs again in the next process"


def test_what_ran_when_the_process_died_runs_once_more_and_no_more(tmp_path: Path) -> None:
    def store() -> QueueStore:
        return QueueStore(tmp_path, limit=5, ttl_s=100, quota_bytes=1 << 20)

    first = store()
    job, _ = first.add({"a": 1})
    waiting, _ = first.add({"a": 2})
    for _ in range(2):
        taken = first.take(0)
        assert taken is not None
        assert taken.id == job.id
        first.close()  # as if killed: nothing was finished
        first = store()
    assert first.get(job.id).status == "failed"
    assert first.get(job.id).reply["error"]["code"] == "internal"  # type: ignore[index]
    taken = first.take(0)
    assert taken is not None
    assert (taken.id, taken.raw) == (waiting.id, {"a": 2})
    first.finish(waiting.id, {"status": "completed"})
    assert first.get(waiting.id).raw is None, "what the caller sent is kept longer than needed"
    first.close()


@pytest.mark.parametrize(
    ("host", "inside"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("192.0.2.1", False)],
)
def test_loopback_only_without_a_token(
    host: str, inside: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert is_loopback(host) is inside
    if not inside:
        monkeypatch.delenv("MT_TOKEN", raising=False)
        assert main(["--host", host]) == 2
        assert "MT_TOKEN" in capsys.readouterr().err


def test_two_processes_never_share_a_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MT_STATE_DIR", str(tmp_path))
    with (tmp_path / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert main(["--port", str(free_port())]) == 2
    assert "in use" in capsys.readouterr().err


# The real process with the real (tiny) model.


@contextmanager
def process(models: Path, state: Path, **more: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    port = free_port()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "BUCKET_", "MT_"))}
    env = {
        **kept,
        "MODEL_PATH": str(models),
        "MT_DEVICE": "cpu",
        "MT_STATE_DIR": str(state),
        "OMP_NUM_THREADS": "1",
        **more,
    }
    command = [sys.executable, "-m", "multitalk_runtime.serve", "--port", str(port)]
    with (state.parent / "log").open("a") as log:
        running = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: ask(f"{url}/readyz")[0] == 200, seconds=120)
        yield running, url
    finally:
        end(running)


def ask(url: str, job: Any = None, method: str | None = None) -> tuple[int, dict[str, Any]]:
    data = None if job is None else json.dumps(job).encode()
    request = urllib.request.Request(
        url, data=data, headers={"Content-Type": "application/json"}, method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_killed_in_a_job_then_drained_by_sigterm(tiny_models: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"

    def denoising(url: str, job: str) -> bool:
        return (ask(f"{url}{job}")[1].get("progress") or {}).get("stage") == "denoise"

    with process(tiny_models, state) as (running, url):
        long = ask(f"{url}/v1/jobs", LONG)[1]["url"]
        wait_until(lambda: denoising(url, long), seconds=120)
        quick = ask(f"{url}/v1/jobs", GOOD)[1]["url"]
        assert list((state / "jobs").iterdir())
        running.send_signal(signal.SIGKILL)
        running.wait(10)

    with process(tiny_models, state) as (running, url):
        wait_until(lambda: denoising(url, long), seconds=120)  # it runs again
        assert ask(f"{url}{quick}")[1]["status"] == "queued"
        ask(f"{url}{long}", method="DELETE")
        wait_until(lambda: ask(f"{url}{quick}")[1]["status"] == "completed", seconds=120)
        assert ask(f"{url}{long}")[1]["status"] == "cancelled"
        assert list((state / "jobs").iterdir()) == [], "the killed process left files"
        with urllib.request.urlopen(f"{url}{quick}/result", timeout=10) as video:
            assert video.read()[4:8] == b"ftyp"

        middle = {**GOOD, "frame_num": 21, "sample_steps": 20}
        last, waits = ask(f"{url}/v1/jobs", middle)[1]["url"], ask(f"{url}/v1/jobs", GOOD)[1]["url"]
        wait_until(lambda: ask(f"{url}{last}")[1]["status"] == "running")
        running.send_signal(signal.SIGTERM)
        wait_until(lambda: ask(f"{url}/readyz")[0] == 503, seconds=10)
        assert ask(f"{url}/v1/jobs", GOOD)[0] == 503
        assert ask(f"{url}{last}")[1]["status"] == "running"
        assert running.wait(120) == 0

    with process(tiny_models, state) as (running, url):
        assert ask(f"{url}{last}")[1]["status"] == "completed", "the running job was not finished"
        wait_until(lambda: ask(f"{url}{waits}")[1]["status"] == "completed", seconds=120)
        begin = time.monotonic()
        running.send_signal(signal.SIGTERM)
        assert running.wait(60) == 0
        assert time.monotonic() - begin < 30
    assert "Traceback" not in (tmp_path / "log").read_text()
