"""Was the container under test shut in, as the engine that ran it tells? Pure.

Only the host's fact `container.settings` is asked (CONTRACTS "The suite"): what a run with a network, extra
rights or a writable root proves is something else than what the image does when it is used as `pick` says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mtbuild.prove.report import SmokeReport

__all__ = ["open_doors"]

_FACT = "container.settings"
_OUT = "/mtbuild/out"  # where the suite writes its report: the one place of the host's that it may write to


def open_doors(report: SmokeReport) -> tuple[str, ...]:
    """One line for each thing that a container of this run should not have had, or that nobody stated."""
    told = report.host_facts.get(_FACT)
    if not isinstance(told, dict):
        return (f"{_FACT}: not stated by the host",)
    lines: list[str] = []
    for run in report.runs:
        settings = told.get(run.user)
        if not isinstance(settings, dict):
            lines.append(f"{_FACT} (as {run.user}): not stated by the host")
        else:
            lines += [f"{line} (as {run.user})" for line in _open(settings)]
    return tuple(lines)


def _open(settings: Mapping[str, Any]) -> list[str]:
    """What stands open by one container's settings; a missing key counts as open."""
    options = [str(option) for option in _list(settings.get("security_opt"))]
    lines = [] if settings.get("network") == "none" else [f"network {settings.get('network')!r}, not 'none'"]
    if settings.get("read_only") is not True:
        lines.append("a writable root")
    if settings.get("privileged") is not False:
        lines.append("privileged")
    if "ALL" not in (str(name).upper() for name in _list(settings.get("cap_drop"))):
        lines.append("capabilities not dropped")
    if settings.get("cap_add") != []:
        lines.append(f"capabilities added: {settings.get('cap_add')}")
    if not {"no-new-privileges", "no-new-privileges:true", "no-new-privileges=true"} & set(options):
        lines.append("new privileges allowed")
    lines += [f"security option {option}" for option in options if "unconfined" in option]
    for key, word in (("memory_bytes", "memory"), ("pids", "processes")):
        limit = settings.get(key)
        if not isinstance(limit, int) or isinstance(limit, bool) or limit <= 0:
            lines.append(f"no limit of {word}")
    return lines + _shared(settings)


def _shared(settings: Mapping[str, Any]) -> list[str]:
    """What it shared with the host or others. Reports made before these were recorded don't state them."""
    lines: list[str] = []
    namespaces = settings.get("namespaces", {})
    for name, mode in sorted(namespaces.items()) if isinstance(namespaces, dict) else ():
        if str(mode) == "host" or str(mode).startswith("container:"):
            lines.append(f"{name} namespace of {mode}")
    binds = settings.get("binds", {})
    for place, mode in sorted(binds.items()) if isinstance(binds, dict) else ():
        if mode != "ro" and place != _OUT:
            lines.append(f"{place} writable from outside")
    return lines


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
