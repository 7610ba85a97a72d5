"""Reading `tests/golden`: fixtures as tensors, weights from their names, measured errors with their gates."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
GOLDEN = HERE.parent / "golden"
sys.path.insert(0, str(GOLDEN))

import seeded  # noqa: E402  (a file of the fixtures, not a package)

__all__ = ["GOLDEN", "config", "error", "fill", "index", "keys", "load", "regenerate", "rel_l2", "seeded"]


@functools.cache
def _index() -> dict[str, Any]:
    return json.loads((GOLDEN / "index.json").read_text())["fixtures"]


def index(name: str) -> dict[str, Any]:
    """The entry of one fixture in `index.json`."""
    return _index()[name]


def config(name: str) -> dict[str, Any]:
    """The constructor arguments of a fixture's module; lists become tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in index(name)["config"].items()}


def load(name: str) -> dict[str, torch.Tensor]:
    """Every array of `<name>.npz` as a tensor of the stored dtype."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as z:
        return {k: torch.from_numpy(np.ascontiguousarray(z[k])) for k in z.files}


def keys(name: str) -> dict[str, list[int]]:
    """`keys/<name>.json`: state-dict key → shape of a real checkpoint."""
    return json.loads((GOLDEN / "keys" / f"{name}.json").read_text())["keys"]


def regenerate(name: str) -> dict[str, torch.Tensor]:
    """The inputs of a fixture that are too large to store, from their names."""
    spec = index(name).get("regenerated_inputs", {})
    return {k: seeded.randn(n, shape, scale) for k, (n, shape, scale) in spec.items()}


def fill(module: torch.nn.Module, name: str, salt: str | None = None) -> torch.nn.Module:
    """Give `module` the seeded weights of fixture `name` and check shapes and sums against `index.json`.

    Raises AssertionError when a key, a shape or a sum differs: then the module is not the fixture's.
    """
    entry = index(name)
    salt = entry.get("salt", "") if salt is None else salt
    signature = seeded.fill(module, salt)
    expected = entry.get("params")
    if isinstance(expected, str):  # "see dit_single_fp32"
        expected = index(expected.split()[-1]).get("params")
    if isinstance(expected, dict) and salt in expected:
        expected = expected[salt]
    if isinstance(expected, dict):
        some = "n_params" in entry  # of the widest fixture only some sums are stored
        assert some or set(signature) == set(expected), set(signature) ^ set(expected)
        assert not some or entry["n_params"] == sum(p.numel() for p in module.parameters())
        for key, (shape, total, abs_total) in expected.items():
            got = signature[key]
            assert list(got[0]) == list(shape), f"{key}: {got[0]} is not {shape}"
            tolerance = 1e-6 * max(1.0, abs_total)
            assert abs(got[1] - total) <= tolerance, f"{key}: sum"
            assert abs(got[2] - abs_total) <= tolerance, f"{key}: absolute sum"
    return module.eval()


def error(got: torch.Tensor, want: torch.Tensor, *, absolute: bool = False) -> float:
    """Largest difference, divided by the largest reference value unless `absolute`."""
    assert tuple(got.shape) == tuple(want.shape), f"shape {tuple(got.shape)} is not {tuple(want.shape)}"
    got, want = got.detach().double(), want.detach().double()
    assert torch.isfinite(got).all(), "not finite"
    difference = (got - want).abs().max().item()
    return difference if absolute else difference / max(want.abs().max().item(), 1e-30)


def rel_l2(got: torch.Tensor, want: torch.Tensor) -> float:
    """‖got − want‖ / ‖want‖."""
    assert tuple(got.shape) == tuple(want.shape), f"shape {tuple(got.shape)} is not {tuple(want.shape)}"
    return ((got.double() - want.double()).norm() / want.double().norm()).item()
