"""VACE on several processes of one host, driven from one that is no worker itself: `WanVaceMP`."""

from __future__ import annotations

import os
import queue
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

__all__ = ["WanVaceMP", "WorkerError"]

POLL_S = 1.0  # how often a waiting caller looks whether the workers still live


class WorkerError(RuntimeError):
    """A worker failed; the message holds its traceback."""


class WanVaceMP:
    """Starts `world_size` worker processes (default: one a GPU), each with a `WanVace`; use it as a context
    manager.

    With `use_usp` the workers share one generation (guidance branches and tokens). `build(rank)` makes a
    worker's pipeline and must be picklable; by default it is `WanVace(config, checkpoint_dir, rank, rank,
    use_usp=…)`. `ulysses_size` and `ring_size` are accepted for callers of the original; their product must
    be `world_size`.
    """

    def __init__(
        self,
        config: Any,
        checkpoint_dir: str | os.PathLike[str],
        use_usp: bool = False,
        ulysses_size: int | None = None,
        ring_size: int | None = None,
        *,
        world_size: int | None = None,
        build: Callable[[int], Any] | None = None,
    ) -> None:
        sizes = (ulysses_size or 1) * (ring_size or 1)
        self.world_size = world_size or (sizes if sizes > 1 else max(torch.cuda.device_count(), 1))
        if (ulysses_size or ring_size) and sizes != self.world_size:
            msg = f"ulysses_size x ring_size is {sizes}, there are {self.world_size} workers: make them equal"
            raise ValueError(msg)
        self._build = build or _Build(config, os.fspath(checkpoint_dir), use_usp)
        context = mp.get_context("spawn")
        self._jobs = [context.Queue() for _ in range(self.world_size)]
        self._results: Any = context.Queue()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._processes = [
            context.Process(
                target=_work,
                args=(rank, self.world_size, port, self._build, self._jobs[rank], self._results),
                daemon=True,
            )
            for rank in range(self.world_size)
        ]
        for process in self._processes:
            process.start()

    def generate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`WanVace.generate` on all workers: CPU tensors in, the video on the CPU out. Raises WorkerError."""
        for job in self._jobs:
            job.put((args, kwargs))
        while True:
            try:
                ok, value = self._results.get(timeout=POLL_S)
            except queue.Empty:
                dead = [rank for rank, process in enumerate(self._processes) if not process.is_alive()]
                if dead:
                    self.close()
                    msg = f"worker {dead[0]} ended (exit code {self._processes[dead[0]].exitcode})"
                    raise WorkerError(msg) from None
                continue
            if ok:
                return torch.from_numpy(value)
            self.close()
            raise WorkerError(value)

    def close(self) -> None:
        """End the workers."""
        for job, process in zip(self._jobs, self._processes, strict=True):
            if process.is_alive():
                job.put(None)
        for process in self._processes:
            process.join(timeout=10)
            if process.is_alive():  # still in a collective with a failed one
                process.terminate()
                process.join()

    def __enter__(self) -> WanVaceMP:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Build:
    """The default way to make a worker's pipeline."""

    def __init__(self, config: Any, checkpoint_dir: str, use_usp: bool) -> None:
        self.config, self.checkpoint_dir, self.use_usp = config, checkpoint_dir, use_usp

    def __call__(self, rank: int) -> Any:
        from .vace import WanVace

        return WanVace(self.config, self.checkpoint_dir, device_id=rank, rank=rank, use_usp=self.use_usp)


def _work(rank: int, size: int, port: int, build: Callable[[int], Any], jobs: Any, results: Any) -> None:
    from .distributed import init_from_environment

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        with init_from_environment():
            pipeline = build(rank)
            while (job := jobs.get()) is not None:
                args, kwargs = job
                video = pipeline.generate(*args, **kwargs)
                if video is not None:
                    results.put((True, video.float().cpu().numpy()))
    except Exception:  # noqa: BLE001  (whatever it was, the caller gets to read it)
        results.put((False, f"worker {rank} failed:\n{traceback.format_exc()}"))
