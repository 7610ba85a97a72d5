"""Whether an extension of torch works with a torch, by what both wheels say. Pure; no table of pairs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from packaging.version import Version

from mtbuild.plan.floors import stable_abi, torch_floor

if TYPE_CHECKING:
    from mtbuild.plan.wheels import WheelFacts

__all__ = ["Odds", "odds", "worst"]


@dataclass(frozen=True, kw_only=True)
class Odds:
    """Why they don't fit. `severity` "degraded": imports, and attention runs by PyTorch's own kernels."""

    rule: Literal["built-for", "torch-floor", "cudart", "attention-schema"]
    severity: Literal["refused", "degraded"]
    message: str
    source: str


def odds(torch: WheelFacts, extension: WheelFacts) -> tuple[Odds, ...]:
    """Everything at odds between them that Requires-Dist does not tell, in the order of the checks."""
    checks = (_built_for, _floor, _cudart, _schema)
    found = [check(torch, extension) for check in checks]
    return tuple(one for one in found if one is not None)


def worst(torch: WheelFacts, extension: WheelFacts) -> Literal["fits", "degraded", "refused"]:
    """One word for `odds`."""
    severities = {one.severity for one in odds(torch, extension)}
    return "refused" if "refused" in severities else "degraded" if severities else "fits"


def _built_for(torch: WheelFacts, extension: WheelFacts) -> Odds | None:
    """Native code is bound to the torch it was built for; no version is compared at run time, so we do."""
    built = extension.cpp_lib
    if built is None:
        return None
    its, ours = Version(Version(built.torch).base_version), Version(Version(torch.version).base_version)
    stable = stable_abi(extension.name, extension.version)
    if its == ours or (stable and ours >= its):
        return None
    later = " or later" if stable else ""
    return Odds(
        rule="built-for",
        severity="refused",
        message=f"{extension.name} {extension.version} has native code built for torch {built.torch}{later}, "
        f"which does not load in torch {torch.local_version or torch.version}",
        source=f"{extension.filename}: {extension.name}/cpp_lib.json: {built.text}",
    )


def _floor(torch: WheelFacts, extension: WheelFacts) -> Odds | None:
    """Code for the stable ABI loads in every torch that has its symbols, so from some release on."""
    floor = torch_floor(extension.name, extension.version)
    if floor is None or Version(Version(torch.version).base_version) >= Version(floor[0]):
        return None
    return Odds(
        rule="torch-floor",
        severity="refused",
        message=f"{extension.name} {extension.version} has native code for torch {floor[0]} or later, "
        f"which does not load in torch {torch.local_version or torch.version}",
        source=f"{extension.filename}: {floor[1]}",
    )


def _cudart(torch: WheelFacts, extension: WheelFacts) -> Odds | None:
    """The loader finds one CUDA runtime in the process: the one that torch brings."""
    if torch.cuda is None:
        return None
    ours = f"libcudart.so.{Version(torch.cuda).major}"
    if torch.needed_cudart:
        ours = torch.needed_cudart[0][1]
    foreign = [
        (member, soname) for member, soname in extension.needed_cudart if _major(soname) != _major(ours)
    ]
    if not foreign:
        return None
    member, soname = foreign[0]
    # `_C.so` is loaded under a guard, and attention can go through PyTorch's kernels. A bundled
    # FlashAttention is loaded without one, so that `import xformers.ops` fails.
    guarded = all(name == f"{extension.name}/_C.so" for name, _ in foreign)
    falls_back = guarded and bool(extension.attention) and _schema(torch, extension) is None
    outcome = (
        "its own kernels are off; by its wheel, attention runs by PyTorch's operators, "
        "but on an H200 none of them answered (docs/decisions/0003): the smoke suite decides"
        if falls_back
        else "it can't be loaded"
    )
    return Odds(
        rule="cudart",
        severity="degraded" if falls_back else "refused",
        message=f"{extension.name} {extension.version} needs {soname}, "
        f"but torch {torch.local_version} brings {ours}: {outcome}",
        source=f"{extension.filename}: {member}: NEEDED {soname}; {torch.filename}: cuda = {torch.cuda!r}",
    )


def _schema(torch: WheelFacts, extension: WheelFacts) -> Odds | None:
    """xFormers asks PyTorch for its attention operators and checks that their schemas are what it knows."""
    for offered in torch.attention:
        operator = offered.partition("(")[0]
        wanted = [schema for schema in extension.attention if schema.partition("(")[0] == operator]
        if wanted and not any(_compatible(offered, schema) for schema in wanted):
            return Odds(
                rule="attention-schema",
                severity="refused",
                message=f"{extension.name} {extension.version} does not know {operator} of torch "
                f"{torch.local_version or torch.version}, so PyTorch's attention kernels are closed to it",
                source=f"expected {wanted[-1]}; {torch.filename} has {offered}",
            )
    return None


def _compatible(offered: str, wanted: str) -> bool:
    """Backward compatibility as torch defines it: the same arguments and results by name and type, in order;
    what was added must have a default."""
    new_arguments, new_results = _signature(offered)
    old_arguments, old_results = _signature(wanted)
    if new_results != old_results:
        return False
    rest = list(new_arguments)
    for argument in old_arguments:
        while rest and rest[0][0] != argument[0]:
            if not rest.pop(0)[1]:
                return False
        if not rest:
            return False
        rest.pop(0)
    return all(has_default for _, has_default in rest)


def _signature(schema: str) -> tuple[list[tuple[str, bool]], list[str]]:
    """([("Tensor query", has a default), …], ["Tensor output", …])."""
    inside, _, results = schema.partition("(")[2].partition(") -> ")
    arguments = [part.strip() for part in inside.split(", ") if part.strip() != "*"]
    pairs = [(part.partition("=")[0], "=" in part) for part in arguments]
    return pairs, [part.strip() for part in results.strip().strip("()").split(", ")]


def _major(soname: str) -> int:
    found = re.search(r"\.so\.(\d+)", soname)
    return int(found.group(1)) if found else -1
