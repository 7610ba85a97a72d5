"""Every kernel gives the reference's numbers under TRITON_INTERPRET=1: right on the CPU, before any GPU."""

from __future__ import annotations

import os
from importlib.util import find_spec

from result import CheckResult, Context, failed, passed

ID = "triton.interpret"
TIERS = ("cpu", "gpu")
LIMIT_S = 300


def run(ctx: Context) -> CheckResult:
    """Launch each in Triton's interpreter (numpy) and compare."""
    missing = [name for name in ("triton", "torch", "numpy") if find_spec(name) is None]
    if missing:
        return failed(
            f"{', '.join(missing)} not installed",
            diagnosis="Triton's interpreter runs kernels on torch tensors through numpy",
            fix="lock numpy (below 2) beside torch and triton",
        )
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before any import of one
    os.environ["TRITON_CACHE_DIR"] = str(ctx.fresh("interpret"))
    from kernels import all_kernels, error_of

    errors = {}
    for kernel in all_kernels():
        try:
            error, allowed = error_of(kernel, "cpu")
        except Exception as problem:
            text = f"{type(problem).__name__}: {problem}"
            return failed(f"{kernel.name} does not run in Triton's interpreter: {text}"[:500], **_cause(text))
        if error > allowed:
            return failed(
                f"{kernel.name} is off by {error:.3g} of the largest value; {allowed:.3g} is allowed",
                diagnosis="the kernel is wrong, or this Triton's interpreter reads it otherwise",
                fix="compare the kernel with its reference at the triton version of this cell",
            )
        errors[kernel.name] = error
    return passed(f"{len(errors)} kernels agree with their references", triton_interpret__error=errors)


def _cause(text: str) -> dict:
    """Why, as far as it is known. numpy 2.5 with Triton 3.6 was met on a real host."""
    if "0-dimensional arrays can be converted" in text:
        return {
            "diagnosis": "numpy is too new for Triton: its interpreter makes numbers of 1-element arrays",
            "fix": "lock numpy below 2, as MultiTalk needs anyway",
        }
    return {
        "diagnosis": "the kernel uses something that this Triton's interpreter does not know",
        "fix": "take the Triton that torch pins, or change the kernel",
    }
