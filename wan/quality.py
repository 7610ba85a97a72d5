"""How exact and how fast: one word that expands to explicit switches, each of which can be set by itself.

| quality | what it changes |
|---|---|
| `exact` (default) | nothing: bf16 model as published, fp32 VAE, all steps; no lossy code is imported. |
|  | Only where rounding happens differs: audio projections are multiplied into keys and values where the |
|  | memory is there (error against fp32 1.01 times the original order's; docs/performance.md) |
| `near` | VAE decodes in bf16; audio projections are multiplied, or it is an error (20 GiB more memory); |
|  | of two speakers those of the pass without speech alone can be |
| `fast` | `near`'s decoding; the block's linears multiply in fp8, row by row; audio projections that are |
|  | multiplied as in `exact` have fp8 weights alone; attention stays exact unless it is set to `fp8` too |
| `turbo` | `near`'s decoding; 8 steps without text guidance, which needs a distilled LoRA |

An explicit switch given beside the word wins, and `Setting.overrides` says so. `settle` replaces "auto" by
what this machine's memory allows, so that a result names what ran. Nothing falls back: what the machine can't
do is a `QualityError` that names what is missing and which qualities work. This module is plain Python; it
imports torch only to look at the machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

__all__ = ["QUALITIES", "TIERS", "Machine", "QualityError", "Setting", "Switches", "expand", "settle"]

WEIGHTS = ("bf16", "int8", "fp8")
LINEARS = ("bf16", "fp8")
VAE_DECODE = ("fp32", "bf16")
ABSORB_AUDIO = ("auto", "none", "silence", "all")
LOSSY_ATTENTION = frozenset({"sage", "fp8"})
ABSORB_BYTES = 64 << 30  # of a GPU: 38 GB of weights (if bf16), 22 GB of absorbed projections, activations
# From which memory "auto" takes them, with all encoders resident beside and a third to spare: a latent frame
# of "all" is 1 GiB, "silence" is two frames whatever the length.
AUTO_GIB = {"all": 75, "silence": 56}
FRAMES = 81  # of a clip: 21 latent frames


class QualityError(ValueError):
    """A quality or a switch that is unknown, or that can't be had here; the message says what works."""


@dataclass(frozen=True, kw_only=True)
class Switches:
    """All that a quality decides. `exact` is the defaults.

    attention: a name of `wan.attention_backends`. weights: "bf16" as published, or "int8" or "fp8" from a
    quantised file. linears: "bf16", or "fp8" for those of the blocks that see every token. vae_decode: "fp32"
    or "bf16"; encoding is always fp32. absorb_audio: "none", "silence" (only in the pass without speech: 2
    GB), "all" (22 GB), see `modules.runtime.Runtime`, or "auto", see `resolve`; whatever the weights and
    linears: what those projections read is not rounded then, their weights are as they are. step_cache: a
    TeaCache threshold, or None to run every step. lora: whether a distilled LoRA is merged. steps, shift
    (None: the size's own) and guidance scales: of the sampling.
    """

    attention: str = "auto"
    weights: str = "bf16"
    linears: str = "bf16"
    vae_decode: str = "fp32"
    absorb_audio: str = "auto"
    step_cache: float | None = None
    lora: bool = False
    steps: int = 40
    shift: float | None = None
    text_guide_scale: float = 5.0
    audio_guide_scale: float = 4.0

    def __post_init__(self) -> None:
        values = {
            "weights": WEIGHTS,
            "linears": LINEARS,
            "vae_decode": VAE_DECODE,
            "absorb_audio": ABSORB_AUDIO,
        }
        for name, known in values.items():
            if getattr(self, name) not in known:
                msg = f"{name} {getattr(self, name)!r} is not one of {', '.join(known)}"
                raise QualityError(msg)

    @property
    def lossy(self) -> tuple[str, ...]:
        """The switches that make results differ from the published model's by more than bf16 rounding."""
        found = {
            "attention": self.attention in LOSSY_ATTENTION,
            "weights": self.weights != "bf16",
            "linears": self.linears != "bf16",
            "vae_decode": self.vae_decode != "fp32",
            "step_cache": self.step_cache is not None,
            "lora": self.lora,
        }
        return tuple(name for name, is_lossy in found.items() if is_lossy)


TIERS: Mapping[str, Switches] = {
    "exact": Switches(),
    "near": Switches(vae_decode="bf16", absorb_audio="all"),
    "fast": Switches(vae_decode="bf16", linears="fp8"),
    # What the FusionX LoRA's authors recommend.
    "turbo": Switches(
        vae_decode="bf16", lora=True, steps=8, shift=2.0, text_guide_scale=1.0, audio_guide_scale=2.0
    ),
}
QUALITIES = tuple(TIERS)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A quality expanded. `overrides`: explicit switches that differ from what the word stands for."""

    quality: str = "exact"
    switches: Switches = field(default_factory=Switches)
    overrides: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For results, metadata and logs."""
        return {
            "quality": self.quality,
            "switches": asdict(self.switches),
            "overrides": list(self.overrides),
            "lossy": list(self.switches.lossy),
        }


def tier(quality: str) -> Switches:
    """The switches that a quality stands for. Raises QualityError."""
    if quality not in TIERS:
        msg = f"quality {quality!r} is not one of {', '.join(QUALITIES)}"
        raise QualityError(msg)
    return TIERS[quality]


