"""Runs the checks one by one, each in its own process, and writes the report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from processes import ending, finish
from result import CheckResult, Context

HERE = Path(__file__).resolve().parent
TAIL = 6000  # characters of a check's own output that a failure keeps


def checks() -> dict:
    """Every check by its ID: the modules of checks/, which hold nothing heavy at import."""
    names = sorted(path.stem for path in (HERE / "checks").glob("*.py") if path.stem != "__init__")
    modules = [import_module(f"checks.{name}") for name in names]
    return {module.ID: module for module in modules}


def describe(check: object) -> dict:
    """What `--list` prints of a check."""
    what, _, why = (" ".join(part.split()) for part in (check.__doc__ or "").strip().partition("\n\n"))
    return {
        "id": check.ID, "tiers": list(check.TIERS), "limit_s": check.LIMIT_S, "what": what, "why": why
    }  # fmt: skip


def progress(event: str, **values: object) -> None:
    """One line of JSON for whoever watches."""
    print(json.dumps({"event": event, **values}), flush=True)


def run_here(request: dict, name: str, fd: int | None) -> int:
    """Run one check in this process; its result goes to the descriptor, its own output where it likes."""
    try:
        result = checks()[name].run(Context(request))
    except Exception as error:
        result = CheckResult(
            "error",
            f"{type(error).__name__}: {error}"[:500],
            detail=traceback.format_exc()[-TAIL:],
            diagnosis="the check met something that it does not know",
            fix="read the traceback under `detail`; `mtbuild diagnose` may know it",
        )
    text = json.dumps(asdict(result), default=str)
    if fd is None:
        print(text)
    else:
        with os.fdopen(fd, "w") as stream:
            stream.write(text)
    return 0


def run_all(request: dict, path: Path) -> int:
    """Run every check that the request names, write report.json, and answer with the exit status."""
    known = checks()
    results, facts = [], {}
    progress("start", checks=request["checks"], user=request["user"])
    for name in request["checks"]:
        started = time.monotonic()
        if name not in known or request["tier"] not in known[name].TIERS:
            outcome = CheckResult(
                "error",
                f"this suite has no check {name!r} on tier {request['tier']}",
                diagnosis="request and suite come from different versions",
                fix="smoke with the mtbuild that the suite belongs to",
            )
        else:
            limit = known[name].LIMIT_S
            progress("check", check=name, limit_s=limit)
            outcome = _in_process(path, name, limit)
        seconds = round(time.monotonic() - started, 3)
        entry = {"check": name, "seconds": seconds, **asdict(outcome)}
        facts.update(entry.pop("facts"))
        results.append(entry)
        progress("result", check=name, status=outcome.status, seconds=seconds, message=outcome.message)
    report = {
        "schema": 1,
        "nonce": request["nonce"],
        "tier": request["tier"],
        "results": results,
        "facts": facts,
    }
    out = Path(request["out"])
    part = out / "report.json.part"
    part.write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")
    part.replace(out / "report.json")
    good = {"passed", "degraded"} if request["allow_degraded"] else {"passed"}
    status = {entry["check"]: entry["status"] for entry in results}
    bad = [name for name in request["required"] if status.get(name) not in good]
    progress("end", bad=bad)
    return 1 if bad else 0


def _in_process(path: Path, name: str, limit_s: float) -> CheckResult:
    """One check in a process (and process group) of its own, killed at its limit."""
    read, write = os.pipe()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, str(HERE), "--request", str(path), "--check", name, "--fd", str(write)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[write],
            start_new_session=True,
        )
        os.close(write)
        late = finish(process, limit_s)
        with os.fdopen(read, "rb") as stream:
            answer = stream.read()
        log.seek(0)
        output = log.read().decode("utf-8", "replace")[-TAIL:]
    if late:
        return CheckResult(
            "timeout",
            f"did not end within {limit_s:g} s and was killed",
            detail=output,
            diagnosis="something hangs: a lock in a cache folder, a device that does not answer, a download",
            fix="run the check by hand in the image and look where it waits",
        )
    try:
        values = json.loads(answer)
    except ValueError:
        return CheckResult(
            "error",
            f"the check's process ended with {ending(process)} and no result",
            detail=output,
            diagnosis="a crash in native code, or the memory limit of the container",
            fix="look at the output under `detail`; raise --memory if the kernel ended it",
        )
    if values["status"] not in ("passed", "skipped") and output.strip():
        values["detail"] = "\n".join(filter(None, [values["detail"], output]))
    return CheckResult(**values)
