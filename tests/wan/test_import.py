"""`import wan` is cheap and lazy; the configurations need no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.mark.parametrize("module", ["wan", "wan.configs", "wan.modules", "wan.utils"])
def test_import_loads_no_torch(module: str) -> None:
    assert run(f"import sys, {module}; print('torch' in sys.modules)") == "False"


def test_import_is_small() -> None:
    """No clock: what an import costs is what it loads."""
    loaded = run("import sys, wan, wan.configs; print(*sys.modules)").split()
    heavy = {"torch", "numpy", "PIL", "triton", "transformers", "safetensors", "tqdm", "pydantic"}
    assert heavy.isdisjoint(loaded)
    own = [name for name in loaded if name.split(".")[0] == "wan"]
    assert {name for name in own if not name.startswith("wan.configs")} == {"wan"}


def test_config_values() -> None:
    import torch

    from wan.configs import MAX_AREA_CONFIGS, SIZE_CONFIGS, SUPPORTED_SIZES, WAN_CONFIGS

    cfg = WAN_CONFIGS["multitalk-14B"]
    assert (cfg.dim, cfg.ffn_dim, cfg.num_heads, cfg.num_layers) == (5120, 13824, 40, 40)
    assert cfg.param_dtype is torch.bfloat16
    assert cfg.clip_dtype is torch.float16
    assert cfg.sample_neg_prompt.startswith("bright tones")
    assert WAN_CONFIGS["t2v-1.3B"].dim == 1536
    assert set(SUPPORTED_SIZES) == set(WAN_CONFIGS)
    assert all(size in SIZE_CONFIGS for sizes in SUPPORTED_SIZES.values() for size in sizes)
    assert MAX_AREA_CONFIGS["480*832"] == 480 * 832
