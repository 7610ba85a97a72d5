"""The suite itself: its frame, and its checks run by this Python as they run in an image."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from suite_runner import CELL, Suite

from mtbuild.prove.report import CPU_CHECKS, GPU_CHECKS, WEIGHTS_CHECKS
from mtbuild.prove.smoke import SUITE


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return Suite(tmp_path)


# --- the frame ------------------------------------------------------------------------------------------


def test_host_and_suite_agree_on_what_there_is() -> None:
    listed = json.loads(
        subprocess.run([sys.executable, SUITE, "--list"], capture_output=True, text=True, check=True).stdout
    )
    both = {check["id"] for check in listed if check["tiers"] == ["cpu", "gpu"]}
    gpu = {check["id"] for check in listed if check["tiers"] == ["gpu"]}
    assert both == {*CPU_CHECKS, *WEIGHTS_CHECKS}
    assert gpu == set(GPU_CHECKS)
    files = {file.stem for file in (SUITE / "checks").glob("*.py")} - {"__init__"}
    assert files == {check["id"].replace(".", "_") for check in listed}
    limits = {check["id"]: check["limit_s"] for check in listed}
    assert 0 < limits.pop("generate.weights") <= 3600  # reads 90 GB
    assert all(0 < limit <= 600 for limit in limits.values())


def test_progress_is_live_and_the_report_answers_the_request(suite: Suite) -> None:
    report = suite.run("ldconfig", "disk")
    assert [line["event"] for line in suite.lines] == ["start", "check", "result", "check", "result", "end"]
    assert report["nonce"] == "0123456789abcdef"
    assert [result["check"] for result in report["results"]] == ["ldconfig", "disk"]
    assert report["facts"]["disk.cache_free"] > 0
    assert suite.exit_status == 0


def test_a_hung_check_is_killed_with_all_that_it_started(suite: Suite, tmp_path: Path) -> None:
    suite.add(
        "hangs",
        f"""
        import subprocess, time
        ID, TIERS, LIMIT_S = "hangs", ("cpu",), 5
        def run(ctx):
            child = subprocess.Popen(["sleep", "600"])
            open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
            time.sleep(600)
        """,
    )
    started = time.monotonic()
    report = suite.run("hangs", "ldconfig")
    assert time.monotonic() - started < 30
    assert report["results"][0]["status"] == "timeout"
    assert "within 5 s" in report["results"][0]["message"]
    assert report["results"][1]["status"] == "passed", "the next check still runs"
    assert suite.exit_status == 1
    state = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "signal 11"),
        ("import os; os._exit(7)", "status 7"),
        ("raise ValueError('odd')", "ValueError: odd"),
    ],
)
def test_a_crash_costs_one_result(suite: Suite, body: str, message: str) -> None:
    suite.add("breaks", f"ID, TIERS, LIMIT_S = 'breaks', ('cpu',), 20\ndef run(ctx):\n    {body}\n")
    result = suite.one("breaks")
    assert result["status"] == "error"
    assert message in result["message"]
    assert result["diagnosis"]
    assert result["fix"]


def test_a_check_of_another_tier_or_none_is_an_error(suite: Suite) -> None:
    report = suite.run("triton.jit", "no.such")
    assert {result["status"] for result in report["results"]} == {"error"}


def test_a_request_that_it_cant_read_is_status_2(suite: Suite, tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text('{"schema": 9}')
    done = subprocess.run(
        [sys.executable, suite.suite, "--request", tmp_path / "odd.json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "schema 9" in done.stderr


# --- compiler, headers, ldconfig, caches, disk, users: for real -----------------------------------------


def test_this_machines_compiler_and_headers_work(suite: Suite) -> None:
    report = suite.run("compiler", "headers", "ldconfig")
    assert [result["status"] for result in report["results"]] == ["passed"] * 3


def test_no_compiler(suite: Suite, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    env = {"PATH": str(tmp_path / "empty"), "CC": "", "CXX": ""}
    for check in ("compiler", "headers"):
        result = suite.one(check, env)
        assert result["status"] == "failed"
        assert "gcc" in result["fix"]
    assert suite.one("compiler", {"CC": "nope-cc"})["message"].startswith("no C compiler")


def test_a_compiler_that_is_only_a_name(suite: Suite, tmp_path: Path) -> None:
    fake = tmp_path / "gcc"
    fake.write_text("#!/bin/sh\necho \"gcc: fatal error: cannot execute 'cc1'\" >&2\nexit 1\n")
    fake.chmod(0o755)
    result = suite.one("compiler", {"CC": str(fake)})
    assert result["status"] == "failed"
    assert "compiles nothing" in result["message"]
    assert "cc1" in result["detail"]


def test_a_cache_that_cant_be_written(suite: Suite) -> None:
    result = suite.one("caches", {"TRITON_CACHE_DIR": "/proc/nope"})
    assert result["status"] == "failed"
    assert result["message"].startswith("TRITON_CACHE_DIR: /proc/nope can't be written")
    assert "1777" in result["fix"]


def test_users_tells_who_ran_and_that_the_root_is_open(suite: Suite) -> None:
    assert "was started as 7:8" in suite.one("users", user="7:8")["message"]
    result = suite.one("users")  # this machine is no hardened container
    assert result["status"] == "failed"
    assert result["message"].startswith(("has rights", "could write"))


# --- versions, xformers, wan: what an image may hold, by modules in their place -------------------------

TORCH = "__version__ = '2.7.1+cu126'\nclass version:\n    cuda = '12.6'\n"


def distribution(suite: Suite, name: str, version: str, requires: str = "") -> None:
    folder = suite.folder / "site" / f"{name}-{version}.dist-info"
    folder.mkdir(parents=True)
    need = f"Requires-Dist: {requires}\n" if requires else ""
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{need}")


def installed(suite: Suite, torch: str = "2.7.1", module: str = TORCH) -> None:
    distribution(suite, "torch", torch)
    suite.module("torch", module)
    distribution(suite, "triton", "3.3.1")
    suite.module("triton", "__version__ = '3.3.1'\n")


def test_versions_are_compared_with_the_cell(suite: Suite) -> None:
    installed(suite)
    distribution(suite, "xformers", "0.0.31")
    assert suite.one("versions", cell=CELL)["status"] == "passed"
    assert suite.one("versions", cell={**CELL, "triton": "3.3.1.0"})["status"] == "passed"
    wrong = suite.one("versions", cell={**CELL, "torch": "2.8.0", "cuda": "12.8"})
    assert wrong["status"] == "failed"
    assert "the cell has torch 2.8.0, the image 2.7.1" in wrong["message"]
    assert "the cell has cuda 12.8, the image 12.6" in wrong["message"]


def test_a_torch_that_is_not_what_its_metadata_says(suite: Suite) -> None:
    installed(suite, torch="2.8.0")
    result = suite.one("versions")
    assert result["status"] == "failed"
    assert "metadata says 2.8.0, torch.__version__ says 2.7.1+cu126" in result["message"]


PINNED = {**CELL, "packages": {"fa3-fwd": "0.0.2"}}


def flash3(suite: Suite, version: str, code: str) -> None:
    """fa3-fwd as its wheel is: two modules, and a folder with nothing but a library."""
    distribution(suite, "fa3_fwd", version)
    suite.module("fa3_fwd_interface", code)
    suite.module("fa3_fwd_config", "CONFIG = {}")
    names = ("fa3_fwd_interface.py", "fa3_fwd_config.py", "fa3_fwd/_C.abi3.so")
    record = suite.folder / f"site/fa3_fwd-{version}.dist-info/RECORD"
    record.write_text("".join(f"{name},,\n" for name in names))


def test_a_further_pin_is_there_and_imports(suite: Suite) -> None:
    installed(suite)
    distribution(suite, "xformers", "0.0.31")
    flash3(suite, "0.0.2", "def flash_attn_func(): ...")
    report = suite.run("versions", cell=PINNED)
    assert report["results"][0]["status"] == "passed"
    assert "fa3-fwd 0.0.2" in report["results"][0]["message"]
    assert report["facts"]["versions.fa3_fwd"] == "0.0.2"


@pytest.mark.parametrize(
    ("version", "code", "message"),
    [
        ("0.0.3", "", "the cell has fa3-fwd 0.0.2, the image 0.0.3"),
        (None, "", "the cell has fa3-fwd 0.0.2, the image none"),
        (
            "0.0.2",
            "raise OSError('libcudart.so.12: cannot open shared object file')",
            "fa3-fwd 0.0.2 is installed and does not import: fa3_fwd_interface: OSError: libcudart.so.12",
        ),
    ],
)
def test_a_further_pin_that_would_be_passed_over_in_silence(
    suite: Suite, version: str | None, code: str, message: str
) -> None:
    installed(suite)
    distribution(suite, "xformers", "0.0.31")
    if version is not None:
        flash3(suite, version, code)
    result = suite.one("versions", cell=PINNED)
    assert result["status"] == "failed"
    assert message in result["message"]


STAYS = """
import subprocess, threading, time
subprocess.Popen(["sleep", "300"])
threading.Thread(target=time.sleep, args=(300,)).start()
"""
RAISES = "raise RuntimeError('No CUDA GPUs are available')"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "fa3-fwd 0.0.2 has no list of its files (RECORD)"),
        ({"native.cpython-311-x86_64-linux-gnu.so": "garbage"}, "native: "),
        (
            {"kernels/__init__.py": "raise ImportError('no such kernel')"},
            "kernels: ImportError: no such kernel",
        ),
        ({"fa3.py": "import os; os.abort()"}, "importing ended the process with signal 6"),
        ({"fa3.py": "import ctypes; ctypes.CDLL('libno.so.12')"}, "fa3: OSError: libno.so.12: cannot open"),
    ],
)
def test_a_further_pin_is_really_imported(suite: Suite, files: dict[str, str] | None, message: str) -> None:
    """Also where a module is called like one of the suite's own (`kernels` is a name on the index)."""
    result = pinned(suite, files)
    assert result["status"] == "failed"
    assert message in result["message"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"fa3/data.bin": ""}, "fa3-fwd 0.0.2 (not imported: it holds no module)"),
        (
            {"fa3.py": "print('hello')", "tests/__init__.py": RAISES, "setup.py": "raise SystemExit(1)"},
            "0.0.2",
        ),
        ({"fa3.py": RAISES}, "does not import without a GPU: fa3: RuntimeError: No CUDA GPUs"),
        (
            {"fa3.py": "open('/proc/driver/nvidia/no')"},
            "without a GPU: fa3: FileNotFoundError",
        ),
        ({"fa3.py": "raise OSError('libnvidia-ml.so.1: cannot open')"}, "does not import without a GPU"),
        ({"fa3.py": STAYS, "libfa3.so": "not a module"}, "fa3-fwd 0.0.2"),
        ({"fa3.py": "raise ImportError('libcuda.so.1: cannot open')"}, "does not import without a GPU"),
    ],
)
def test_a_further_pin_that_nothing_can_be_said_against(
    suite: Suite, files: dict[str, str], message: str
) -> None:
    result = pinned(suite, files)
    assert result["status"] == "passed", result
    assert message in result["message"]


