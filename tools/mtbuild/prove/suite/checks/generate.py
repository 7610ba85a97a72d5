"""The image makes a talking-person video from a real job: on the CPU, with a tiny model of its own making."""

from __future__ import annotations

import io
import logging
import os
import shutil
from importlib.util import find_spec

from packages import not_installed
from result import CheckResult, Context, failed, passed, skipped, unsaid

ID = "generate"
TIERS = ("cpu", "gpu")
LIMIT_S = 600


def run(ctx: Context) -> CheckResult:
    """Tiny model → verify → a handler's job with default inputs → mp4 with sound; then comparisons."""
    return make(ctx, ID, "cpu", job=(21, 2), compared=(9, 1), must=("math",))


def make(
    ctx: Context, check: str, device: str, *, job: tuple, compared: tuple, must: tuple, more=None
) -> CheckResult:
    """The whole of it on one device. `job`, `compared`: frames and steps. `more(studio, comparison)` goes on
    and returns facts."""
    if find_spec("multitalk_runtime") is None or find_spec("wan") is None:
        if not ctx.request["runtime"]:
            return skipped("the image is not meant to hold the runtime")
        return not_installed("multitalk_runtime")
    log = io.StringIO()
    logging.basicConfig(stream=log, level=logging.INFO, force=True)
    folder = ctx.fresh("generate")
    os.environ["OMP_NUM_THREADS"] = (
        "1"  # of threads to come, the handler's among them; see generation.prepare
    )
    from comparison import Comparison
    from generation import Size, Studio, Wrong, keep, look_at_file, look_at_frames

    studio, size = Studio(folder, device), Size(*job, *compared)
    facts, comparison = {}, None
    try:
        studio.prepare()
        video, result = studio.job(size)
        facts["video"] = look_at_file(video, result, size.job_frames)
        keep(ctx, check.replace(".", "_"), video, studio.frames)
        facts["frames"] = look_at_frames(studio.frames, size.job_frames)
        facts["first_frame_s"], facts["phases"] = result["first_frame_s"], result["phases"]
        facts["peak_bytes"] = result["peak_bytes"]
        facts["attention_kernel"], facts["attention_module"] = kernel_of(result)
        comparison = Comparison(studio, size)
        with studio.timed("comparisons_s"):
            comparison.all(must)
        if more is not None:
            facts |= more(studio, comparison)
    except Exception as error:
        wrong = isinstance(error, Wrong)
        return failed(
            unsaid(str(error) if wrong else f"{type(error).__name__}: {error}", log.getvalue())[:500],
            detail="\n".join(filter(None, [log.getvalue()[-4000:], "" if wrong else _trace(error)])),
            diagnosis=error.diagnosis if wrong else "making a video with a tiny model fails in this image",
            fix="see `detail`; by hand, in the image: python3 -m multitalk_runtime.tiny /tmp/tiny, then "
            "generate_multitalk with its folders",
            **_facts(check, facts, studio, comparison),
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    seen = facts["video"]
    return passed(
        f"{seen['frames']} frames {seen['size'][0]}×{seen['size'][1]} at 25/s with sound by the handler; "
        f"first frame after {facts['first_frame_s']:.1f} s; attention: "
        f"{', '.join([_auto(facts['attention_kernel']), *comparison.ran])}",
        **_facts(check, facts, studio, comparison),
    )


def kernel_of(result: dict) -> tuple:
    """What attention "auto" was in a job: (kernel, the module it is from); None of a runtime that did not yet
    say so: images released before are smoked with this suite too."""
    return result.get("attention_kernel"), result.get("attention_module")


def _auto(kernel: str | None) -> str:
    return "auto" if kernel is None else f"auto ({kernel})"


def _facts(check: str, facts: dict, studio, comparison) -> dict:
    found = {**facts, "seconds": studio.seconds}
    if comparison is not None:
        found |= {"differences": comparison.measured, "not_here": comparison.notes}
    return {f"{check.replace('.', '_')}__{name}": value for name, value in found.items()}


def _trace(error: BaseException) -> str:
    import traceback

    return "".join(traceback.format_exception(type(error), error, error.__traceback__))[-3000:]
