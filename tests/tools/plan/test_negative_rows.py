"""Every row N1–N22 of the reject list, judged by the rules over facts recorded from the real index."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import pytest
import recorded
from recorded import CELLS, FLASH3, NEGATIVE, POSITIVE, V72

from mtbuild.plan.compat import is_buildable, judge, state_of
from mtbuild.plan.facts import CellFacts, gather, gather_all
from mtbuild.plan.index import Index
from mtbuild.plan.wheels import Wheels

if TYPE_CHECKING:
    from pathlib import Path

# row → (rule that names it, words of the message, words of the quoted source, words of the fix)
EXPECTED = {
    "N1": ("requires-dist", "xformers 0.0.23.post1 requires torch==2.1.2; this cell has torch 2.7.1",
           "Requires-Dist: torch ==2.1.2", "xformers 0.0.31"),
    "N2": ("compiler", "Failed to find C compiler. Please specify via CC environment variable.",
           "build.py", "compiler: true"),
    "N3": ("requires-dist", "xformers 0.0.34 requires torch==2.10.0; this cell has torch 2.13.0",
           "Requires-Dist: torch==2.10.0", "0.0.35 with `allow: [degraded]`"),
    "N4": ("requires-dist", "xformers 0.0.35 requires torch>=2.10; this cell has torch 2.7.1",
           "Requires-Dist: torch>=2.10", "xformers 0.0.31"),
    "N5": ("requires-dist", "torch 2.7.1 requires triton==3.3.1; this cell has triton 3.4.0",
           "Requires-Dist: triton==3.3.1", "triton==3.3.1"),
    "N6": ("tags", "torch 2.1.2 has no wheel for Python 3.12 (cp312)", "3.8, 3.9, 3.10, 3.11",
        "take Python 3.11"),
    "N7": ("tags", "torch 2.15.0 has no wheel for Python 3.10 (cp310)", "3.11, 3.12",
        "take Python 3.11, or a torch that has wheels for 3.10: 2.14.1"),
    "N8": ("tags", "torch 2.7.1 has no wheel for Python 3.14 (cp314)", "3.9, 3.10, 3.11, 3.12, 3.13", "3.13"),
    "N9": ("tags", "xformers 0.0.30 has no wheel for Python 3.13 (cp313)", "3.9, 3.10, 3.11, 3.12",
        "Python 3.12"),
    "N10": ("tags", "numpy <2 has no wheel for Python 3.13", "3.12", "Python 3.12"),
    "N11": ("platform",
        "torch 2.7.1 has no wheel for glibc 2.17 of base centos7 (platform tag manylinux_2_17_x86_64)",
            "manylinux_2_28_x86_64", "2.28"),
    "N12": ("tags", "flash-attn 2.8.3.post2 has no wheel", "source only", "leave it out"),
    "N13": ("cudart", "xformers 0.0.33 needs libcudart.so.13, but torch 2.9.0+cu128 brings libcudart.so.12",
            "NEEDED libcudart.so.13", "xformers 0.0.33.post1"),
    "N14-2.11": ("cudart", "needs libcudart.so.12, but torch 2.11.0+cu130 brings libcudart.so.13",
                 "NEEDED libcudart.so.12", "torch 2.10.0"),
    "N14-2.12": ("cudart", "attention runs by PyTorch's operators", "NEEDED libcudart.so.12",
        "allow: [degraded]"),
    "N14-2.13": ("cudart", "attention runs by PyTorch's operators", "NEEDED libcudart.so.12",
        "allow: [degraded]"),
    "N14-2.14": ("cudart", "attention runs by PyTorch's operators", "NEEDED libcudart.so.12",
        "allow: [degraded]"),
    "N14-2.15": ("cudart", "but torch 2.15.0+cu132 brings libcudart.so.13", "cuda = '13.2'", "torch 2.10.0"),
    "N15": ("placeholder", "mslk 0.0.0 is an empty placeholder, and xformers 0.0.35.dev1147 requires mslk",
            "nothing in RECORD", "does not need it"),
    "N15-pinned": ("placeholder", "flash-attn-3 0.0.0 is an empty placeholder, and this cell pins it",
                   "1515 bytes", "leave flash-attn-3 out"),
    "N16-B200": ("gpu-architectures", "torch 2.7.1+cu126 has no machine code for target 10.0", "5.0 6.0 7.0",
                 "torch 2.8.0 or later"),
    "N16-5090": ("gpu-architectures", "no machine code for RTX 5090 (12.0)", "5.0 6.0 7.0",
        "torch 2.8.0 or later"),
    "N17": ("flash-attn-window",
        "xformers 0.0.31 accepts flash-attn >=2.7.1,<=2.8.0; with 2.8.3 it fails at import",
            "FLASH_VER_LAST = (2, 8, 0)", "flash-attn >=2.7.1,<=2.8.0"),
    "N18": ("gpu-architectures", "torch 2.11.0+cu130 has no machine code for target 7.0", "7.5 8.0",
            "torch 2.10.0 or earlier"),
    "N19": ("driver", "NVIDIA A100 has driver 570.86, but CUDA 13.0 with triton 3.7.1 needs 580 or newer",
            "CUDA Compatibility", "580 or newer"),
    "N20-first": ("attention-schema", "does not know aten::_flash_attention_forward of torch 2.7.1+cu126",
                  "Tensor philox_seed", "xformers 0.0.31"),
    "N20-last": ("attention-schema", "xformers 0.0.29.post3 does not know aten::_flash_attention_forward",
                 "Tensor rng_state", "xformers 0.0.32"),
    "N21": ("numpy", "numpy 2.2.6 does not go with torch 2.1.2: numpy<2 is needed", "no numpy bound", '"<2"'),
    "N22-2.2.2": ("marker", "torch 2.2.2 does not bring triton on Python 3.12", 'python_version < "3.12"',
        "newer torch"),
    "N22-2.3.1": ("marker", "torch 2.3.1 does not bring triton on Python 3.12", 'python_version < "3.12"',
        "newer torch"),
}  # fmt: skip

# The same for flash-attn 3's forward as a package of its own: its wheels ask for no torch in particular.
FLASH3_EXPECTED = [
    ("fa3-for-13-on-12", "cudart",
     "fa3-fwd 0.0.3 needs libcudart.so.13, but torch 2.10.0+cu128 brings libcudart.so.12: it can't be loaded",
     "fa3_fwd/_C.abi3.so: NEEDED libcudart.so.13", "fa3-fwd 0.0.2"),
    ("fa3-for-13-on-12", "torch-floor",
     "fa3-fwd 0.0.3 has native code for torch 2.11 or later, which does not load in torch 2.10.0+cu128",
     "torch_dtype_float8_e8m0fnu", "fa3-fwd 0.0.2"),
    ("fa3-for-12-on-13", "cudart",
     "fa3-fwd 0.0.2 needs libcudart.so.12, but torch 2.11.0+cu130 brings libcudart.so.13: it can't be loaded",
     "fa3_fwd/_C.abi3.so: NEEDED libcudart.so.12", "fa3-fwd 0.0.3"),
    ("fa3-too-new", "torch-floor",
     "fa3-fwd 0.0.2 has native code for torch 2.10 or later, which does not load in torch 2.9.1+cu128",
     "torch_call_dispatcher", "fa3-fwd 0.0.1"),
    ("fa3-none-fits", "torch-floor",
     "fa3-fwd 0.0.2 has native code for torch 2.10 or later, which does not load in torch 2.8.0+cu128",
     "torch_call_dispatcher", "leave fa3-fwd out"),
]  # fmt: skip


@lru_cache(maxsize=1)
def facts() -> dict[str, CellFacts]:
    return recorded.load()


@pytest.fixture(scope="session", autouse=True)
def _record(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    if request.config.getoption("--update"):
        cache = tmp_path_factory.mktemp("facts")
        wheels = Wheels(Index.from_environment(cache=cache), cache)
        recorded.save(gather_all(list(CELLS.values()), wheels))
        facts.cache_clear()


def test_every_row_is_here() -> None:
    assert {name.partition("-")[0] for name in EXPECTED} == {f"N{number}" for number in range(1, 23)}
    assert EXPECTED.keys() == NEGATIVE.keys()


@pytest.mark.parametrize("row", sorted(EXPECTED))
def test_row_is_refused_for_its_reason(row: str) -> None:
    rule, message, source, fix = EXPECTED[row]
    cell = NEGATIVE[row]
    findings = judge(cell, facts()[row])
    named = [f for f in findings if f.rule == rule and message in f.message and source in f.source]
    assert named, [f"{f.rule}: {f.message} | {f.source}" for f in findings]
    assert fix in named[0].fix
    assert state_of(cell, findings) == ("degraded" if row.startswith("N14") else "refused")
    assert not is_buildable(cell, findings)


@pytest.mark.parametrize(("name", "rule", "message", "source", "fix"), FLASH3_EXPECTED)
def test_flash_attn_3_is_refused_where_it_does_not_load(
    name: str, rule: str, message: str, source: str, fix: str
) -> None:
    findings = judge(FLASH3[name], facts()[name])
    (named,) = [finding for finding in findings if finding.rule == rule]
    assert (named.severity, named.message) == ("refused", message)
    assert source in named.source
    assert named.fix.startswith(fix)
    assert {finding.rule for finding in findings} == {row[1] for row in FLASH3_EXPECTED if row[0] == name}


@pytest.mark.parametrize("row", [row for row in EXPECTED if row.startswith("N14")])
def test_degraded_is_buildable_only_where_allowed(row: str) -> None:
    cell = replace(NEGATIVE[row], allow=("degraded",))
    assert is_buildable(cell, judge(cell, facts()[row]))


# Rows that pass the resolver: the reason must not come from metadata, or the rule would be idle.
@pytest.mark.parametrize("row", ["N13", "N14-2.13", "N14-2.15", "N15", "N16-B200", "N18", "N19", "N2"])
def test_metadata_alone_would_have_let_it_through(row: str) -> None:
    rules = {finding.rule for finding in judge(NEGATIVE[row], facts()[row])}
    assert not rules & {"requires-dist", "tags", "platform", "requires-python", "marker"}


@pytest.mark.parametrize("name", sorted(POSITIVE))
def test_what_fits_is_planned(name: str) -> None:
    findings = judge(POSITIVE[name], facts()[name])
    assert state_of(POSITIVE[name], findings) == "planned", findings


def test_v72_has_both_reasons() -> None:
    findings = judge(V72, facts()["v72"])
    rules = [finding.rule for finding in findings]
    assert state_of(V72, findings) == "refused"
    assert rules.index("requires-dist") < rules.index("compiler")
    assert "no_deps hides this from the installer" in findings[0].message
    assert "0.0.31" in findings[0].fix


def test_v72_against_the_real_index(tmp_path: Path) -> None:
    """The same facts, read now: refused for both reasons, and not one wheel was downloaded for it."""
    said: list[str] = []
    wheels = Wheels(Index.from_environment(cache=tmp_path), tmp_path, said.append)
    live = gather(V72, wheels)
    assert live.wheels == facts()["v72"].wheels
    assert {"requires-dist", "compiler"} <= {finding.rule for finding in judge(V72, live)}
    assert wheels.bytes < live.download_size / 50, f"{wheels.bytes} bytes for {live.download_size}"
    assert not [text for text in said if "whole wheel" in text]


@pytest.mark.parametrize("row", ["N13", "N15"])
def test_rows_only_binaries_tell_against_the_real_index(row: str, tmp_path: Path) -> None:
    live = gather(NEGATIVE[row], Wheels(Index.from_environment(cache=tmp_path), tmp_path))
    assert live.wheels == facts()[row].wheels
    assert EXPECTED[row][0] in {finding.rule for finding in judge(NEGATIVE[row], live)}
