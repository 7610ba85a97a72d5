"""The suite's check `xformers.extension`, by packages in the states that real wheels were seen in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from suite_runner import CELL, Suite, distribution, installed


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return Suite(tmp_path)


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
    # what xFormers' dispatcher raises, named because users search for it
    assert "NotImplementedError" in result["diagnosis"]


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
