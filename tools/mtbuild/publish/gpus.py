"""What is known of GPUs and drivers without asking one: capability by name, an image's driver floor."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from packaging.version import Version

from mtbuild.errors import InputError, did_you_mean
from mtbuild.plan.floors import driver_floor

__all__ = ["Floor", "covers", "floors", "highest", "normal_name", "sm_of"]

_VENDOR = re.compile(r"\b(nvidia|geforce|tesla|quadro)\b", re.IGNORECASE)
# What may follow a model's name and leave its capability as it is: memory, form factor, a mobile part.
_SUFFIX = re.compile(
    r"(\d+gb|sxm\d?|pcie|nvl|hbm\d?e?|ti|super|max-?q|laptop|gpu|ac|mobile|server|workstation|edition|generation|d|v2)*\Z"
)


@dataclass(frozen=True, kw_only=True)
class Floor:
    """The oldest driver that one component of an image runs on, from a capability on ("" for all)."""

    component: str
    driver: str
    from_sm: str = ""


@cache
def _data(name: str) -> dict[str, Any]:
    text = files("mtbuild.publish").joinpath("data", name).read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    return data


def normal_name(name: str) -> str:
    """A GPU's name without vendor, brand, case, spaces and dashes: how two are compared."""
    return re.sub(r"[\s_-]+", "", _VENDOR.sub(" ", name)).lower()


def sm_of(name: str) -> str:
    """Compute capability by name, "8.9"; InputError with the nearest name if it is not in the table."""
    wanted = normal_name(name)
    table = {
        normal_name(known): (sm, known) for sm, names in _data("gpus.json")["sm"].items() for known in names
    }
    for known in sorted(table, key=len, reverse=True):
        if wanted.startswith(known) and _SUFFIX.match(wanted[len(known) :]):
            return str(table[known][0])
    near = did_you_mean(wanted, table)
    for known in table:
        near = near.replace(repr(known), repr(table[known][1]))
    msg = f"the GPU {name!r} is not in the table.{near}"
    raise InputError(msg, fix="give its compute capability: --sm 8.9 (nvidia-smi --query-gpu=compute_cap)")


def covers(targets: tuple[str, ...], sm: str) -> bool:
    """Whether code for `targets` runs on `sm`: a cubin runs on its own major, from its own minor on."""
    want = Version(sm)
    return any(
        have.major == want.major and have.minor <= want.minor
        for have in (Version(target) for target in targets)
    )


def floors(
    *, torch: str, cuda: str, triton: str, extensions: tuple[tuple[str, str], ...] = ()
) -> tuple[Floor, ...]:
    """Driver floors of torch's CUDA, the extensions' CUDA ((name, "12.8"), …) and the ptxas Triton uses."""
    found = [_floor(f"torch {torch} (CUDA {cuda})", cuda)]
    found += [_floor(f"{name} (CUDA {built})", built) for name, built in extensions]
    held = ""
    for sm in sorted(_data("gpus.json")["sm"], key=Version):  # Triton may choose its ptxas by capability
        known = driver_floor(cuda=None, triton=triton, sm=sm)
        if known is not None and known[0] != held:
            component = f"ptxas of triton {triton}"
            found.append(Floor(component=component, driver=known[0], from_sm=sm if held else ""))
            held = known[0]
    return tuple(found)


def _floor(component: str, cuda: str) -> Floor:
    known = driver_floor(cuda=cuda)
    if known is None:
        msg = f"no driver floor is known for CUDA {cuda}"
        raise InputError(msg, where="plan/data/floors.json", fix="add that CUDA major with its source")
    return Floor(component=component, driver=known[0])


def highest(known: tuple[Floor, ...], sm: str | None) -> Floor:
    """The floor that decides on a GPU of this capability (None: on any)."""
    on = [f for f in known if not f.from_sm or sm is None or Version(sm) >= Version(f.from_sm)]
    return max(on, key=lambda floor: Version(floor.driver))
