"""Choose one released image for a GPU and a driver, and say why the others lost. Pure.

Match classes, best first: `same-gpu` (passed on this model), `same-sm` (passed on this capability),
`expected` (has code for it, never ran there: only on request). `known-bad` failed there and never wins. A run
that is too old vouches for nothing, an image whose proof is too old or which the gate now refuses is not
offered: `verify` would say no to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from packaging.version import InvalidVersion, Version

from mtbuild.errors import InputError, MtbuildError
from mtbuild.plan.floors import driver_reaches
from mtbuild.publish.gpus import covers, highest, normal_name, sm_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mtbuild.publish.catalog import Catalog, Entry, Run
    from mtbuild.publish.policy import Channel

__all__ = ["Candidate", "Choice", "NoPickError", "Wish", "pick"]

Match = Literal["same-gpu", "same-sm", "expected", "known-bad"]
_EXPIRED = "its evidence expired on"
_RANK: dict[Match, int] = {"same-gpu": 3, "same-sm": 2, "expected": 1, "known-bad": 0}


class NoPickError(MtbuildError):
    """Raised when no released image fits; `candidates` say why each lost."""

    def __init__(self, message: str, *, fix: str, candidates: tuple[Candidate, ...]) -> None:
        super().__init__(message, fix=fix)
        self.candidates = candidates


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a deployer has and wants. `vram_gib` is the GPU's memory; `expected` admits untried images."""

    gpu: str | None = None
    sm: str | None = None
    driver: str | None = None
    vram_gib: float | None = None
    channel: Channel = "verified"
    expected: bool = False

    @classmethod
    def of(
        cls,
        *,
        gpu: str | None,
        sm: str | None,
        driver: str | None,
        vram_gib: float | None,
        channel: Channel,
        expected: bool,
    ) -> Wish:
        """Checked and completed: the capability from the GPU's name. InputError names the option."""
        if gpu is not None and sm is None:
            sm = sm_of(gpu)
        for option, text in (("--sm", sm), ("--driver", driver)):
            try:
                parsed = Version(text) if text is not None else None
            except InvalidVersion as error:
                msg = f"{text!r} is not a version"
                raise InputError(
                    msg, where=option, fix="write for example --sm 8.9 --driver 570.86"
                ) from error
            if option == "--sm" and parsed is not None and len(parsed.release) != 2:
                msg = f"{text!r} is not a compute capability"
                raise InputError(msg, where=option, fix="write it as MAJOR.MINOR, for example --sm 8.9")
        if vram_gib is not None and not 0 < vram_gib < float("inf"):
            msg = f"{vram_gib:g} is no amount of GPU memory"
            raise InputError(msg, where="--vram", fix="write it in GiB, for example --vram 24")
        if sm is None and channel == "verified":
            msg = "for which GPU?"
            raise InputError(msg, fix='name it: --gpu "RTX 4090", or its capability: --sm 8.9')
        # A checked image ran on no GPU, so whoever asks for that channel asks for untried ones.
        expected = expected or channel == "checked"
        return cls(gpu=gpu, sm=sm, driver=driver, vram_gib=vram_gib, channel=channel, expected=expected)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One entry beside a wish: its match class, the run that gives it, and why it lost ("" if it may win)."""

    entry: Entry
    match: Match
    run: Run | None
    lost: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The winner, and the others best first, each with its reason."""

    repository: str
    wish: Wish
    winner: Candidate
    others: tuple[Candidate, ...]

    @property
    def name(self) -> str:
        """`repo:tag@sha256:…`."""
        entry = self.winner.entry
        return f"{self.repository}:{entry.image.tag}@{entry.digest}"

    @property
    def docker_run(self) -> str:
        """How to run it as it was tested: root read-only, every compile cache in an executable tmpfs."""
        return (
            "docker run --rm --gpus all --read-only --cap-drop ALL --security-opt no-new-privileges "
            f"--tmpfs /tmp --tmpfs /cache:exec,mode=1777 {self.name}"
        )

    def to_json(self) -> dict[str, Any]:
        """`pick --json`."""
        return {
            "schema": 1,
            "name": self.name,
            "repository": self.repository,
            "docker_run": self.docker_run,
            "match": self.winner.match,
            "expires": self.winner.entry.expires,
            "notes": list(self.winner.notes),
            "entry": self.winner.entry.to_json(),
            "others": [
                {
                    "tag": other.entry.image.tag,
                    "digest": str(other.entry.digest),
                    "match": other.match,
                    "why": other.lost,
                }
                for other in self.others
            ],
        }


def pick(catalog: Catalog, wish: Wish, *, now: datetime | None = None) -> Choice:
    """The best entry for a wish at the time `now` (aware; else this moment).

    Raises NoPickError with every entry's reason if none fits.
    """
    moment = (now or datetime.now(UTC)).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    candidates = [_candidate(entry, wish, moment) for entry in catalog.entries]
    candidates.sort(key=lambda candidate: (candidate.lost == "", *_worth(candidate)), reverse=True)
    if not candidates or candidates[0].lost:
        msg = f"no image in {catalog.repository} fits {_words(wish)}"
        reasons = "".join(f"\n  - {c.entry.image.tag}: {c.lost}" for c in candidates)
        raise NoPickError(
            msg + (reasons or ": nothing is released there"),
            fix=_fix(wish, candidates),
            candidates=tuple(candidates),
        )
    winner, *rest = candidates
    others = tuple(other if other.lost else _beaten(other, winner) for other in rest)
    return Choice(repository=catalog.repository, wish=wish, winner=winner, others=others)