def pinned(suite: Suite, files: dict[str, str] | None) -> dict[str, Any]:
    """The check's result for an fa3-fwd of these files; None: without a list of them."""
    installed(suite)
    distribution(suite, "xformers", "0.0.31")
    distribution(suite, "fa3_fwd", "0.0.2")
    for name, text in (files or {}).items():
        file = suite.folder / "site" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    if files is not None:
        record = suite.folder / "site/fa3_fwd-0.0.2.dist-info/RECORD"
        record.write_text("".join(f"{name},,\n" for name in files))
    return suite.one("versions", cell=PINNED)


def test_versions_are_compared_as_versions(suite: Suite) -> None:
    suite.add(
        "compares",
        """
        from pins import same_release
        from result import passed
        ID, TIERS, LIMIT_S = "compares", ("cpu",), 20
        PAIRS = [("2.2", "2.2.0"), ("2.2.0+cu126", "2.2"), ("2.8.3.post1", "2.8.3.post1"), ("2.2", "2.2.1"),
                 ("3.0.0.b1", "3.0b1"), ("1.0-1", "1.0.post1"), ("1.0-alpha", "1.0a"),
                 ("2.20", "2.2"), ("2.8.3.post1", "2.8.3"), ("1.0rc1", "1.0")]
        def run(ctx):
            return passed("", same=[same_release(*pair) for pair in PAIRS])
        """,
    )
    assert suite.run("compares")["facts"]["same"] == [True] * 3 + [False] + [True] * 3 + [False] * 3


