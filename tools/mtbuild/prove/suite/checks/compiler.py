"""A C compiler that Triton will find, a C++ compiler for torch inductor: both compile something that runs.

A name on PATH is not enough: without gcc's `cc1` the name is there and every compile fails.
"""

from __future__ import annotations

import ctypes

from result import CheckResult, Context, failed, passed
from toolchain import NO_COMPILER, build, c_compiler, cxx_compiler

ID = "compiler"
TIERS = ("cpu", "gpu")
LIMIT_S = 120

_C = "#include <stdio.h>\n#include <stdlib.h>\nint answer(int x) { return abs(x) + 2; }\n"
_CXX = """#include <algorithm>
#include <string>
extern "C" int answer(int x) { return std::max<int>(x + 2, std::string("a").size()); }
"""


def run(ctx: Context) -> CheckResult:
    """Compile, load and call a function, as C and as C++."""
    compiler = c_compiler()
    if compiler is None:
        return failed("no C compiler: neither CC, gcc nor clang runs", **NO_COMPILER)
    folder = ctx.fresh("compiler")
    for words, name, text in ((compiler, "probe.c", _C), (cxx_compiler(), "probe.cpp", _CXX)):
        if words is None:
            return failed(
                "there is a C compiler but no C++ compiler: neither CXX, g++ nor clang++ runs",
                diagnosis="torch inductor compiles CPU code with C++ (InvalidCxxCompiler)",
                fix="add g++ to the image",
            )
        source = folder / name
        source.write_text(text)
        library, output = build(words, source)
        if library is None:
            return failed(
                f"{' '.join(words)} is there but compiles nothing",
                detail=output,
                diagnosis="part of the compiler is missing (cc1, as, ld) or its headers are (libc6-dev)",
                fix="install gcc, g++ and libc6-dev from the distribution; don't copy single programs",
            )
        if ctypes.CDLL(str(library)).answer(5) != 7:
            return failed(
                f"what {' '.join(words)} compiled gives a wrong result",
                diagnosis="compiler and processor do not fit, or the compiler's wrapper changes flags",
                fix="use the distribution's own compiler",
            )
    return passed(f"{' '.join(compiler)} compiles C and C++ that runs", compiler__c=" ".join(compiler))
