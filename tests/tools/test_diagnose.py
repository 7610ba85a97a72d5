"""`diagnose`: every known failure by its real text, told once, with what to do; nothing where all is well."""

# ruff: noqa: E501 - log lines stand as they were met
from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtbuild.diagnose import Signature, diagnose, signatures

if TYPE_CHECKING:
    from pathlib import Path

# The texts of the references, as they were met, beside the row that must name them.
BUILD_ANCHORS = {
    "RuntimeError: Failed to find C compiler. Please specify via CC environment variable.": "compiler-missing",
    "ImportError: libcudart.so.12: cannot open shared object file: No such file": "cudart-other-major",
    "flash_attn_2_cuda.so: undefined symbol: _ZN2at4_ops15to_dtype_layout4callE": "undefined-symbol",
    "_C.so: undefined symbol: _ZN3c104cuda9SetDeviceEab": "undefined-symbol",
    "xFormers can't load C++/CUDA extensions. xFormers was built for:": "xformers-other-torch",
    "A matching Triton is not available, some optimizations will not be enabled": "triton-not-matching",
    "RuntimeError: CUDA error: no kernel image is available for execution on the device": "no-kernel-image",
    "NVIDIA GeForce RTX 5090 with CUDA capability sm_120 is not compatible with the current PyTorch "
    "installation.": "no-kernel-image",
    "RuntimeError: Triton Error [CUDA]: device kernel image is invalid": "kernel-image-invalid",
    "nvidia-container-cli: requirement error: unsatisfied condition: cuda>=12.8, please update": "require-cuda",
    "nvidia-container-cli: requirement error: unsatisfied condition: cuda>=13.3, please": "require-cuda-toolkit-bug",
    "this build requires NVIDIA driver >= 580": "driver-too-old",
    "torch 2.4.1+cu124, expected 2.8.0": "other-torch-installed",
    "ERROR: nvidia/cuda:12.1.0-base: manifest unknown: manifest unknown": "manifest-unknown",
    "toomanyrequests: You have reached your pull rate limit.": "rate-limit",
    "published digest sha256:01 differs from the tested digest sha256:02": "digest-changed",
    "#31 importing to docker 1840.2s done": "load-stalls",
}
MATRIX_32 = {
    "RuntimeError: Failed to find C compiler. Please specify via CC environment variable or set "
    "triton.knobs.build.impl.": "compiler-missing",
    "FileNotFoundError: [Errno 2] No such file or directory: 'nope-cc'": "compiler-misnamed",
    "main.c:1:10: fatal error: Python.h: No such file or directory": "python-headers-missing",
    'AssertionError: libcuda.so cannot found!\nPlease make sure GPU is set up and then run "/sbin/ldconfig"': (
        "libcuda-missing"
    ),
    "/usr/bin/ld: cannot find -lcuda: No such file or directory": "lcuda-not-found",
    "FileNotFoundError: [Errno 2] No such file or directory: '/sbin/ldconfig'": "ldconfig-missing",
    "RuntimeError: 0 active drivers ([]). There should only be one.": "no-active-driver",
    "RuntimeError: Cannot find ptxas": "ptxas-missing",
    "RuntimeError: Cannot find ptxas-blackwell": "ptxas-missing",
    "PermissionError: [Errno 13] Permission denied: '/x/triton/backends/nvidia/bin/ptxas'": "ptxas-not-executable",
    "triton.runtime.errors.PTXASError: PTXAS error: Internal Triton PTX codegen error\n"
    "ptxas-blackwell fatal   : Value 'sm_103a' is not defined for option 'gpu-name'": "ptxas-too-old",
    "OSError: [Errno 30] Read-only file system: '/home/me/.triton'": "cache-readonly",
    "FileNotFoundError: [Errno 2] No such file or directory: '/proc/nope'": "cache-not-creatable",
    "ImportError: /tmp/x/cuda_utils.so: failed to map segment from shared object": "cache-noexec",
    "torch._inductor.exc.InductorError: InvalidCxxCompiler: No working C++ compiler found in "
    "torch._inductor.config.cpp.cxx: (None, 'g++')": "cxx-missing",
}
ENGINE = {
    "CalledProcessError: Command '['gcc', '/tmp/a/cuda_utils.c', '-O3']' returned non-zero exit status 1.": "gcc-broken",
    "PermissionError: [Errno 13] Permission denied: '/cache/triton'": "cache-permission",
    "CalledProcessError: Command '['/sbin/ldconfig', '-p']' returned non-zero exit status 1.": "ldconfig-fails",
    "push-by-digest is currently not implemented for docker driver": "push-by-digest",
}
KNOWN = {**BUILD_ANCHORS, **MATRIX_32, **ENGINE}