def test_a_triton_that_does_not_import_is_a_failure_in_its_words(suite: Suite) -> None:
    """3.2.0 without setuptools, as the first image of t260 showed."""
    installed(suite)
    suite.module("triton", "import setuptools_that_is_not_there")
    result = suite.one("versions", cell={**CELL, "xformers": None})
    assert result["status"] == "failed"
    assert "triton 3.3.1 is installed and does not import: ModuleNotFoundError" in result["message"]


def test_flash_attn_3_that_a_cell_pins_must_run_on_a_hopper(suite: Suite) -> None:
    suite.add(
        "judges",
        """
        from checks.generate import kernel_of
        from checks.generate_gpu import missing_flash3
        from result import passed
        ID, TIERS, LIMIT_S = "judges", ("cpu",), 20
        def run(ctx):
            cudnn, own = ("cudnn", "torch"), ("flash_attn_3", "fa3_fwd_interface")
            copy, old = ("flash_attn_3", "xformers.ops.fmha.flash3"), kernel_of({})
            bad = [missing_flash3(ctx.cell, (9, 0), ran) for ran in (cudnn, copy, old)]
            good = [missing_flash3(ctx.cell, (9, 0), own), missing_flash3(ctx.cell, (8, 9), cudnn),
                    missing_flash3({"name": "no pins"}, (9, 0), old), missing_flash3(None, (9, 0), cudnn)]
            return passed("", bad=bad, good=good)
        """,
    )
    facts = suite.run("judges", cell=PINNED)["facts"]
    assert [said.rpartition(": ")[2] for said in facts["bad"]] == [
        "it took cudnn of torch",
        "it took flash_attn_3 of xformers.ops.fmha.flash3",
        "the runtime does not say what it took",
    ]
    assert facts["good"] == [""] * 4


