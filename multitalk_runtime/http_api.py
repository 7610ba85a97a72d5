"""The routes of `serve`: jobs, their results, health and metrics. OpenAPI's page is at /docs."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, FastAPI, Header, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from starlette.exceptions import HTTPException

from multitalk_runtime.core import health_check
from multitalk_runtime.errors import CODES, BusyFault, Fault, InternalFault, JobFault, RequestFault
from multitalk_runtime.http_guard import Guard
from multitalk_runtime.job import Job, parse_job

if TYPE_CHECKING:
    from multitalk_runtime.queue_store import QueueStore, Record
    from multitalk_runtime.queue_worker import QueueWorker
    from multitalk_runtime.settings import Settings

__all__ = ["make_app"]

_BUCKETS = (1, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200)
_PRIVATE = {"Cache-Control": "private, no-store", "X-Content-Type-Options": "nosniff"}


class Metrics:
    """What /metrics shows. A registry of its own, so that several apps can live in one process."""

    def __init__(self, queue: QueueWorker, store: QueueStore) -> None:
        self.registry = CollectorRegistry()
        self.jobs = Counter("multitalk_jobs", "finished jobs", ["status", "code"], registry=self.registry)
        self.refused = Counter(
            "multitalk_refused", "requests that were refused", ["code"], registry=self.registry
        )
        self.seconds = Histogram(
            "multitalk_job_seconds", "time of completed jobs", buckets=_BUCKETS, registry=self.registry
        )
        for name, text, read in (
            ("multitalk_queue_jobs", "jobs that wait", store.waiting),
            ("multitalk_result_bytes", "bytes of stored results", store.stored_bytes),
            ("multitalk_ready", "1 if jobs are being done", lambda: int(queue.ready)),
        ):
            Gauge(name, text, registry=self.registry).set_function(read)

    def finished(self, record: Record, seconds: float) -> None:
        """Count a job."""
        code = (record.reply or {}).get("error", {}).get("code", "")
        self.jobs.labels(record.status, code).inc()
        if record.status == "completed":
            self.seconds.observe(seconds)


def make_app(queue: QueueWorker, store: QueueStore, *, settings: Settings, loopback: bool) -> FastAPI:
    """The ASGI application. `loopback`: it listens on this machine's own address."""
    app = FastAPI(title="MultiTalk", description="Talking-person videos.", version="1", redoc_url=None)
    metrics = Metrics(queue, store)
    queue.listen(metrics.finished)
    app.add_middleware(
        Guard,
        token=settings.token,
        max_body=settings.max_body_bytes,
        body_s=settings.fetch_s,
        names_only=settings.token is None and loopback,
    )
    _errors(app, metrics, queue)
    _jobs(app, queue, store)
    _health(app, queue, metrics)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _errors(app: FastAPI, metrics: Metrics, queue: QueueWorker) -> None:
    def answer(fault: Fault) -> JSONResponse:
        metrics.refused.labels(fault.code).inc()
        headers = dict(_PRIVATE)
        if isinstance(fault, BusyFault):
            headers["Retry-After"] = str(queue.retry_after_s())
        return JSONResponse({"error": fault.to_json()}, status_code=fault.status, headers=headers)

    @app.exception_handler(Fault)
    async def on_fault(_: Request, fault: Fault) -> JSONResponse:
        return answer(fault)

    @app.exception_handler(HTTPException)
    async def on_http(_: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 405:
            return answer(RequestFault("request.method", "this address does not take the method"))
        return answer(RequestFault("request.route", "there is nothing at this address"))

    @app.exception_handler(Exception)
    async def on_bug(_: Request, error: Exception) -> JSONResponse:
        del error  # the server's log has it
        return answer(InternalFault("internal", "an unexpected error"))


async def _body(request: Request) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        msg = "the body has to be application/json"
        raise RequestFault("request.media_type", msg)
    return await request.body()


def _parse(body: bytes) -> Any:
    def no_constant(name: str) -> None:
        msg = f"{name} is not JSON"
        raise ValueError(msg)

    try:
        return json.loads(body, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        msg = "the body is not JSON"
        raise RequestFault("request.json", msg) from error


def _jobs(app: FastAPI, queue: QueueWorker, store: QueueStore) -> None:
    def view(record: Record) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "id": record.id,
            "status": record.status,
            "url": f"/v1/jobs/{record.id}",
            "created": _day(record.created),
            **(record.reply or {}),
        }
        if record.status == "queued":
            shown["position"] = store.ahead_of(record.id)
        if record.status == "running":
            shown["progress"] = queue.progress(record.id)
        if record.finished is not None:
            shown["finished"] = _day(record.finished)
        return shown

    @app.post("/v1/jobs", status_code=202, summary="Submit a job", openapi_extra=_JOB_BODY)
    def submit(
        body: Annotated[bytes, Depends(_body)],
        idempotency_key: Annotated[str | None, Header()] = None,
    ) -> JSONResponse:
        """The same `Idempotency-Key` with the same job gives the same job again, and starts no second one."""
        if queue.draining:
            msg = "the worker is shutting down"
            raise BusyFault("busy.draining", msg)
        key = idempotency_key
        if key is not None and not (0 < len(key) <= 200 and key.isprintable()):
            msg = "a key has 1 to 200 printable characters"
            raise JobFault("job.invalid", msg, field="Idempotency-Key")
        raw = _parse(body)
        is_test = isinstance(raw, dict) and "test" in raw
        notes = () if is_test else parse_job(raw)[1]
        record, new = store.add(raw, idempotency=key)
        shown = {**view(record), "deprecations": [note.to_json() for note in notes]}
        headers = {**_PRIVATE, "Location": shown["url"]}
        return JSONResponse(shown, status_code=202 if new else 200, headers=headers)

    @app.get("/v1/jobs/{job_id}", summary="Status and progress")
    def status(job_id: str) -> JSONResponse:
        """`status` is queued, running, completed, failed or cancelled."""
        return JSONResponse(view(store.get(job_id)), headers=_PRIVATE)

    @app.delete("/v1/jobs/{job_id}", summary="Cancel a job, or delete a finished one")
    def cancel(job_id: str) -> JSONResponse:
        """A running job ends at its next step."""
        return JSONResponse(view(queue.cancel(job_id)), headers=_PRIVATE)

    @app.get("/v1/jobs/{job_id}/result", summary="The video", response_class=FileResponse)
    def result(job_id: str) -> Response:
        """The mp4, or a redirect to it in S3; the job's error if it has none."""
        record = store.get(job_id)
        reply = record.reply or {}
        if not record.done:
            msg = f"the job is {record.status}"
            raise RequestFault("request.unfinished", msg)
        if "error" in reply:
            code = CODES.get(reply["error"]["code"])
            return JSONResponse(
                {"error": reply["error"]}, status_code=code.status if code else 500, headers=_PRIVATE
            )
        if "video_url" in reply:
            return RedirectResponse(reply["video_url"], status_code=303, headers=_PRIVATE)
        video = store.video(job_id)
        if not video.is_file():
            msg = "there is no such result"
            raise RequestFault("request.job", msg)
        return FileResponse(video, media_type="video/mp4", filename="video.mp4", headers=_PRIVATE)


def _health(app: FastAPI, queue: QueueWorker, metrics: Metrics) -> None:
    @app.get("/livez", summary="Whether the process answers")
    def livez() -> dict[str, bool]:
        return {"live": True}

    @app.get("/readyz", summary="Whether jobs are being done")
    def readyz() -> JSONResponse:
        if not queue.ready or queue.worker is None:
            why = "failed" if queue.failure else "draining" if queue.draining else "loading"
            return JSONResponse({"ready": False, "why": why}, status_code=503)
        health = health_check(queue.worker)
        checks = {name: check["ok"] for name, check in health["checks"].items()}
        return JSONResponse(
            {"ready": health["healthy"], "checks": checks}, status_code=200 if health["healthy"] else 503
        )

    @app.get("/metrics", summary="Prometheus metrics")
    def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)


_JOB_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Job"}}},
    }
}


def _openapi(app: FastAPI) -> dict[str, Any]:
    if not app.openapi_schema:
        schema = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        job = Job.model_json_schema(ref_template="#/components/schemas/{model}")
        parts = {**job.pop("$defs", {}), "Job": job}
        schema.setdefault("components", {}).setdefault("schemas", {}).update(parts)
        app.openapi_schema = schema
    return app.openapi_schema


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
