"""The suite's check `versions`: what is installed is what the cell says, further pins included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from suite_runner import CELL, Suite, distribution, installed


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return Suite(tmp_path)


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
            import sys
            with_packaging = [same_release(*pair) for pair in PAIRS]
            sys.modules["packaging.version"] = None  # as in an image that lacks it
            return passed("", same=with_packaging, spelled=[same_release(*pair) for pair in PAIRS])
        """,
    )
    facts = suite.run("compares")["facts"]
    assert facts["same"] == [True] * 3 + [False] + [True] * 3 + [False] * 3
    assert facts["spelled"] == [False, False, True] + [False] * 7


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
