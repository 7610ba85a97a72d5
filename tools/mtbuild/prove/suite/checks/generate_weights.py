"""With real checkpoints (`mtbuild smoke --weights DIR`): they verify, and a short video at 480p comes out.

What it records is what one wants to know of a model on a card: seconds to load, seconds a step, peak memory.
"""

from __future__ import annotations

import io
import logging
import shutil
from pathlib import Path

from result import CheckResult, Context, failed, passed, unsaid

ID = "generate.weights"
TIERS = ("cpu", "gpu")
LIMIT_S = 3600  # reading 90 GB from a network volume takes most of it

_FRAMES, _STEPS = 81, 8  # 3.2 seconds, in as many steps as the distilled models take
_CPU_FRAMES, _CPU_STEPS = 9, 2  # what a CPU can do is not worth measuring: here it shows that all of it works


def run(ctx: Context) -> CheckResult:
    """`mtmodels verify`, load, one job of the handler; video and contact sheet are kept."""
    given = ctx.request.get("weights")
    if given is None:
        return failed(
            "no weights are mounted",
            diagnosis="the check was asked for without a folder",
            fix="smoke with --weights DIR",
        )
    log = io.StringIO()
    logging.basicConfig(stream=log, level=logging.INFO, force=True)
    folder = ctx.fresh("weights")
    from generation import Size, Studio, Wrong, keep, look_at_file, look_at_frames

    gpu = ctx.tier == "gpu"
    size = Size(_FRAMES, _STEPS, 0, 0) if gpu else Size(_CPU_FRAMES, _CPU_STEPS, 0, 0)
    studio = Studio(folder, "cuda" if gpu else "cpu", weights=Path(given))
    facts: dict = {"seconds": studio.seconds, "frames": size.job_frames, "steps": size.job_steps}
    try:
        studio.prepare()
        video, result = studio.job(size)
        facts["video"] = look_at_file(video, result, size.job_frames)
        keep(ctx, "generate_weights", video, studio.frames)
        facts["picture"] = look_at_frames(studio.frames, size.job_frames)
        facts |= {name: result[name] for name in ("first_frame_s", "phases", "peak_bytes")}
        facts["step_s"] = round(result["phases"]["denoise"] / size.job_steps, 3)
        facts["warm_step_s"] = _warm_step_s(studio.reports)
    except Exception as error:
        wrong = isinstance(error, Wrong)
        return failed(
            unsaid(str(error) if wrong else f"{type(error).__name__}: {error}", log.getvalue())[:2000],
            detail=log.getvalue()[-4000:],
            diagnosis=error.diagnosis if wrong else "making a video with these weights fails in this image",
            fix="`mtmodels verify DIR` lists what is wrong with the files; see `detail` for the rest",
            **_named(facts),
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    seen = facts["video"]
    return passed(
        f"{seen['frames']} frames {seen['size'][0]}×{seen['size'][1]} with the weights given: "
        f"{facts['step_s']:.2f} s a step, peak {facts['peak_bytes'] / 2**30:.1f} GiB, "
        f"loaded in {studio.seconds['load_s']:.0f} s",
        **_named(facts),
    )


def _warm_step_s(reports: list) -> float | None:
    """Seconds a step without the first, which compiles kernels: from the progress that a caller sees."""
    steps = [(r["step"], r["elapsed_s"]) for r in reports if r.get("stage") == "denoise" and r.get("step")]
    if len(steps) < 2 or steps[-1][0] == steps[0][0]:
        return None
    return round((steps[-1][1] - steps[0][1]) / (steps[-1][0] - steps[0][0]), 3)


def _named(facts: dict) -> dict:
    return {f"generate_weights__{name}": value for name, value in facts.items()}
