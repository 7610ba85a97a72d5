"""The jobs of `serve` and their results, on disk, so that a restart loses none.

One SQLite file and one folder of videos under the state directory. A job is `queued`, `running`, `completed`,
`failed` or `cancelled`. What was running when the process ended is queued again, once: a job that ends the
process twice is failed, so that it can't do so for ever.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
import sqlite3
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multitalk_runtime.errors import BusyFault, InternalFault, JobFault, RequestFault

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["QueueStore", "Record"]

_ATTEMPTS = 2
_DONE = ("completed", "failed", "cancelled")
_SCHEMA = """
create table if not exists jobs (
    number integer primary key autoincrement,
    id text not null unique,
    idempotency text unique,
    raw text,
    digest text not null,
    status text not null,
    attempts integer not null default 0,
    created real not null,
    finished real,
    reply text,
    bytes integer not null default 0
)
"""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One job. Times are seconds since 1970; `reply` is the core's, `raw` the job as it came,
    until it is done."""

    id: str
    raw: Any
    status: str
    created: float
    finished: float | None
    reply: dict[str, Any] | None

    @property
    def done(self) -> bool:
        return self.status in _DONE


class QueueStore:
    """Safe to use from several threads. One process at a time: the state directory is its own."""

    def __init__(
        self,
        folder: Path,
        *,
        limit: int,
        ttl_s: float,
        quota_bytes: int,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._videos = folder / "results"
        self._videos.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._limit, self._ttl, self._quota, self._now = limit, ttl_s, quota_bytes, now
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._db = sqlite3.connect(folder / "jobs.sqlite", check_same_thread=False, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        self._db.execute("pragma journal_mode=wal")
        self._db.execute(_SCHEMA)
        self._recover()

    def _recover(self) -> None:
        fault = InternalFault("internal", "the worker ended twice while it did this job").to_json()
        reply = json.dumps({"status": "failed", "error": fault, "deprecations": []})
        self._db.execute(
            "update jobs set status='failed', finished=?, reply=? where status='running' and attempts>=?",
            (self._now(), reply, _ATTEMPTS),
        )
        self._db.execute("update jobs set status='queued' where status='running'")
        known = {row["id"] for row in self._db.execute("select id from jobs where status='completed'")}
        for video in self._videos.iterdir():
            if video.stem not in known:
                video.unlink()

    def add(self, raw: object, *, idempotency: str | None = None) -> tuple[Record, bool]:
        """Queue a job → its record, and whether it is new. A key that is known gives its first job.

        Raises BusyFault if the queue or the disk quota is full, JobFault for the key of another job.
        """
        text = json.dumps(raw, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        with self._lock:
            self.sweep()
            if idempotency is not None:
                query = "select * from jobs where idempotency=?"
                row = self._db.execute(query, (idempotency,)).fetchone()
                if row is not None and row["digest"] != digest:
                    msg = "this idempotency key was used for another job"
                    hint = "use a new key for each job"
                    raise JobFault("job.conflict", msg, field="Idempotency-Key", hint=hint)
                if row is not None:
                    return _record(row), False
            waiting = self.waiting()
            if waiting >= self._limit:
                raise BusyFault("busy.queue", f"{waiting} jobs are waiting already")
            if self.stored_bytes() >= self._quota:
                raise BusyFault("busy.disk", "the disk quota for results is used up")
            job_id = secrets.token_urlsafe(24)
            self._db.execute(
                "insert into jobs (id, idempotency, raw, digest, status, created) "
                "values (?, ?, ?, ?, 'queued', ?)",
                (job_id, idempotency, text, digest, self._now()),
            )
            self._changed.notify_all()
            return self.get(job_id), True

    def get(self, job_id: str) -> Record:
        """Raises RequestFault for an id that is not known (any more)."""
        with self._lock:
            row = self._db.execute("select * from jobs where id=?", (job_id,)).fetchone()
        if row is None:
            msg = "there is no such job"
            raise RequestFault("request.job", msg)
        return _record(row)

    def take(self, timeout_s: float) -> Record | None:
        """The oldest waiting job, now running; None if there is none within the time."""
        with self._changed:
            if self.waiting() == 0:
                self._changed.wait(timeout_s)
            row = self._db.execute(
                "select * from jobs where status='queued' order by number limit 1"
            ).fetchone()
            if row is None:
                return None
            self._db.execute("update jobs set status='running', attempts=attempts+1 where id=?", (row["id"],))
            return self.get(row["id"])

    def put_back(self, job_id: str) -> None:
        """A running job waits again, as if it had not been tried: the process was asked to end."""
        with self._lock:
            self._db.execute(
                "update jobs set status='queued', attempts=attempts-1 where id=? and status='running'",
                (job_id,),
            )

    def finish(self, job_id: str, reply: dict[str, Any]) -> None:
        """Store the reply; its status is the job's. What the caller sent is forgotten."""
        with self._lock:
            video = self.video(job_id)
            size = video.stat().st_size if video.exists() else 0
            self._db.execute(
                "update jobs set status=?, finished=?, reply=?, bytes=?, raw=null where id=?",
                (reply["status"], self._now(), json.dumps(reply), size, job_id),
            )

    def keep(self, job_id: str, video: Path) -> None:
        """Take a finished video into the results. Raises BusyFault if the quota has no room for it."""
        with self._lock:
            self.sweep()
            if self.stored_bytes() + video.stat().st_size > self._quota:
                raise BusyFault("busy.disk", "the video is larger than what is left of the disk quota")
            shutil.move(video, self.video(job_id))

    def video(self, job_id: str) -> Path:
        """Where the video of a job lies. Only for ids that `get` knows: they are this module's own."""
        return self._videos / f"{job_id}.mp4"

    def cancel(self, job_id: str, reply: dict[str, Any]) -> Record:
        """A waiting job is cancelled at once; a running one by whoever runs it; a finished one is deleted."""
        with self._lock:
            record = self.get(job_id)
            if record.status == "queued":
                self.finish(job_id, reply)
                return self.get(job_id)
            if record.done:
                self._delete(job_id)
            return record

    def sweep(self) -> None:
        """Forget finished jobs, and their videos, whose time to live is over."""
        with self._lock:
            query = "select id from jobs where finished is not null and finished < ?"
            for row in self._db.execute(query, (self._now() - self._ttl,)).fetchall():
                self._delete(row["id"])

    def _delete(self, job_id: str) -> None:
        self.video(job_id).unlink(missing_ok=True)
        self._db.execute("delete from jobs where id=?", (job_id,))

    def waiting(self) -> int:
        """How many jobs are queued."""
        return self._one("select count(*) from jobs where status='queued'")

    def ahead_of(self, job_id: str) -> int:
        """How many jobs wait in front of a waiting one."""
        with self._lock:
            query = (
                "select count(*) from jobs where status='queued' "
                "and number < (select number from jobs where id=?)"
            )
            return int(self._db.execute(query, (job_id,)).fetchone()[0])

    def stored_bytes(self) -> int:
        """Bytes of all results."""
        return self._one("select coalesce(sum(bytes), 0) from jobs")

    def _one(self, query: str) -> int:
        with self._lock:
            return int(self._db.execute(query).fetchone()[0])

    def wake(self) -> None:
        """End the wait of `take`."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._db.close()


def _record(row: sqlite3.Row) -> Record:
    return Record(
        id=row["id"],
        raw=json.loads(row["raw"]) if row["raw"] else None,
        status=row["status"],
        created=row["created"],
        finished=row["finished"],
        reply=json.loads(row["reply"]) if row["reply"] else None,
    )
