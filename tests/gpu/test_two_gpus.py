"""Two GPUs over NCCL against one: Ulysses, whole passes with Ulysses after them, the pieces of both."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "wan"))

from test_distributed import _pieces_on, call, close, run

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason=f"needs 2 GPUs, {GPUS} found"),
]
# heads 128 wide, so that cuDNN, flash and our kernels take them; six token columns, so 3 and 3
CONFIG = {
    "in_dim": 36,
    "dim": 512,
    "ffn_dim": 1024,
    "num_heads": 4,
    "num_layers": 3,
    "text_dim": 24,
    "text_len": 16,
    "context_tokens": 8,
    "intermediate_dim": 16,
}


def on(device: torch.device, arguments: dict, dtype: torch.dtype) -> dict:
    def move(value):
        if isinstance(value, list):
            return [move(v) for v in value]
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() and value.ndim > 1 else value.dtype)

    return {name: move(value) for name, value in arguments.items()}


def worker(rank: int, size: int) -> None:
    import torch.distributed as dist

    from wan.distributed import BranchParallel, UlyssesParallel
    from wan.modules.multitalk_model import WanModel
    from wan.modules.runtime import Parallel

    device = torch.device("cuda", rank)
    assert dist.get_backend() == "nccl"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    _pieces_on(device, rank, size)
    for dtype, fused in ((torch.float32, False), (torch.bfloat16, True)):
        torch.manual_seed(1)
        model = WanModel(**CONFIG).to(device, dtype).eval().requires_grad_(False)
        if fused:
            from wan.fuse import join_qkv
            from wan.kernels import FUSED

            join_qkv(model)
            model.use(ops=FUSED)
        calls = [on(device, call(people, seed), dtype) for people, seed in ((1, 5), (1, 6), (1, 7))]
        wants = [model(**c) for c in calls]
        model.use(parallel=UlyssesParallel())
        spread = BranchParallel(heads=CONFIG["num_heads"])
        ways = {
            "Ulysses": [model(**c) for c in calls],
            "hybrid": spread(
                lambda p, m=model: m.use(parallel=p), [lambda c=c, m=model: m(**c) for c in calls]
            ),
        }
        for name, got in ways.items():
            for g, w in zip(got, wants, strict=True):
                if dtype == torch.float32:
                    close(g, w)
                else:
                    off = float((g.double() - w.double()).norm() / w.double().norm())
                    assert off < 1e-2, (name, off)
        model.use(parallel=Parallel())


def test_two_gpus_equal_one() -> None:
    run(worker, 2)
