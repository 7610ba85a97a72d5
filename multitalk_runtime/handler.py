"""RunPod's serverless worker.

    python -u -m multitalk_runtime.handler                       # on RunPod: takes jobs from its queue
    python -u -m multitalk_runtime.handler --rp_serve_api        # a local stand-in for RunPod's API
    python -u -m multitalk_runtime.handler --test_input '{"input": {"prompt": "A woman speaks."}}'

The models are verified and loaded before the first job is taken and stay loaded. One job runs at a time. A
job that fails has an `error` whose text is the JSON of `{code, field, message, hint}`; after errors of the
GPU the worker asks to be replaced. Settings come from the environment: see docs/runtime.md.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from multitalk_runtime.core import Reply, Worker, health_check, run_job, start_worker
from multitalk_runtime.errors import Fault, ForbiddenFault
from multitalk_runtime.settings import Settings, SettingsError

__all__ = ["fitness_check", "main", "make_handler"]

log = logging.getLogger("multitalk_runtime")

Handler = Callable[[dict[str, Any]], Awaitable[Reply]]


def make_handler(
    worker: Worker, *, report: Callable[[dict[str, Any], dict[str, object]], None] | None = None
) -> Handler:
    """The function that RunPod's SDK calls with each job. `report(job, progress)` is told at most once a
    second. A cancelled job stops at its next step."""
    one_at_a_time = ThreadPoolExecutor(max_workers=1, thread_name_prefix="job")

    async def handle(job: dict[str, Any]) -> Reply:
        stop = threading.Event()
        job_id = str(job.get("id", "unknown"))
        if "s3Config" in job:
            msg = "storage is chosen by the worker's operator, not by a job"
            fault = ForbiddenFault("forbidden.endpoint", msg, field="s3Config")
            return _for_runpod({"status": "failed", "error": fault.to_json(), "deprecations": []})

        def work() -> Reply:
            return run_job(
                job.get("input"),
                worker=worker,
                job_id=job_id,
                progress=None if report is None else (lambda state: report(job, state)),
                cancelled=stop.is_set,
            )

        running = asyncio.get_running_loop().run_in_executor(one_at_a_time, work)
        try:
            return _for_runpod(await asyncio.shield(running))
        except asyncio.CancelledError:
            stop.set()
            await asyncio.wait({running})  # the GPU is free before the next job comes
            raise

    return handle


def _for_runpod(reply: Reply) -> Reply:
    """RunPod's `error` is a text; the rest of the reply stays beside it."""
    if "error" in reply:
        reply["error"] = json.dumps(reply["error"], ensure_ascii=False)
    return reply


def fitness_check(worker: Worker) -> Callable[[], None]:
    """A check for RunPod's SDK: raises RuntimeError on a worker that could not do a job."""

    def multitalk() -> None:
        health = health_check(worker)
        if not health["healthy"]:
            bad = [name for name, check in health["checks"].items() if not check["ok"]]
            msg = f"not fit for work: {', '.join(bad)}"
            raise RuntimeError(msg)

    return multitalk


def main() -> int:
    """Load the models, then take jobs. Exit code 1 if the worker can't work, 2 for wrong settings."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)  # noqa: T201 - what --help is for
        return 0
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        worker = start_worker(Settings.from_environment())
    except SettingsError as error:
        log.error("%s", error)
        return 2
    except Fault as fault:
        log.error("the worker can't start: %s; %s", fault, fault.hint)
        return 1
    # The SDK's default, DEBUG, writes every reply into the log: presigned URLs, and whole videos as base64.
    os.environ.setdefault("RUNPOD_LOG_LEVEL", "INFO")
    import runpod

    runpod.serverless.register_fitness_check(fitness_check(worker))
    handler = make_handler(worker, report=runpod.serverless.progress_update)
    runpod.serverless.start({"handler": handler})
    return 0


if __name__ == "__main__":
    sys.exit(main())
