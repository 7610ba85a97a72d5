"""The GPU benchmarks run at tiny sizes without a GPU, and docs/performance.md says what they found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "benchmarks/gpu"
PARTS = ("forward", "attention", "vae", "job", "load", "two_gpus")


def run(*args: str, timeout: float = 600, **env: str) -> subprocess.CompletedProcess[str]:
    whole = os.environ | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.run([sys.executable, *args], env=whole, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """One run of everything on the CPU: {part: its JSON}, and the folder."""
    into = tmp_path_factory.mktemp("measured")
    done = run(str(BENCH / "all.py"), "--into", str(into), "--tiny", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: json.loads((into / f"{name}.json").read_text()) for name in (*PARTS, "all")} | {
        "into": into
    }


@pytest.mark.slow
def test_every_part_ends_well(measured: dict) -> None:
    ended = {row["part"]: row["exit"] for row in measured["all"]["parts"]}
    assert ended == dict.fromkeys(PARTS, 0)
    assert all("failed" not in measured[name] and "left_out" not in measured[name] for name in PARTS)


@pytest.mark.slow
def test_forward(measured: dict) -> None:
    result = measured["forward"]
    assert result["facts"]["gpu"] is None
    assert all(row.get("ok") for row in result["correctness"]), result["correctness"]
    names = {row["variant"] for row in result["variants"]}
    assert {"plain, flash", "tuned, cuDNN", "fused, absorbed", "fused, two speakers", "compiled"} <= names
    assert all(row["median_ms"] > 0 for row in result["variants"])
    assert all(s["same_as_single_passes"] is True for s in result["step"].values())
    compiled = next(row for row in result["variants"] if row["variant"] == "compiled")
    assert compiled["compiled_graphs"] == 1, "all blocks share one graph, and nothing breaks it"
    fast = next(row for row in result["variants"] if row["tier"] == "fast")
    assert 0 < fast["error_to_exact"] < 0.2


@pytest.mark.slow
def test_the_other_parts(measured: dict) -> None:
    assert all(row["error"] < 0.01 for row in measured["attention"]["rows"])
    assert measured["load"]["same_numbers"] is True
    assert {row["what"] for row in measured["load"]["rows"]} >= {"load, cold", "load, warm"}
    job = measured["job"]["rows"][-1]
    spent = job["dit s"] + job["vae encode s"] + job["vae decode s"]
    assert 0 < spent < job["s"]
    assert job["s"] - spent == pytest.approx(job["outside_s"], abs=0.01)
    two = measured["two_gpus"]
    assert two["backend"] == "gloo"
    assert two["world"] == 2
    assert all(r["distance"] < 1e-5 for r in two["results"].values())
    assert set(two["speedup"]) == {"hybrid", "Ulysses"}


@pytest.mark.slow
def test_report_of_all_parts(measured: dict, tmp_path: Path) -> None:
    """The generated page takes every part that is there, and says of the others that they are not."""
    out = tmp_path / "page.md"
    done = run(str(BENCH / "report.py"), "--evidence", str(measured["into"]), "--out", str(out))
    assert done.returncode == 0, done.stderr
    page = out.read_text()
    for title in ("## Two GPUs", "## VAE", "## Loading", "## A warm job", "## Self-attention alone"):
        section = page.split(title, 1)[1].split("\n## ", 1)[0]
        assert "not measured yet" not in section, title
    empty = run(str(BENCH / "report.py"), "--evidence", str(tmp_path), "--out", str(out))
    assert empty.returncode == 0, empty.stderr
    assert out.read_text().count("not measured yet") >= 6


def test_performance_page_is_what_was_measured() -> None:
    done = run(str(BENCH / "report.py"), "--check")
    assert done.returncode == 0, done.stderr


def test_no_ratio_to_a_plain_row_that_is_off() -> None:
    """Then the candidates' run gives it, for the same variant and attention; or at least the plain row."""
    code = f"""
import sys; sys.path.insert(0, {str(BENCH)!r})
from report_base import ACROSS, ONE_PROCESS, of_plain
def run(**ms):
    names = {{"plain": ("plain, flash", "flash"), "old": ("fused", "cudnn"),
             "fused": ("fused", "flash_attn_3"),
             "twin": ("fused, flash-attn 3", "flash-attn 3"), "all": ("fused, absorbed", "flash_attn_3")}}
    rows = [dict(variant=names[n][0], kernel=names[n][1], people=1, median_ms=m) for n, m in ms.items()]
    return dict(variants=rows)
near, off = run(plain=6000, fused=3000, all=2700), run(plain=6600, fused=3000, all=2700)
other = run(plain=5900, old=3245, twin=2950)
assert of_plain(dict(forward=near, candidates=other), "fused") == (0.5, "")
assert of_plain(dict(forward=off, candidates=other), "fused") == (0.5, ONE_PROCESS)
assert of_plain(dict(forward=off, candidates=other), "fused, absorbed") == (2700 / 5900, ACROSS)
assert of_plain(dict(forward=off, candidates=other), "plain, flash")[0] is None
assert of_plain(dict(forward=off, candidates=run(plain=6600, twin=2950)), "fused")[0] is None
assert of_plain(dict(forward=off, candidates=None), "fused")[0] is None
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_what_a_graph_would_win_follows_from_the_figures() -> None:
    code = """
