"""Which file of a project a pin names: found, or why not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from mtbuild.errors import InputError, did_you_mean
from mtbuild.plan.tags import Target, admits_python, best_wheel, pythons_of

if TYPE_CHECKING:
    from mtbuild.plan.index import Index, Link

__all__ = ["Choice", "Missing", "choose", "specifiers"]

Why = Literal["project", "version", "python", "platform", "sdist"]
_MODERN = "2.39"  # a C library newer than any wheel of this family asks for


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A pin with no usable file: `pythons` it has wheels for, `versions` that would fit, newest first."""

    name: str
    wanted: str
    why: Why
    pythons: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()  # platform tags that it has, for a C library that is too old
    known: tuple[str, ...] = ()  # all versions, for "did you mean"
    requires_python: str | None = None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Either `link` or `missing`."""

    link: Link | None = None
    missing: Missing | None = None

    def or_raise(self, target: Target) -> Link:
        """The link; raises InputError with the reason where there is none."""
        if self.link is not None:
            return self.link
        assert self.missing is not None
        gone = self.missing
        if gone.why == "project":
            msg = f"the index has no project {gone.name!r}"
            raise InputError(msg, fix="correct its name, or configure the index that has it for uv or pip")
        if gone.why == "version":
            msg = f"the index has no {gone.name} {gone.wanted}.{did_you_mean(gone.wanted, gone.known)}"
            raise InputError(msg, fix=f"use one it has: {', '.join(_nearest(gone.wanted, gone.known))}")
        msg = f"{gone.name} {gone.wanted} has no wheel for {target.interpreter} with glibc {target.glibc}"
        raise InputError(msg, fix=f"Pythons it has wheels for: {', '.join(gone.pythons) or 'none'}")


def _nearest(wanted: str, known: tuple[str, ...], *, count: int = 8) -> tuple[str, ...]:
    """Of releases, newest first, those about `wanted`; the newest where that is a range."""
    if not _is_version(wanted):
        return known[:count]
    newer = sum(Version(one) > Version(wanted) for one in known)
    first = max(0, min(newer - count // 2, len(known) - count))
    return known[first : first + count]


def specifiers(pin: str) -> SpecifierSet:
    """A pin is a version ("2.7.1") or a specifier set ("<2"). Raises InputError."""
    try:
        return SpecifierSet(f"=={Version(pin)}", prereleases=True)
    except InvalidVersion:
        pass
    try:
        return SpecifierSet(pin)
    except InvalidSpecifier as error:
        msg = f"{pin!r} is neither a version nor a version range"
        raise InputError(msg, fix='write "2.7.1" or "<2"') from error


def choose(index: Index, project: str, pin: str, target: Target) -> Choice:
    """The newest version that the pin admits and that has a usable wheel, and of it the best file."""
    versions = index.versions(project)
    if not versions:
        return Choice(missing=Missing(name=project, wanted=pin, why="project"))
    exact = _is_version(pin)
    wanted = specifiers(pin)
    admitted = [v for v in versions if wanted.contains(v, prereleases=exact or None)]
    if not admitted:
        known = tuple(str(v) for v in versions if not v.is_prerelease)
        return Choice(missing=Missing(name=project, wanted=pin, why="version", known=known))
    for version in admitted:
        # A yanked file is taken only where its version is named exactly, by PEP 592.
        files = [link for link in versions[version] if exact or not link.yanked]
        link = best_wheel(files, target)
        if link is not None and admits_python(link.requires_python, target.python):
            return Choice(link=link)
    return Choice(missing=_why(project, pin, admitted, versions, target))


def usable(versions: dict[Version, list[Link]], target: Target) -> tuple[tuple[Version, Link], ...]:
    """Every released version with a wheel for the target, newest first."""
    found = []
    for version, files in versions.items():
        if version.is_prerelease:
            continue
        link = best_wheel([f for f in files if not f.yanked], target)
        if link is not None and admits_python(link.requires_python, target.python):
            found.append((version, link))
    return tuple(found)


def _why(
    name: str, pin: str, admitted: list[Version], versions: dict[Version, list[Link]], target: Target
) -> Missing:
    files = [link for version in admitted for link in versions[version]]
    wheels = [link for link in files if link.filename.endswith(".whl")]
    pythons = pythons_of(wheels, target)
    others = tuple(str(version) for version, _ in usable(versions, target))
    why: Why = "python"
    if not wheels:
        why = "sdist"
    elif not pythons and pythons_of(wheels, target, glibc=_MODERN):
        why = "platform"
    return Missing(
        name=name,
        wanted=pin,
        why=why,
        pythons=pythons or pythons_of(wheels, target, glibc=_MODERN),
        versions=others,
        tags=tuple(sorted({tag for link in wheels if (tag := _platform_tag(link)).endswith(target.machine)})),
        requires_python=next((link.requires_python for link in files if link.requires_python), None),
    )


def _platform_tag(link: Link) -> str:
    return link.filename.removesuffix(".whl").rpartition("-")[2]


def _is_version(pin: str) -> bool:
    try:
        Version(pin)
    except InvalidVersion:
        return False
    return True
