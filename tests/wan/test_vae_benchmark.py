"""The VAE's benchmark runs on a CPU, and its metrics are what they are called."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from goldens import seeded

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/wan_vae.py"
sys.path.insert(0, str(SCRIPT.parent))

import wan_vae  # noqa: E402


def test_a_tiny_run(tmp_path: Path) -> None:
    out = tmp_path / "vae.json"
    where = ("--device", "cpu", "--size", "16x16", "--tiny", "--frames", "33", "--repeats", "1")
    command = [sys.executable, str(SCRIPT), *where, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    rows = {row["case"]: row for row in json.loads(out.read_text())["rows"]}
    reused = rows["encode fp32, 1 known frame, reuse"]
    assert reused["same_bits"] is True
    assert 0 < reused["conv_share"] < 1
    plain = rows["encode fp32, 1 known frame, plain"]
    assert reused["conv_tflop"] < plain["conv_tflop"] == rows["encode fp32, any video"]["conv_tflop"]
    assert rows["decode fp32"]["psnr_db"] == float("inf")
    assert 20 < rows["decode bf16"]["psnr_db"] < 80


def test_a_size_that_does_not_fit_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--size", "30x32"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "30x32" in done.stderr


def test_convolutions_are_counted() -> None:
    layer = torch.nn.Conv3d(3, 5, 3, padding=1)
    x = torch.zeros(1, 3, 2, 4, 4)
    assert wan_vae.convolutions(lambda: layer(x)) == 2 * (5 * 2 * 4 * 4) * (3 * 27)


def test_ms_ssim_and_psnr() -> None:
    video = seeded.randn("metric.video", (3, 2, 192, 208)).clamp(-1, 1)
    assert wan_vae.ms_ssim(video, video) == pytest.approx(1, abs=1e-6)
    noise = seeded.randn("metric.noise", tuple(video.shape))
    little, much = (wan_vae.ms_ssim(video, video + s * noise) for s in (0.01, 0.3))
    assert 0.999 < little < 1
    assert much < 0.99
    assert wan_vae.psnr(video, video + 0.02) == pytest.approx(40, abs=1e-3)
    # A shift and a scale by hand: luminance (2·m·n + c1)/(m² + n² + c1), structure and contrast 1.
    flat = torch.full((3, 1, 16, 16), 0.5)
    c1 = 0.02**2
    want = (2 * 0.5 * 0.6 + c1) / (0.5**2 + 0.6**2 + c1)
    assert wan_vae.ms_ssim(flat, flat + 0.1) == pytest.approx(want, abs=1e-5)
