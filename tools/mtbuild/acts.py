"""The acts of this machine: its engine, its registries, its keys, and the state files between them."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import TYPE_CHECKING

from mtbuild.errors import MtbuildError
from mtbuild.prove.engine import connect
from mtbuild.prove.registries import registries
from mtbuild.run import Built, Proof, Released

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from mtbuild.paths import Paths
    from mtbuild.plan.cell import Cell
    from mtbuild.plan.matrix import Matrix
    from mtbuild.plan.planned import Planned
    from mtbuild.prove.build import Build
    from mtbuild.prove.engine import Engine
    from mtbuild.prove.registries import Registries
    from mtbuild.prove.report import SmokeReport, Tier
    from mtbuild.publish.dsse import Envelope
    from mtbuild.publish.keys import Keys
    from mtbuild.publish.promote import Promotion
    from mtbuild.run import Outcome

__all__ = ["LocalActs", "pick_line"]


class LocalActs:
    """Builds, proves and publishes here. Engine and registry are started at the first act that needs them."""

    def __init__(
        self,
        *,
        paths: Paths,
        matrix: Matrix,
        planned: Sequence[Planned],
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.paths = paths
        self.matrix = matrix
        self.note = note
        self._findings = {item.cell.id: item.findings for item in planned}
        self._builds: dict[str, Build] = {}
        self._proofs: dict[str, tuple[SmokeReport, Envelope]] = {}

    @cached_property
    def engine(self) -> Engine:
        return connect(self.paths, bootstrap=True, note=self.note)

    @cached_property
    def registries(self) -> Registries:
        return registries(self.matrix.registry, self.paths, note=self.note)

    @cached_property
    def keys(self) -> Keys:
        from mtbuild.publish.keys import Keys

        return Keys.ensure(self.paths.keys)

    def disk_plan(self, cells: Sequence[Cell]) -> tuple[str, ...]:
        """What building these would take; a cell without a lock is left to its own build's error."""
        from mtbuild.plan.lock import Lock
        from mtbuild.prove.disk import outlook
        from mtbuild.prove.layers import wheels_in_layers

        locks = []
        for cell in cells:
            with suppress(MtbuildError):
                locks.append(Lock.load(self.paths.images / cell.id))
        return outlook(
            locks,
            self.engine.facts.data_root,
            wheels=self.paths.wheels,
            registry=self.paths.registry if self.registries.embedded else None,
            built=wheels_in_layers(self.engine),
        )

    def build(self, cell: Cell, note: Callable[[str], None]) -> Built:
        """The cell's image in staging, by digest; `build.json` is its record."""
        from mtbuild.prove.build import build, committed

        before = datetime.now(UTC)
        committed(cell, self.paths)  # before engine and registry are started
        done = build(cell, paths=self.paths, engine=self.engine, staging=self.registries.staging, note=note)
        self._builds[cell.id] = done
        reused = datetime.fromisoformat(done.created) < before - timedelta(seconds=1)
        return Built(digest=str(done.ref.digest), size_bytes=done.size_bytes, reused=reused)

    def prove(self, cell: Cell, note: Callable[[str], None]) -> Proof:
        """A signed smoke report on the digest, from an earlier run where it still counts."""
        from mtbuild.prove.smoke import smoke, tier_here
        from mtbuild.publish.evidence import sign, statement

        build = self._builds[cell.id]
        folder = self.paths.cell(cell.id, build.build_id[:12])
        tier = tier_here("auto")
        kept = self._kept(build, folder, tier)
        if kept is not None:
            self._proofs[cell.id] = kept
            return Proof(problems=(), reused=True)
        out = folder / f"smoke-{tier}"
        report = smoke(build.ref, cell=cell, engine=self.engine, out=out, tier=tier, note=note)
        envelope = sign(statement(report, cell, build=build), self.keys.own)
        self._proofs[cell.id] = (report, envelope)
        # Signed evidence first: a report without it is taken for not done.
        envelope.write(folder / f"{_stem(report)}.sigstore.json")
        report.write(folder / f"{_stem(report)}.json")
        return Proof(problems=report.problems, reused=False)

    def attest_failure(self, cell: Cell, note: Callable[[str], None]) -> None:
        """Attach the evidence and let nothing out, also where runs elsewhere passed, or where this host's
        GPU did nothing and the channel `checked` would not have asked for it."""
        from mtbuild.publish.promote import RefusedError

        report, _ = self._proofs[cell.id]
        try:
            self._promote(cell, note, withhold="; ".join(report.problems))
        except RefusedError as error:
            note(f"not public, and known as failed: {error.verdict.digest}")

    def publish(self, cell: Cell, note: Callable[[str], None]) -> Released:
        """What the evidence allows: `verified` where a GPU vouched, else `checked`."""
        promotion = self._promote(cell, note)
        return Released(channel=promotion.channel, tags=promotion.tags, reused=not promotion.changed)

    def _promote(self, cell: Cell, note: Callable[[str], None], *, withhold: str = "") -> Promotion:
        from mtbuild.publish.promote import publish

        build = self._builds[cell.id]
        report, envelope = self._proofs[cell.id]
        return publish(
            build.ref,
            cell=cell,
            build=build,
            envelopes=[envelope],
            release=self.registries.release,
            channel="verified" if report.tier == "gpu" else "checked",
            paths=self.paths,
            keys=self.keys,
            note=note,
            aliases=self.matrix.aliases_of(cell),
            max_age_days=self.matrix.policy.max_age_days,
            withhold=withhold,
        )

    def _kept(self, build: Build, folder: Path, tier: Tier) -> tuple[SmokeReport, Envelope] | None:
        """An earlier passing report on this digest by this suite, young enough, with its envelope.

        One that the policy would not believe (its key was replaced since) would be refused at each run.
        """
        from mtbuild.prove.report import SmokeReport
        from mtbuild.prove.smoke import suite_digest
        from mtbuild.publish.dsse import Envelope
        from mtbuild.publish.evidence import verify

        oldest = datetime.now(UTC) - timedelta(days=self.matrix.policy.max_age_days)
        for path in sorted(folder.glob(f"smoke-{tier}-*.json")):
            if path.name.endswith(".sigstore.json"):
                continue
            try:
                report = SmokeReport.load(path)
                envelope = Envelope.load(path.with_suffix(".sigstore.json"))
                signed = verify(envelope, self.keys.trusted)
            except MtbuildError:
                continue  # half written, of an older schema or signed by another key: smoke again
            young = datetime.fromisoformat(report.finished) > oldest
            same = report.digest == build.ref.digest and report.suite == suite_digest()
            if same and young and signed.report == report and report.tier == tier and report.passed():
                return report, envelope
        return None


def _stem(report: SmokeReport) -> str:
    """`smoke-cpu-none` or `smoke-gpu-nvidia-h200`."""
    name = str(report.host_facts.get("gpu.name") or "none") if report.tier == "gpu" else "none"
    slug = "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-")
    return f"smoke-{report.tier}-{slug}"


def pick_line(acts: LocalActs, outcome: Outcome) -> str:
    """How a deployer gets what was published, and what that is; empty where nothing was."""
    if outcome.state not in ("published", "checked"):
        return ""
    channel = "verified" if outcome.state == "published" else "checked"
    found = f"{acts.registries.release}:{outcome.tags[0]}@{outcome.digest}"
    return f"pick: mtbuild pick --channel {channel}  →  {found}"
