"""LoRA: low-rank and full differences, merged into a model's weights.

LoRA, arXiv 2106.09685; specification §6.3 and §9 D14.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor, nn

PREFIX = "diffusion_model."
# Spellings of the two factors, and of the differences that are simply added.
_DOWN = ("lora_down.weight", "lora_A.weight")
_UP = ("lora_up.weight", "lora_B.weight")
_PARTS = {"diff": "weight", "diff_b": "bias", "diff_m": "modulation"}


class LoraError(ValueError):
    """A LoRA file does not fit the model or has tensors of unknown meaning; the message lists them."""


class WanLoraWrapper:
    """Reads LoRA files and merges them, one after the other. A merge can't be undone but by loading again."""

    def __init__(self, wan_model: nn.Module) -> None:
        self.model = wan_model
        self.lora_dict: dict[str, dict[str, Tensor]] = {}

    def load_lora(self, lora_path: str | Path, lora_name: str | None = None) -> str:
        """Read a safetensors file under `lora_name` (default: the file's stem) → the name."""
        from safetensors.torch import load_file

        path = Path(lora_path)
        if not path.is_file():
            msg = f"LoRA: no file {str(path)!r}"
            raise FileNotFoundError(msg)
        name = lora_name or path.stem
        self.lora_dict[name] = load_file(path)
        return name

    def apply_lora(
        self,
        lora_name: str,
        alpha: float = 1.0,
        param_dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
        *,
        official: bool = False,
    ) -> list[str]:
        """Merge at strength `alpha`, computed in `param_dtype` on `device` → the names of the changed
        parameters.

        weight += alpha·(a / rank)·up·down, a being the file's own alpha (rank if it has none); differences
        are added times `alpha`. `official` does as the original: no a / rank, no lora_A / lora_B, nothing
        said of what it ignores. Nothing is changed unless all of it fits. Raises LoraError listing what is
        unknown, incomplete or mis-shaped.
        """
        if lora_name not in self.lora_dict:
            msg = f"LoRA {lora_name!r} is not loaded; loaded are {', '.join(self.lora_dict) or 'none'}"
            raise LoraError(msg)
        changes = _collect(self.lora_dict[lora_name], official=official)
        parameters = dict(self.model.named_parameters())
        problems = [*changes.problems]
        for name, change in changes.by_parameter.items():
            if name not in parameters:
                problems.append(f"{name}: the model has no such parameter")
            elif tuple(parameters[name].shape) != change.shape:
                problems.append(
                    f"{name}: shape {change.shape}, the model has {tuple(parameters[name].shape)}"
                )
        if problems and not official:
            shown = "; ".join(problems[:10])
            msg = f"LoRA {lora_name!r} does not fit: {len(problems)} problems: {shown}"
            raise LoraError(msg)
        names = [n for n in changes.by_parameter if n in parameters]
        with torch.no_grad():
            for name in names:
                parameter = parameters[name]
                delta = changes.by_parameter[name].delta(device, param_dtype)
                merged = parameter.to(device, param_dtype) + alpha * delta
                parameter.copy_(merged.to(parameter))
        return names


class _Change:
    """What one parameter gains: factors with their own scale, or a plain difference."""

    def __init__(
        self, plain: Tensor | None = None, down: Tensor | None = None, up: Tensor | None = None
    ) -> None:
        self.plain, self.down, self.up, self.scale = plain, down, up, 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.plain.shape) if self.plain is not None else (self.up.shape[0], self.down.shape[1])

    def delta(self, device: str | torch.device, dtype: torch.dtype) -> Tensor:
        if self.plain is not None:
            return self.plain.to(device, dtype)
        return (self.up.to(device, dtype) @ self.down.to(device, dtype)) * self.scale


class _Changes:
    def __init__(self) -> None:
        self.by_parameter: dict[str, _Change] = {}
        self.problems: list[str] = []


def _collect(tensors: dict[str, Tensor], *, official: bool) -> _Changes:
    """Group a file's tensors by the parameter they change."""
    out = _Changes()
    factors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        module, part = _split(key.removeprefix(PREFIX))
        if not key.startswith(PREFIX) or part is None:
            out.problems.append(f"{key}: a tensor of unknown meaning")
        elif part in _PARTS:
            if official and part == "diff_m":
                continue
            owner = f"{module}.{_PARTS[part]}"
            out.by_parameter[owner] = _Change(plain=tensor)
        elif part == "alpha":
            factors[module]["alpha"] = tensor
        elif not (official and part in (_DOWN[1], _UP[1])):
            factors[module]["down" if part in _DOWN else "up"] = tensor
    for module, found in factors.items():
        if "down" not in found or "up" not in found:
            if set(found) != {"alpha"}:
                out.problems.append(f"{module}: only one of its two factors is there")
            continue
        change = _Change(down=found["down"], up=found["up"])
        if not official and "alpha" in found:
            change.scale = found["alpha"].item() / found["down"].shape[0]
        out.by_parameter[f"{module}.weight"] = change
    return out


def _split(key: str) -> tuple[str, str | None]:
    for part in (*_DOWN, *_UP, *_PARTS, "alpha"):
        if key.endswith(f".{part}"):
            return key.removesuffix(f".{part}"), part
    return key, None
