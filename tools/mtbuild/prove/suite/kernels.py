"""The kernels that the Triton checks compile and run: the suite's own and, where present, wan's."""

from __future__ import annotations

import inspect
from importlib.util import find_spec

# Largest error allowed, relative to the largest value: two units in the last place of the output's type (a
# sum that is stored and then normalised is rounded twice), and for fp32 a longer sum's order
TOLERANCE = {"bfloat16": 2**-6, "float16": 2**-9, "float32": 2e-5, "float8_e4m3fn": 2**-3}


def all_kernels() -> list:
    """Every kernel; importing `wan.kernels` fails loudly, since an image that holds it must be able to."""
    from own_kernels import KERNELS

    found = list(KERNELS)
    if find_spec("wan") is not None and find_spec("wan.kernels") is not None:
        from wan import kernels as theirs

        found += theirs.KERNELS
    return found


def runs_on(kernel: object, capability: int) -> bool:
    """False for kernels that need what older capabilities (80 for 8.0) have not, such as fp8."""
    return capability >= getattr(kernel, "floor", 0)


def source(kernel: object) -> object:
    """What `triton.compile` takes, in the form of the installed Triton (the argument was renamed in 3.2)."""
    from triton.compiler import ASTSource

    names = list(kernel.fn.arg_names)
    if "constexprs" in inspect.signature(ASTSource.__init__).parameters:
        signature = {name: kernel.signature.get(name, "constexpr") for name in names}
        constexprs = {(names.index(name),): value for name, value in kernel.constexprs.items()}
        return ASTSource(fn=kernel.fn, signature=signature, constexprs=constexprs)
    try:
        return ASTSource(fn=kernel.fn, signature=dict(kernel.signature), constants=dict(kernel.constexprs))
    except (AssertionError, TypeError):  # 3.0 and 3.1 count arguments instead of naming them
        signature = {names.index(name): kind for name, kind in kernel.signature.items()}
        constants = {names.index(name): value for name, value in kernel.constexprs.items()}
        return ASTSource(fn=kernel.fn, signature=signature, constants=constants)


def compile_for(kernel: object, capability: int) -> object:
    """Ahead of time for one compute capability (90 for 9.0): no GPU, no driver, no C compiler."""
    import triton
    from triton.backends.compiler import GPUTarget

    return triton.compile(
        source(kernel), target=GPUTarget("cuda", capability, 32), options=dict(kernel.options)
    )


def error_of(kernel: object, device: str) -> tuple:
    """(relative error, tolerance) of one launch against the reference; a NaN counts as infinite."""
    import torch

    generator = torch.Generator(device=device).manual_seed(20)
    arguments, options = kernel.example(device, generator)
    want = kernel.reference(*arguments, **options)
    got = kernel.launch(*arguments, **options)
    worst, allowed = 0.0, TOLERANCE["float32"]
    pairs = zip(got, want) if isinstance(want, tuple) else [(got, want)]  # noqa: B905 - Python 3.9 has no strict
    for mine, theirs in pairs:
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            mine, theirs = ((str(tensor.dtype), tuple(tensor.shape)) for tensor in (mine, theirs))
            msg = f"{kernel.name} gives {mine}, its reference {theirs}"
            raise ValueError(msg)
        scale = theirs.float().abs().max().clamp_min(1e-12)
        error = ((mine.float() - theirs.float()).abs().max() / scale).item()
        worst = max(worst, error if error == error else float("inf"))
        allowed = max(allowed, TOLERANCE[str(theirs.dtype).removeprefix("torch.")])
    return worst, allowed