def test_a_foreign_image_is_recorded_not_compared(suite: Suite) -> None:
    installed(suite)
    report = suite.run("versions", "xformers.extension", "imports.wan", runtime=False)
    assert report["results"][0]["status"] == "passed"
    assert report["facts"]["versions.cuda"] == "12.6"


XFORMERS = """
import logging
_has_cpp_library = {loaded}
class _cpp_lib:
    _cpp_library_load_exception = {error}
    class _build_metadata:
        torch_version = {built!r}
if not {loaded}:
    _cpp_lib._build_metadata = None
    logging.getLogger("xformers").warning("xFormers can't load C++/CUDA extensions. built for: …")
"""


def xformers(
    suite: Suite,
    *,
    built: str,
    loaded: bool,
    operators: tuple[str, ...],
    requires: str = "torch==2.7.1",
    ops: str | None = None,
    linker: str = "_C.so: undefined symbol: _ZNK5torch8autograd4Node4nameEv",
    common: str = "_built_with_cuda = False\n",
) -> None:
    """A package in the state that matrix.md §2.2 recorded for real wheels."""
    installed(suite)
    distribution(suite, "xformers", "0.0.31", requires)
    folder = suite.folder / "site/xformers"
    (folder / "ops/fmha").mkdir(parents=True)
    error = "None" if loaded else f"OSError({linker!r})"
    (folder / "__init__.py").write_text(XFORMERS.format(loaded=loaded, error=error, built=built))
    (folder / "cpp_lib.json").write_text(json.dumps({"version": {"torch": built, "cuda": 1206}}))
    kinds = (f"type('Op', (), dict(NAME={name!r}, is_available=lambda: True))" for name in operators)
    (folder / "ops/__init__.py").write_text(ops or "from . import fmha\n")
    (folder / "ops/fmha/common.py").write_text(common)
    (folder / "ops/fmha/__init__.py").write_text(f"ALL_FW_OPS = [{', '.join(kinds)}]\n")


def test_xformers_that_is_active(suite: Suite) -> None:
    xformers(suite, built="2.7.1+cu126", loaded=True, operators=("cutlassF-pt", "fa2F"))
    assert suite.one("xformers.extension", cell=CELL)["status"] == "passed"


def test_xformers_for_another_torch_that_only_warns(suite: Suite) -> None:
    xformers(suite, built="2.1.2+cu121", loaded=False, operators=())
    result = suite.one("xformers.extension", cell=CELL)
    assert result["status"] == "failed"
    assert "built for PyTorch 2.1.2+cu121" in result["message"]
    assert "this image has 2.7.1+cu126" in result["message"]
    assert "undefined symbol: _ZNK5torch8autograd4Node4nameEv" in result["diagnosis"]
    assert "mtbuild suggest --torch 2.7.1" in result["fix"]


def test_xformers_for_another_patch_level_that_loads_in_silence(suite: Suite) -> None:
    xformers(suite, built="2.7.0+cu126", loaded=True, operators=("cutlassF-pt",), requires="torch==2.7.0")
    result = suite.one("xformers.extension", cell=CELL)
    assert result["status"] == "failed"
    assert "built for PyTorch 2.7.0+cu126; this image has 2.7.1+cu126" in result["message"]


