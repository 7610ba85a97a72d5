"""The JSON of one part of the measurements: written after every step, whole or not at all, so that nothing is
lost when the run is killed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from setting import facts


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


class Sheet:
    """`sheet[key] = value` keeps a value on disk; `sheet.step(name, function)` runs one step."""

    def __init__(self, path: Path, script: str, device: torch.device, budget_s: float | None = None) -> None:
        self.path, self.started, self.budget_s = path, time.monotonic(), budget_s
        said = [path.name if Path(argument) == path else argument for argument in sys.argv[1:]]
        self.data: dict[str, Any] = {
            "schema": 2,
            "command": shlex.join(["python", f"benchmarks/gpu/{script}", *said]),
            "when": time.strftime("%Y-%m-%d", time.gmtime()),
            "facts": facts(device),
        }
        self.save()

    def __setitem__(self, key: str, value: Any) -> None:
        self.data[key] = value
        self.save()

    def __getitem__(self, key: str) -> Any:
        return self.data[key]

    def save(self) -> None:
        self.data["seconds"] = round(time.monotonic() - self.started, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps(self.data, indent=1) + "\n")
        part.replace(self.path)

    @property
    def left(self) -> float:
        """Seconds left of the budget."""
        spent = time.monotonic() - self.started
        return float("inf") if self.budget_s is None else self.budget_s - spent

    def step(self, name: str, function: Callable[[], Any], need_s: float = 0.0) -> Any:
        """Run and keep one step. Without time for it, or if it fails, the sheet says so and the run goes
        on.
        """
        if self.left <= need_s:
            self.data.setdefault("left_out", []).append(name)
            say(f"{name}: left out, {self.left:.0f} s are left and it needs {need_s:.0f}")
            self.save()
            return None
        try:
            value = function()
        except Exception as error:  # noqa: BLE001  (the other steps are still worth measuring)
            traceback.print_exc()
            self.data.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}"[:500]
            self.save()
            return None
        self[name] = value
        say(f"{name}: done, {self.data['seconds']:.0f} s")
        return value


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The switches that every part has."""
    out = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--out", type=Path, required=True, help="where the JSON goes")
    out.add_argument("--tiny", action="store_true", help="tiny sizes: to test the script, not the card")
    out.add_argument("--device", default="cuda", help="cuda (default), or cpu with --tiny")
    out.add_argument("--budget-s", type=float, help="begin no step that would end later than this")
    return out


def device_of(args: argparse.Namespace, out: argparse.ArgumentParser) -> torch.device:
    """The device asked for; an error where it can't be. TF32 off, as in every figure."""
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        out.error("no GPU here; --tiny --device cpu runs the script without one")
    if device.type == "cpu" and not args.tiny:
        out.error("a CPU runs the script at --tiny sizes only")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return device