def expand(quality: str = "exact", **explicit: Any) -> Setting:
    """The switches of `quality`, with those of `explicit` that are not None in their place.

    Raises QualityError for an unknown quality, switch or value, or switches that exclude each other.
    """
    base = tier(quality)
    unknown = sorted(set(explicit) - {f.name for f in fields(Switches)})
    if unknown:
        msg = f"there is no switch {', '.join(unknown)}"
        raise QualityError(msg)
    given = {name: value for name, value in explicit.items() if value is not None}
    overrides = tuple(name for name, value in given.items() if value != getattr(base, name))
    return Setting(quality=quality, switches=replace(base, **given), overrides=overrides)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the qualities ask of a machine. `fp8` says why fp8 products can't run, or is None.

    fp8_attention: the same of attention. device: "cpu" or a GPU's name; memory: bytes of a GPU, None for a
    CPU; loras: how many are merged. resident: whether the model stays there (else blocks are streamed).
    """

    device: str = "cpu"
    fp8: str | None = "a CPU has no fp8 matrix units"
    fp8_attention: str | None = "it needs a GPU of compute capability 9.0"
    memory: int | None = None
    loras: int = 0
    resident: bool = True

    @classmethod
    def here(cls, device: Any, *, loras: int = 0, resident: bool = True) -> Machine:
        """Look at a torch device."""
        import torch

        device = torch.device(device)
        if device.type != "cuda":
            return cls(device=str(device), loras=loras, resident=resident)
        capability = torch.cuda.get_device_capability(device)
        return cls(
            device=torch.cuda.get_device_name(device),
            fp8=fp8_problem(capability, torch.__version__),
            fp8_attention=fp8_attention_problem(capability),
            memory=torch.cuda.get_device_properties(device).total_memory,
            loras=loras,
            resident=resident,
        )

    def lacks(self, switches: Switches) -> tuple[str, ...]:
        """What is missing for `switches`, one line each; empty if they can run."""
        found = []
        if switches.lora and not self.loras:
            found.append("few steps need a distilled LoRA, and none is given (--lora_dir, MT_LORA)")
        if switches.linears == "fp8" and self.fp8 is not None:
            found.append(f"fp8 linears can't run on {self.device}: {self.fp8}")
        if switches.attention == "fp8" and self.fp8_attention is not None:
            found.append(f"attention fp8 can't run on {self.device}: {self.fp8_attention}")
        if switches.absorb_audio == "all" and self.memory is not None and self.memory < ABSORB_BYTES:
            need, have = ABSORB_BYTES >> 30, self.memory >> 30
            found.append(f"absorb_audio all needs a GPU of {need} GiB, {self.device} has {have}")
        return tuple(found)


def fp8_problem(capability: tuple[int, int], torch_version: str) -> str | None:
    """Why row-wise fp8 products can't run, or None. fp8 units: compute capability 8.9 on; `_scaled_mm` by
    rows: torch 2.5 on Hopper, 2.7 elsewhere.
    """
    from torch.torch_version import TorchVersion  # compares as packaging does

    if capability < (8, 9):
        return f"compute capability {capability[0]}.{capability[1]}, fp8 matrix units begin with 8.9"
    floor = "2.5" if capability == (9, 0) else "2.7"
    if TorchVersion(torch_version) < floor:
        return f"torch {torch_version}, scaled products by rows begin with {floor} on this GPU"
    return None


def fp8_attention_problem(capability: tuple[int, int]) -> str | None:
    """Why flash-attn 3 in fp8 can't run, or None."""
    from .flash3 import find

    if capability != (9, 0):
        return f"compute capability {capability[0]}.{capability[1]}, flash-attn 3 is for 9.0"
    found, absent = find()
    if found is None:
        return f"no flash-attn 3 ({'; '.join(f'{name}: {why}' for name, why in absent.items())})"
    return None if found.descales else f"{found.source} carries flash-attn 3 without fp8; install fa3-fwd"


def settle(setting: Setting, machine: Machine, *, frames: int = FRAMES, speakers: int = 1) -> Setting:
    """The setting as it will run on `machine`, see `resolve`. Raises QualityError, with what is missing and
    what works here.
    """
    switches = resolve(setting.switches, machine, frames=frames, speakers=speakers)
    missing = machine.lacks(switches)
    if missing:
        tiers = {
            name: resolve(each, machine, frames=frames, speakers=speakers) for name, each in TIERS.items()
        }
        works = ", ".join(name for name, each in tiers.items() if not machine.lacks(each))
        msg = f"quality {setting.quality!r}: {'; '.join(missing)}. What works here: {works}"
        raise QualityError(msg)
    return replace(setting, switches=switches)


def resolve(switches: Switches, machine: Machine, *, frames: int = FRAMES, speakers: int = 1) -> Switches:
    """The switches with what absorb_audio comes to, for clips of `frames` frames.

    "auto" is "all" on a GPU of 75 GiB and one for each latent frame of a clip (96 at 81 frames), "silence"
    from 56 GiB, else "none"; "none" also where blocks are streamed. "all" of two speakers is "silence": each
    of their tokens hears a mixture of its own, so that only the pass without speech has projections that can
    be multiplied.
    """
    wanted = switches.absorb_audio
    if wanted == "auto":
        gib = (machine.memory or 0) >> 30 if machine.resident else 0
        needs = AUTO_GIB | {"all": AUTO_GIB["all"] + 1 + (frames - 1) // 4}
        wanted = next((name for name, need in needs.items() if gib >= need), "none")
    if wanted == "all" and speakers > 1:
        wanted = "silence"
    return replace(switches, absorb_audio=wanted)
