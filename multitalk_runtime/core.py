"""One job from its raw JSON to its reply, the same for RunPod's handler and for `serve`.

Nothing a job does gets out of here as an exception: the reply says what went wrong, by a fault's four fields
and nothing else, the log has the rest under the job's id. Every job has a folder of its own, which is gone
before its reply is.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from multitalk_runtime import outputs
from multitalk_runtime.errors import (
    CancelledFault,
    CudaFault,
    Fault,
    ForbiddenFault,
    InternalFault,
    JobFault,
)
from multitalk_runtime.inputs import resolve
from multitalk_runtime.job import Deprecation, Job, parse_job
from multitalk_runtime.request import Request
from multitalk_runtime.storage import Storage
from multitalk_runtime.workspace import Workspace
from wan.quality import LOSSY_ATTENTION, TIERS

if TYPE_CHECKING:
    from multitalk_runtime.clock import Progress
    from multitalk_runtime.generator import Result
    from multitalk_runtime.settings import Settings

__all__ = ["Cancelled", "Maker", "Reply", "Throttle", "Worker", "health_check", "run_job", "start_worker"]

log = logging.getLogger("multitalk_runtime")

Cancelled = Callable[[], "str | bool | None"]
"""Asked between steps: None or False to go on, else True or the code of a CancelledFault."""
Reply = dict[str, Any]

_PATH = re.compile(r"(?<![\w:/.])/(?:[^\s/'\"]+/)+")  # folders of the worker, in a message from below


class Maker(Protocol):
    """What a job needs of `generator.Generator`."""

    def run(
        self,
        request: Request,
        *,
        progress: Callable[[Progress], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Result: ...


@dataclass(frozen=True, kw_only=True)
class Worker:
    """What stays between jobs: the settings, the models (warm) and the storage's client."""

    settings: Settings
    generator: Maker
    storage: Storage
    folder: Path | None = None  # where jobs have their folders; the system's temporary one if None


def start_worker(settings: Settings, *, folder: Path | None = None) -> Worker:
    """Verify and load the models. Raises ModelFault, CudaFault or InternalFault: no job could be done."""
    from multitalk_runtime.ffmpeg import program
    from multitalk_runtime.generator import Generator
    from multitalk_runtime.model_dirs import ModelDirs
    from multitalk_runtime.models import check_models

    program("ffmpeg"), program("ffprobe")
    begin = time.monotonic()
    models = ModelDirs.from_settings(settings)
    found = check_models(models)
    log.info("%d model files verified in %.1f s", found.files, found.seconds)
    generator = Generator.load(
        models,
        device=settings.device,
        quality=settings.quality,
        attention=settings.attention,
        loras=settings.loras,
        offload_model=settings.offload,
    )
    log.info("models loaded in %.1f s", time.monotonic() - begin)
    return Worker(settings=settings, generator=generator, storage=Storage(settings), folder=folder)


def run_job(
    raw: object,
    *,
    worker: Worker,
    job_id: str,
    progress: Callable[[dict[str, object]], None] | None = None,
    cancelled: Cancelled | None = None,
    keep: Callable[[Path], dict[str, Any]] | None = None,
) -> Reply:
    """Do a job; never raises for what a job can cause.

    The reply has `status` (`completed`, `failed` or `cancelled`) and `deprecations`; when completed `result`
    and the video (`video_base64` or `video_url`), else `error`. Where the job asked for base64, `keep` takes
    the video instead and returns what the reply says of it.
    """
    notes: tuple[Deprecation, ...] = ()
    try:
        if isinstance(raw, dict) and "test" in raw:
            return _test(raw, worker)
        job, notes = _old_turbo(*parse_job(raw), worker.settings)
        reply = {"status": "completed", **_make(job, worker, job_id, progress, cancelled, keep)}
    except Fault as fault:
        reply = _failed(fault, job_id)
    except Exception as error:  # noqa: BLE001 - the worker lives on, whatever a job does
        reply = _failed(_unforeseen(error, job_id), job_id)
    reply["deprecations"] = [note.to_json() for note in notes]
    return reply


def _make(
    job: Job,
    worker: Worker,
    job_id: str,
    progress: Callable[[dict[str, object]], None] | None,
    cancelled: Cancelled | None,
    keep: Callable[[Path], dict[str, Any]] | None,
) -> Reply:
    settings, begin = worker.settings, time.monotonic()
    stop = _Stop(asked=cancelled, deadline=begin + settings.job_s)
    tell = Throttle(progress) if progress else None
    check_quality(job, settings)
    destination = outputs.plan(job, settings=settings, storage=worker.storage)
    with Workspace(worker.folder) as workspace:
        if tell:
            tell({"stage": "inputs"})
        inputs = resolve(job, settings=settings, workspace=workspace, storage=worker.storage)
        stop.check()
        request = Request.from_job(
            job,
            image=inputs.image,
            tracks=inputs.tracks,
            output=workspace.path("video.mp4"),
            max_audio_s=settings.max_audio_s,
            default_quality=settings.quality,
        )
        try:
            result = worker.generator.run(
                request,
                progress=(lambda state: tell(state.to_json())) if tell else None,
                cancelled=stop,
            )
        except CancelledFault:
            stop.check()  # says why
            raise
        stop.check()
        if keep is not None and destination is None:
            video = keep(result.video)
        else:
            video = outputs.deliver(result.video, destination, settings=settings, storage=worker.storage)
        log.info("job %s: %d frames in %.1f s", job_id, result.frames, time.monotonic() - begin)
        return {**video, "result": result.to_json(), "seconds": round(time.monotonic() - begin, 3)}


