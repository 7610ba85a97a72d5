"""Every module of `multitalk_runtime` imports, with all that its services need: nothing is optional here."""

from __future__ import annotations

import shutil
import subprocess
import time
from importlib import import_module
from importlib.util import find_spec

from packages import do_not_import, not_installed, version, walk, without_metadata
from result import CheckResult, Context, failed, passed, skipped

ID = "imports.runtime"
TIERS = ("cpu", "gpu")
LIMIT_S = 300

# The extras `serverless`, `serve` and `s3`, which an image installs all three, by what is imported of them
_EXTRAS = ("runpod", "fastapi", "uvicorn", "prometheus_client", "boto3", "pydantic", "httpcore")


def run(ctx: Context) -> CheckResult:
    """Walk the package, import what it imports only when it runs, and start the programs that it calls."""
    if find_spec("multitalk_runtime") is None:
        if not ctx.request["runtime"]:
            return skipped("the image is not meant to hold the runtime")
        return not_installed("multitalk_runtime")
    started = time.monotonic()
    found = walk("multitalk_runtime")
    if found.broken:
        return do_not_import("multitalk_runtime", found)
    if (installed := version()) is None:
        return without_metadata("multitalk_runtime")
    seconds, missing = time.monotonic() - started, []
    for name in _EXTRAS:
        try:
            import_module(name)
        except Exception as error:
            missing.append(f"{name}: {type(error).__name__}: {error}")
    if missing:
        return failed(
            f"what the handler needs does not import: {missing[0]}"[:500],
            detail="\n".join(missing),
            diagnosis="the wheel was installed without its extras serverless, serve and s3",
            fix="lock multitalk-runtime[serverless,serve,s3] for the image",
        )
    programs, problem = _programs()
    if problem:
        return failed(
            problem,
            diagnosis="without ffmpeg and ffprobe no sound is read and no video is written",
            fix="add the Debian package ffmpeg to the image's template",
        )
    return passed(
        f"{len(found.modules)} modules and {found.names} public names of multitalk_runtime {installed}, "
        f"from {found.place}; ffmpeg {programs['ffmpeg']}",
        runtime__modules=len(found.modules),
        runtime__version=installed,
        runtime__import_s=round(seconds, 3),
        runtime__ffmpeg=programs["ffmpeg"],
    )


def _programs() -> tuple:
    """({name: version}, "") or ({}, what is wrong)."""
    versions = {}
    for name in ("ffmpeg", "ffprobe"):
        path = shutil.which(name)
        if path is None:
            return {}, f"{name} is not on the PATH"
        done = subprocess.run([path, "-version"], capture_output=True, text=True, timeout=60)
        words = done.stdout.split()
        if done.returncode != 0 or len(words) < 3:
            return {}, f"{name} -version ended with {done.returncode}: {(done.stderr or done.stdout)[:300]}"
        versions[name] = words[2]
    return versions, ""
