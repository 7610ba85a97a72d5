"""The one thread of `serve` that has the GPU: loads the models, then does the waiting jobs one by one."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from multitalk_runtime.core import run_job
from multitalk_runtime.errors import CancelledFault, Fault, InternalFault

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from multitalk_runtime.core import Worker
    from multitalk_runtime.queue_store import QueueStore, Record
    from multitalk_runtime.settings import Settings

__all__ = ["QueueWorker", "cancelled_reply"]

log = logging.getLogger("multitalk_runtime")

_WAIT_S = 1.0
_SWEEP_S = 10.0
_FIRST_GUESS_S = 30.0  # a job's length, before one has been measured


def cancelled_reply() -> dict[str, Any]:
    """The reply of a job that was cancelled while it waited."""
    fault = CancelledFault("cancelled.by_caller", "the caller cancelled the job")
    return {"status": "cancelled", "error": fault.to_json(), "deprecations": []}


class QueueWorker:
    """`begin`, and `drain` when the process is asked to end. `ready` says whether jobs are being done."""

    def __init__(self, store: QueueStore, *, settings: Settings, start: Callable[[], Worker]) -> None:
        self._store, self._settings, self._start = store, settings, start
        self._thread = threading.Thread(target=self._run, name="gpu", daemon=True)
        self._drain = threading.Event()
        self._give_up = threading.Event()
        self._cancelled: set[str] = set()
        self._progress: dict[str, dict[str, object]] = {}
        self._usual_s = _FIRST_GUESS_S
        self._listeners: list[Callable[[Record, float], None]] = []
        self.worker: Worker | None = None
        self.failure: Fault | None = None
        self.on_failure: Callable[[], None] = lambda: None  # the process can't go on

    @property
    def draining(self) -> bool:
        return self._drain.is_set()

    @property
    def ready(self) -> bool:
        return self.worker is not None and self._thread.is_alive() and not self.draining

    def begin(self) -> None:
        """Load the models and start, in the background."""
        self._thread.start()

    def listen(self, listener: Callable[[Record, float], None]) -> None:
        """`listener(record, seconds)` is told of every finished job."""
        self._listeners.append(listener)

    def progress(self, job_id: str) -> dict[str, object] | None:
        """The last report of a running job."""
        return self._progress.get(job_id)

    def cancel(self, job_id: str) -> Record:
        """Cancel a waiting or running job, or delete a finished one. Raises RequestFault if there is none."""
        record = self._store.cancel(job_id, cancelled_reply())
        if record.status == "running":
            self._cancelled.add(job_id)
        return record

    def retry_after_s(self) -> int:
        """When a place in the queue should be free: what a job usually takes."""
        return max(1, min(3600, round(self._usual_s)))

    def drain(self, timeout_s: float) -> None:
        """Start no more jobs; wait for the running one, and put it back into the queue after the time."""
        self._drain.set()
        self._store.wake()
        if not self._thread.is_alive():
            return
        self._thread.join(timeout_s)
        self._give_up.set()
        self._thread.join(60)

    def _run(self) -> None:
        try:
            self.worker = self._start()
        except Exception as error:
            self.failure = (
                error if isinstance(error, Fault) else InternalFault("internal", "the start failed")
            )
            log.exception("the models could not be loaded")
            self.on_failure()
            return
        try:
            self._work(self.worker)
        except Exception:
            # A queue that can't be read or written (a full disk): nobody would do the jobs any more.
            log.exception("the queue failed")
            self._end("the queue failed; this process has to be restarted")

    def _end(self, why: str) -> None:
        """Leave the rest to a supervisor, which starts the process anew; the queue is on disk."""
        self.failure = InternalFault("internal", why)
        self._drain.set()
        self.on_failure()

    def _work(self, worker: Worker) -> None:
        swept = time.monotonic()
        while not self.draining:
            record = self._store.take(_WAIT_S)
            if record is not None:
                self._one(record, worker)
            if time.monotonic() - swept > _SWEEP_S:
                self._store.sweep()
                swept = time.monotonic()

    def _one(self, record: Record, worker: Worker) -> None:
        begin = time.monotonic()
        try:
            reply = run_job(
                record.raw,
                worker=worker,
                job_id=record.id,
                progress=lambda state: self._progress.__setitem__(record.id, state),
                cancelled=lambda: self._why_stop(record.id),
                keep=lambda video: self._keep(record.id, video),
            )
        finally:
            self._cancelled.discard(record.id)
            self._progress.pop(record.id, None)
        if reply["status"] == "cancelled" and reply["error"]["code"] == "cancelled.shutdown":
            self._store.put_back(record.id)
            return
        seconds = time.monotonic() - begin
        if reply["status"] == "completed":
            self._usual_s = 0.7 * self._usual_s + 0.3 * seconds
        refresh = reply.pop("refresh_worker", False)
        self._store.finish(record.id, reply)
        finished = self._store.get(record.id)
        for listener in self._listeners:
            listener(finished, seconds)
        if refresh:
            self._end("the GPU failed; this process has to be restarted")

    def _why_stop(self, job_id: str) -> str | None:
        if job_id in self._cancelled:
            return "cancelled.by_caller"
        return "cancelled.shutdown" if self._give_up.is_set() else None

    def _keep(self, job_id: str, video: Path) -> dict[str, Any]:
        size = video.stat().st_size
        self._store.keep(job_id, video)
        return {"video": f"/v1/jobs/{job_id}/result", "bytes": size}
