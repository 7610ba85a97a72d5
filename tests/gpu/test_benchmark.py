"""The benchmark script runs without a GPU at a tiny size, and docs/performance.md says what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "benchmarks/gpu"


def run(*args: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True, timeout=240)


def test_tiny_run_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "forward.json"
    done = run(str(BENCH / "forward.py"), "--tiny", "--device", "cpu", "--repeats", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["facts"]["gpu"] is None
    assert all(row["ok"] for row in result["correctness"])
    names = {row["variant"] for row in result["variants"]}
    assert {"plain, flash", "tuned, cuDNN", "fused, absorbed", "fused, two speakers"} <= names
    assert all(row["median_ms"] > 0 for row in result["variants"])
    assert result["step"]["same_as_single_passes"] is True


def test_performance_page_is_what_was_measured() -> None:
    done = run(str(BENCH / "report.py"), "--check")
    assert done.returncode == 0, done.stderr


def test_needs_a_gpu_at_real_width(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        return
    done = run(str(BENCH / "forward.py"), "--out", str(tmp_path / "x.json"))
    assert done.returncode == 2
    assert "--tiny --device cpu" in done.stderr