def test_xformers_on_torchs_stable_abi_may_be_older(suite: Suite) -> None:
    xformers(suite, built="2.6.0+cu126", loaded=True, operators=("cutlassF-pt",), requires="torch>=2.6")
    assert suite.one("xformers.extension", cell=CELL)["status"] == "passed"


CUDART = "libcudart.so.12: cannot open shared object file"


def test_xformers_that_lists_pytorchs_operators_but_refuses_cuda(suite: Suite) -> None:
    """0.0.35 with a torch for CUDA 13, as an H200 showed (docs/evidence/t211)."""
    xformers(suite, built="2.10.0+cu128", loaded=False, operators=("cutlassF-pt",), linker=CUDART)
    result = suite.one("xformers.extension", cell=CELL)
    assert result["status"] == "failed"
    assert CUDART in result["diagnosis"]
    assert (
        "NotImplementedError" in result["diagnosis"]
    )  # what xFormers' dispatcher raises: users search for it


def test_xformers_whose_attention_is_pytorchs_own_is_degraded(suite: Suite) -> None:
    """A release whose dispatcher does not ask for the extension."""
    xformers(suite, built="2.10.0+cu128", loaded=False, operators=("fa2F-pt",), linker=CUDART, common="")
    result = suite.one("xformers.extension", cell=CELL)
    assert result["status"] == "degraded"
    assert suite.exit_status == 1
    assert CUDART in result["diagnosis"]
    suite.one("xformers.extension", cell=CELL, allow_degraded=True)
    assert suite.exit_status == 0


def test_xformers_whose_ops_do_not_import(suite: Suite) -> None:
    ops = "raise ImportError('libcudart.so.12: cannot open shared object file')"
    xformers(suite, built="2.7.1+cu126", loaded=True, operators=(), ops=ops)
    result = suite.one("xformers.extension", cell=CELL)
    assert result["status"] == "failed"
    assert result["message"].startswith("import xformers.ops fails")


def test_xformers_that_is_loaded_but_has_no_attention(suite: Suite) -> None:
    xformers(suite, built="2.7.1+cu126", loaded=True, operators=())
    assert "no memory-efficient attention" in suite.one("xformers.extension", cell=CELL)["message"]


def test_xformers_that_is_missing_or_not_asked_for(suite: Suite) -> None:
    installed(suite)
    assert suite.one("xformers.extension", cell={**CELL, "xformers": None})["status"] == "skipped"
    assert suite.one("xformers.extension", cell=CELL)["status"] == "failed"


def test_wan_with_a_name_that_is_not_there(suite: Suite) -> None:
    """V71.1: cannot import name 'configs'."""
    folder = suite.folder / "site/wan"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("__all__ = ['configs']\n")
    (folder / "multitalk.py").write_text("from wan import configs\n")
    result = suite.one("imports.wan", runtime=True)
    assert result["status"] == "failed"
    assert "2 of 2 modules" in result["message"]
    assert "cannot import name 'configs'" in result["detail"]


# --- Triton, for real, with what this environment has ---------------------------------------------------


@pytest.mark.slow
def test_triton_compiles_interprets_and_builds_a_launcher(suite: Suite) -> None:
    report = suite.run("triton.aot", "triton.interpret", "triton.stub", cell=CELL)
    assert {result["check"]: result["status"] for result in report["results"]} == {
        "triton.aot": "passed",
        "triton.interpret": "passed",
        "triton.stub": "passed",
    }, report["results"]
    facts = report["facts"]
    assert facts["triton_aot.cache_was_empty"] is True
    assert facts["triton_aot.cubin_bytes"]["suite.matmul@9.0"] > 1000
    assert {"suite.add", "suite.matmul", "layer_norm"} <= set(facts["triton_aot.kernels"])


@pytest.mark.slow
def test_triton_says_v72s_words_without_a_compiler(suite: Suite, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = suite.one("triton.stub", {"PATH": str(tmp_path / "empty")}, cell=CELL)
    assert result["status"] == "failed"
    assert result["message"].startswith("Failed to find C compiler. Please specify via CC")
    assert "V72" in result["diagnosis"]


def test_a_capability_that_triton_does_not_know(suite: Suite) -> None:
    result = suite.one("triton.aot", cell={**CELL, "targets": ["99.9"]})
    assert result["status"] == "failed"
    assert "for 99.9" in result["message"]