def _candidate(entry: Entry, wish: Wish, now: str) -> Candidate:
    match, run = _match(entry, wish, now)
    notes: list[str] = []
    lost = ""
    # A catalog of schema 1 does not say what stands against an image; what failed on a CPU fails everywhere.
    mute = entry.expires is None and not entry.objections
    broken = next((one for one in entry.runs if mute and one.device is None and not one.passed), None)
    floor = highest(entry.image.floors, wish.sm)
    if wish.channel == "verified" and entry.channel != "verified":
        lost = "checked only: no GPU run stands behind it (--channel checked takes it)"
    elif match == "known-bad" and run is not None and run.device is not None:
        lost = f"failed on {run.device.name} ({run.finished}, evidence {run.evidence.short})"
    elif entry.objections:
        lost = f"refused since it came out: {'; '.join(entry.objections)}"
    elif entry.expires is not None and entry.expires < now:
        lost = f"{_EXPIRED} {entry.expires}: smoke it again and publish that"
    elif broken is not None:
        lost = f"failed its newest run on a CPU ({broken.finished}, evidence {broken.evidence.short})"
    elif wish.sm is not None and not covers(entry.image.targets, wish.sm):
        lost = f"has no code for sm_{wish.sm.replace('.', '')} (built for {', '.join(entry.image.targets)})"
    elif wish.driver is not None and not driver_reaches(wish.driver, floor.driver):
        lost = f"needs driver {floor.driver} for {floor.component}; yours is {wish.driver}"
    elif match == "expected" and not wish.expected:
        old = run is not None and run.device is not None and run.expires is not None
        lost = "never ran on this GPU nor its capability (--expected admits it)"
        if old and run is not None and run.device is not None:
            lost = f"its run on {run.device.name} is too old since {run.expires} (--expected admits it)"
    if mute:
        notes.append("this catalog (schema 1) does not say when evidence expires; `mtbuild verify` does")
    if run is not None and run.device is not None:
        if wish.driver is not None and Version(wish.driver) < Version(run.device.driver):
            notes.append(f"tried with driver {run.device.driver}, yours is older")
        if wish.vram_gib is not None and run.device.vram_gib and wish.vram_gib < 0.95 * run.device.vram_gib:
            notes.append(f"tried with {run.device.vram_gib:g} GiB of GPU memory, yours has {wish.vram_gib:g}")
    if entry.image.degraded:
        notes.append(f"degraded: {', '.join(entry.image.degraded)}")
    return Candidate(entry=entry, match=match, run=run, lost=lost, notes=tuple(notes))


def _match(entry: Entry, wish: Wish, now: str) -> tuple[Match, Run | None]:
    """The class, and the run that decides it: this model's own run before another model's.

    `expected` with a run: that one would vouch, were it not too old. A failure never is.
    """
    worn = [run for run in entry.runs if run.passed and run.expires is not None and run.expires < now]
    tried = [run for run in entry.runs if run.device is not None and run not in worn]
    if wish.gpu is not None:
        wanted = normal_name(wish.gpu)
        same = [run for run in tried if run.device is not None and normal_name(run.device.name) == wanted]
        if same:
            newest = max(same, key=lambda run: run.finished)
            return ("same-gpu" if newest.passed else "known-bad"), newest
    alike = [run for run in tried if run.device is not None and run.device.sm == wish.sm]
    if any(run.passed for run in alike):
        return "same-sm", max((run for run in alike if run.passed), key=lambda run: run.finished)
    if alike:
        return "known-bad", max(alike, key=lambda run: run.finished)
    name = normal_name(wish.gpu) if wish.gpu is not None else ""
    once = [run for run in worn if run.device is not None]
    once = [r for r in once if r.device and (normal_name(r.device.name) == name or r.device.sm == wish.sm)]
    return "expected", max(once, key=lambda run: run.finished, default=None)


def _worth(candidate: Candidate) -> tuple[int, bool, bool, Version, str, str]:
    image = candidate.entry.image
    return (
        _RANK[candidate.match],
        candidate.entry.channel == "verified",
        not image.degraded,
        Version(image.torch),
        image.created,
        image.tag,
    )


def _beaten(other: Candidate, winner: Candidate) -> Candidate:
    """Why an image that fits lost all the same."""
    here, there = other.entry.image, winner.entry.image
    if _RANK[other.match] < _RANK[winner.match]:
        why = f"{other.match}, beaten by {winner.match}"
    elif other.entry.channel != winner.entry.channel:
        why = f"{other.entry.channel} only, beaten by {winner.entry.channel}"
    elif here.degraded and not there.degraded:
        why = f"degraded ({', '.join(here.degraded)})"
    elif Version(here.torch) < Version(there.torch):
        why = f"torch {here.torch} is older than {there.torch}"
    else:
        why = f"built earlier ({here.created})"
    return Candidate(entry=other.entry, match=other.match, run=other.run, lost=why, notes=other.notes)


def _words(wish: Wish) -> str:
    parts = [wish.gpu or "any GPU" if wish.sm is None or wish.gpu else f"sm_{wish.sm.replace('.', '')}"]
    if wish.driver is not None:
        parts.append(f"driver {wish.driver}")
    return f"{' with '.join(parts)} in channel {wish.channel}"


def _fix(wish: Wish, candidates: Sequence[Candidate]) -> str:
    if any(c.lost.startswith(_EXPIRED) for c in candidates):
        return "smoke such a digest again (`mtbuild smoke REF@sha256:…`) and publish that evidence"
    if any(c.match == "expected" and "--expected" in c.lost for c in candidates):
        return "smoke one on such a GPU and publish that evidence, or add --expected to take an untried one"
    if wish.channel == "verified" and any(c.entry.channel == "checked" for c in candidates):
        return "smoke one on such a GPU and publish it, or add --channel checked to take an untried one"
    return "install a newer driver, or publish a cell whose targets hold this capability (`mtbuild matrix`)"