import sys
sys.path[:0] = ["benchmarks/gpu"]
import report_forward
def page(ms):
    kernels = [{"kernel": "nvjet", "ms": 1300.0}, {"kernel": "flash", "ms": 1500.0}]
    return report_forward.small({
        "size": {"config": {"num_layers": 40}, "tokens": 33600, "latent": [21, 80, 80]},
        "small": [{"variant": "fused", "layers": 3, "tokens": 48, "ms": ms}],
        "breakdown": [{"variant": "fused", "kernels": kernels}],
    })
quick, slow = page(3.0), page(30.0)
assert "launched in 40 ms" in quick and "alone is 124 ms" in quick and "more than 3 would" in quick, quick
assert "A graph would win there" in slow and "nothing to win" not in slow, slow
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_note_speaks_of_one_measurement(tmp_path: Path) -> None:
    """With another one in its place the report refuses to print the note."""
    (tmp_path / "load.json").write_text("{}")
    (tmp_path / "notes.json").write_text(json.dumps({"load": {"sha256": "0" * 64, "text": "slow"}}))
    done = run(str(BENCH / "report.py"), "--evidence", str(tmp_path), "--out", str(tmp_path / "page.md"))
    assert done.returncode == 1
    assert "another load.json" in done.stderr


def test_a_sheet_survives_failures_and_lack_of_time(tmp_path: Path) -> None:
    """A step that fails or for which no time is left is noted; what was measured before is on disk."""
    code = f"""
import sys; sys.path[:0] = [{str(BENCH)!r}, {str(ROOT)!r}]
import os, pathlib, torch
from sheet import Sheet
sheet = Sheet(pathlib.Path({str(tmp_path / "s.json")!r}), "x.py", torch.device("cpu"), budget_s=60)
sheet.step("good", lambda: 1)
sheet.step("bad", lambda: 1 / 0)
sheet.step("long", lambda: 2, need_s=100)
os.kill(os.getpid(), 9)
"""
    assert run("-c", code).returncode == -9
    kept = json.loads((tmp_path / "s.json").read_text())
    assert kept["good"] == 1
    assert kept["failed"]["bad"].startswith("ZeroDivisionError")
    assert kept["left_out"] == ["long"]
    assert not list(tmp_path.glob("*.part"))


def test_cross_attention_kernel(tmp_path: Path) -> None:
    """The candidate's kernel, interpreted, against fp64: equal padding tokens as one key, ragged tiles."""
    pytest.importorskip("triton")
    code = f"""
import sys; sys.path[:0] = [{str(BENCH)!r}, {str(ROOT)!r}]
import torch
from cross import cross, distinct
from torch.nn.functional import scaled_dot_product_attention as sdpa
g = torch.Generator().manual_seed(0)
draw = lambda n: torch.randn(1, n, 2, 128, generator=g)
q, k, v, ik, iv = draw(150), draw(512), draw(512), draw(257), draw(257)
k[:, 70:], v[:, 70:] = k[:, 70:71], v[:, 70:71]
n = distinct(k[..., 0, :])
assert n == 71, n
wide = lambda a, b, c: sdpa(*(t.transpose(1, 2).double() for t in (a, b, c))).transpose(1, 2).flatten(2)
want = wide(q, k, v) + wide(q, ik, iv)
got = cross(q, (k[:, :n].contiguous(), v[:, :n].contiguous(), ik, iv), 512 - n + 1)
off = float((got - want).norm() / want.norm())
assert 0 < off < 1e-6, off
alone = cross(q, (k, v, ik, iv), 1)
assert float((alone - want).norm() / want.norm()) < 1e-6
"""
    done = run("-c", code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


def test_every_kernel_has_a_case() -> None:
    """At a model's size each kernel of the registry is measured, or a reason is given; here at tiny size."""
    pytest.importorskip("triton")
    code = f"""
import sys; sys.path[:0] = [{str(BENCH)!r}, {str(ROOT)!r}]
import json, torch
from kernel_cases import LARGE, LEFT_OUT, cases
from wan.kernels import registry
names = [spec.name for spec in registry.KERNELS]
rows = cases(torch.device("cpu"), tokens=4, side=4, repeats=1)
print(json.dumps([names, list(LARGE), list(LEFT_OUT), rows]))
"""
    done = run("-c", code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    names, large, left_out, rows = json.loads(done.stdout)
    assert sorted(names) == sorted(large + left_out)
    assert [row["kernel"] for row in rows] == [name for name in names if name not in left_out]
    assert not [row for row in rows if "failed" in row]
    # fp8: values next to the middle of two steps go either way, so a few are a step off
    assert all(row["error"] < 0.02 and row["ms"] > 0 for row in rows), rows


@pytest.mark.parametrize("script", ["forward.py", "attention.py", "load.py", "job.py"])
def test_needs_a_gpu_at_real_width(script: str, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        return
    done = run(str(BENCH / script), "--out", str(tmp_path / "x.json"))
    assert done.returncode == 2
    assert "--tiny --device cpu" in done.stderr