def _old_turbo(
    job: Job, notes: tuple[Deprecation, ...], settings: Settings
) -> tuple[Job, tuple[Deprecation, ...]]:
    """The old images' `turbo` where there is no LoRA for it: the job is done all the same, and told so. Only
    who asks for the quality by its own name gets an error."""
    if job.quality != "turbo" or settings.loras or not any(note.key == "turbo" for note in notes):
        return job, notes
    use = f"quality; this worker has no LoRA for turbo, so it was done as {settings.quality}"
    changed = tuple(Deprecation(key="turbo", use=use) if note.key == "turbo" else note for note in notes)
    return job.model_copy(update={"quality": None}), changed


def check_quality(job: Job, settings: Settings) -> None:
    """Before anything is fetched: whether the worker was started for what the job asks."""
    asked, loaded = TIERS[job.quality or settings.quality], TIERS[settings.quality].linears
    if asked.lora and not settings.loras:
        msg = "quality turbo needs a distilled LoRA, and this worker has none"
        hint = "leave it out, or ask the operator for MT_LORA"
        raise JobFault("job.quality", msg, field="quality", hint=hint)
    if asked.linears != loaded and not asked.lora:
        works = [name for name, tier in TIERS.items() if tier.linears == loaded and not tier.lora]
        msg = f"quality {job.quality} needs {asked.linears} linears; this worker was started with {loaded}"
        hint = f"use {' or '.join(works)}, or ask the operator for MT_QUALITY"
        raise ForbiddenFault("forbidden.option", msg, field="quality", hint=hint)
    if job.quality == "exact" and settings.attention in LOSSY_ATTENTION:
        msg = f"this worker's attention is {settings.attention}, which is not exact"
        raise ForbiddenFault("forbidden.option", msg, field="quality", hint="leave quality out")


@dataclass(frozen=True, kw_only=True)
class _Stop:
    """Whether a job has to end, and why."""

    asked: Cancelled | None
    deadline: float

    def code(self) -> str | None:
        if self.asked is not None and (answer := self.asked()):
            return answer if isinstance(answer, str) else "cancelled.by_caller"
        return "cancelled.timeout" if time.monotonic() > self.deadline else None

    def __call__(self) -> bool:
        return self.code() is not None

    def check(self) -> None:
        """Raises CancelledFault if the job has to end."""
        if (code := self.code()) is not None:
            raise CancelledFault(code, _CANCELLED[code])


_CANCELLED = {
    "cancelled.by_caller": "the caller cancelled the job",
    "cancelled.shutdown": "the worker is shutting down",
    "cancelled.timeout": "the job took longer than this worker allows",
}


class Throttle:
    """Hands on at most one report in `every_s` seconds; those in between are dropped."""

    def __init__(
        self,
        callback: Callable[[dict[str, object]], None],
        *,
        every_s: float = 1.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._callback, self._every, self._now = callback, every_s, now
        self._last = float("-inf")

    def __call__(self, report: dict[str, object]) -> None:
        now = self._now()
        if now - self._last < self._every:
            return
        self._last = now
        try:
            self._callback(report)
        except Exception:
            log.warning("a progress report could not be sent", exc_info=True)


def _failed(fault: Fault, job_id: str) -> Reply:
    log.warning("job %s: %s", job_id, fault, exc_info=fault if fault.status >= 500 else None)
    error = fault.to_json()
    error["message"] = _PATH.sub("", error["message"])
    status = "cancelled" if isinstance(fault, CancelledFault) else "failed"
    reply: Reply = {"status": status, "error": error}
    if isinstance(fault, CudaFault):
        reply["refresh_worker"] = True  # a CUDA context is not to be trusted after an error
    return reply


def _unforeseen(error: Exception, job_id: str) -> Fault:
    from multitalk_runtime.faults import to_fault

    try:
        known = to_fault(error)
    except Exception:  # noqa: BLE001 - judging an error must not make another one
        known = None
    if isinstance(known, CudaFault | InternalFault):
        return known
    log.error("job %s: unexpected", job_id, exc_info=error)
    return InternalFault("internal", f"an unexpected error; the worker's log has it under job {job_id}")


def _test(raw: dict[str, Any], worker: Worker) -> Reply:
    if raw["test"] != "health_check":
        msg = "the only test is health_check"
        raise JobFault("job.invalid", msg, field="test", hint="use health_check")
    note = Deprecation(key="test", use="the start-up checks of the worker, or GET /readyz of serve")
    return {"status": "completed", "health": health_check(worker), "deprecations": [note.to_json()]}


def health_check(worker: Worker) -> dict[str, Any]:
    """Whether a job could be done now: `healthy`, and every check by name with what was seen."""
    import tempfile

    folder = worker.folder or Path(tempfile.gettempdir())
    free = shutil.disk_usage(folder).free
    checks: dict[str, Any] = {
        "models": {"ok": worker.generator is not None},
        "programs": {"ok": all(shutil.which(name) for name in ("ffmpeg", "ffprobe"))},
        "disk": {"ok": free > 1 << 30 and os.access(folder, os.W_OK), "free_bytes": free},
        "device": _device(worker.generator),
        "storage": {"ok": True, "configured": bool(worker.settings.s3_bucket)},
    }
    return {"healthy": all(check["ok"] for check in checks.values()), "checks": checks}


def _device(generator: Maker) -> dict[str, Any]:
    device = getattr(generator, "device", None)
    if device is None or device.type != "cuda":
        return {"ok": True, "name": str(device or "none")}
    import torch

    try:
        torch.ones(8, device=device).sum().item()
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError:
        log.exception("the GPU does not answer")
        return {"ok": False, "name": str(device)}
    name = torch.cuda.get_device_name(device)
    return {"ok": True, "name": name, "free_bytes": free, "total_bytes": total}