V72_RUN = """\
\x1b[33mWARNING[XFORMERS]: xFormers can't load C++/CUDA extensions. xFormers was built for:\x1b[0m
    PyTorch 2.1.2+cu121 with CUDA 1201 (you have 2.7.1+cu126)
    Python  3.11.7 (you have 3.11.7)
  Please reinstall xformers (see https://github.com/facebookresearch/xformers#installing-xformers)
loading weights\r 10%\r100%
Traceback (most recent call last):
  File "/app/handler.py", line 12, in <module>
RuntimeError: Failed to find C compiler. Please specify via CC environment variable.
Traceback (most recent call last):
RuntimeError: Failed to find C compiler. Please specify via CC environment variable.
"""

FINE = """\
#12 [base 4/9] RUN apt-get install -y gcc g++ libc6-dev
#12 DONE 12.3s
#25 exporting layers 31.0s done
#25 pushing manifest for 127.0.0.1:5100/mt-staging:bld-0123456789ab
torch 2.7.1+cu126 xformers 0.0.31 triton 3.3.1
driver 570.86 supports CUDA 12.8
✓ triton.aot  0.65 s
epoch 100: loss 0.13
"""


def mtbuild(*words: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from mtbuild.cli import main; main()", "diagnose", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, input=text, timeout=60)


@pytest.mark.parametrize("text", KNOWN)
def test_every_known_text_is_named_by_its_row_alone(text: str) -> None:
    assert [one.signature for one in diagnose(f"before\n{text}\nafter\n")] == [KNOWN[text]]


@pytest.mark.parametrize("row", signatures(), ids=lambda row: row.id)
def test_a_row_names_its_own_example_and_says_what_to_do(row: Signature) -> None:
    (found,) = diagnose(row.example)
    assert found.signature == row.id
    assert len(found.cause) > 30
    assert len(found.fix) > 15
    assert found.source
    assert "{" not in found.cause + found.fix


def test_rows_have_names_of_their_own_and_give_way_to_rows_that_exist() -> None:
    ids = [row.id for row in signatures()]
    assert len(set(ids)) == len(ids)
    assert {other for row in signatures() for other in row.unless} <= set(ids)


def test_a_whole_log_gives_its_failures_in_order_with_their_lines() -> None:
    xformers, compiler = diagnose(V72_RUN)
    assert (xformers.signature, xformers.line) == ("xformers-other-torch", 1)
    assert "built for PyTorch 2.1.2+cu121, the image has 2.7.1+cu126" in xformers.cause
    assert (compiler.signature, compiler.count) == ("compiler-missing", 2)
    assert compiler.quote.startswith("RuntimeError: Failed to find C compiler")
    assert V72_RUN.replace("\r", "\n").splitlines()[compiler.line - 1] == compiler.quote


def test_the_exact_row_silences_the_general_one() -> None:
    log = (
        "main.c:1:10: fatal error: Python.h: No such file or directory\n"
        "subprocess.CalledProcessError: Command '['/usr/bin/gcc', 'main.c']' returned non-zero exit status 1.\n"
    )
    assert [one.signature for one in diagnose(log)] == ["python-headers-missing"]


def test_a_log_without_failures_has_none() -> None:
    assert diagnose(FINE) == ()
    assert diagnose("") == ()


@given(st.text())
def test_any_text_is_read(text: str) -> None:
    for found in diagnose(text):
        assert 1 <= found.line <= text.count("\n") + text.count("\r") + 1


def test_the_command_reads_a_file_and_standard_input(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    log.write_text(V72_RUN)
    done = mtbuild(str(log))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1. xformers-other-torch, line 1\n")
    assert "   fix:    " in done.stdout
    piped = mtbuild("-", "--json", text=V72_RUN)
    assert piped.returncode == 0
    document = json.loads(piped.stdout)
    assert document["schema"] == 1
    assert [one["signature"] for one in document["diagnoses"]] == ["xformers-other-torch", "compiler-missing"]


def test_an_unknown_failure_is_exit_code_1_and_a_missing_file_2(tmp_path: Path) -> None:
    done = mtbuild("-", text=FINE)
    assert done.returncode == 1
    assert "nothing known in it" in done.stdout
    missing = mtbuild(str(tmp_path / "none.log"))
    assert missing.returncode == 2
    assert "none.log" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_bytes_that_are_no_text_are_read_all_the_same(tmp_path: Path) -> None:
    log = tmp_path / "raw.log"
    log.write_bytes(b"\xff\xfe\x00\n" + V72_RUN.encode())
    assert mtbuild(str(log)).returncode == 0
