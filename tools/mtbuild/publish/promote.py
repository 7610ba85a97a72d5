"""Let a proven digest out: from staging to release, byte for byte, tags last.

The order is the promise (6): evidence and verdict lie in the release repository, read back, before the
first tag names the digest. Killed between any two steps, no tag names anything unproven, and the same
command goes on: every step is a no-op where it was done.
"""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from mtbuild.errors import InfrastructureError, InputError
from mtbuild.publish import catalog, evidence, vsa
from mtbuild.publish.gate import (
    RefusedError,
    believed,
    check_label,
    policy_for,
    refuse_forced,
    withheld,
)
from mtbuild.publish.gpus import floors
from mtbuild.publish.job import Job
from mtbuild.publish.policy import judge
from mtbuild.publish.referrers import attach, attached
from mtbuild.publish.registry import Repository, repository_name
from mtbuild.publish.tags import TagTakenError, alias_names, is_tagged, move_aliases, release_tag
from mtbuild.publish.transport import Transport
from mtbuild.publish.vsa import Image, Summary

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mtbuild.digest import Digest, Reference
    from mtbuild.paths import Paths
    from mtbuild.plan.cell import Cell
    from mtbuild.publish.dsse import Envelope
    from mtbuild.publish.evidence import BuildRecord, Statement
    from mtbuild.publish.keys import Keys
    from mtbuild.publish.policy import Channel, Policy, Verdict
    from mtbuild.publish.registry import Manifest

__all__ = [
    "Promotion",
    "RefusedError",
    "TagTakenError",
    "policy_for",
    "publish",
    "release_lock",
    "release_tag",
]

_LOCK_S = 600


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """What is out now: `tags` with the write-once tag first. `changed` is False where all of it was there."""

    repository: str
    digest: Digest
    tags: tuple[str, ...]
    channel: Channel
    verdict: Verdict
    changed: bool

    @property
    def name(self) -> str:
        """`repo:tag@sha256:…`, what `pick` prints."""
        return f"{self.repository}:{self.tags[0]}@{self.digest}"


def release_lock(paths: Paths, release: str) -> FileLock:
    """The lock that one machine's publishers of a repository share."""
    folder = paths.state / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / (re.sub(r"[^A-Za-z0-9._-]+", "_", release) + ".lock"), timeout=_LOCK_S)


def publish(
    ref: Reference,
    *,
    cell: Cell,
    build: BuildRecord,
    envelopes: Sequence[Envelope],
    release: str,
    channel: Channel,
    paths: Paths,
    keys: Keys,
    note: Callable[[str], None] = lambda _: None,
    aliases: Sequence[str] = (),
    max_age_days: int = 90,
    policy: Policy | None = None,
    now: datetime | None = None,
    withhold: str = "",
) -> Promotion:
    """Judge a staged digest by its evidence and let it out into `release` (`HOST/REPOSITORY`).

    `aliases` are moved only in channel `verified`, beside `<id>` and `<name>`. `policy` is what the channel
    demands by this tree (`policy_for`) unless another is given. `withhold` says why nothing may come out
    whatever the policy says: then only the evidence is attached. Raises RefusedError where
    the policy says no (the evidence is attached all the same: failures count), TagTakenError where the
    write-once tag names another digest, InfrastructureError where a registry fails.
    """
    moment = (now or datetime.now(UTC)).replace(microsecond=0)
    tag = release_tag(cell.id, build.build_id, channel)
    moving = alias_names(cell, channel, aliases)
    policy = policy or policy_for(cell, build, channel=channel, keys=keys, max_age_days=max_age_days)
    _check_inputs(ref, cell, build, release, policy)
    with ExitStack() as stack:
        near = stack.enter_context(Transport(ref.host))
        staging = Repository(near, ref.path)
        far = repository_name(release)
        # One registry, one transport: blobs are then mounted, not copied.
        there = near if far.host == ref.host else stack.enter_context(Transport(far.host))
        target = Repository(there, far.path)
        try:
            stack.enter_context(release_lock(paths, target.name))
        except Timeout as error:
            msg = f"another publication to {target.name} has held its lock for {_LOCK_S} s"
            raise InfrastructureError(
                msg, fix="wait for it to end, then run the same command again"
            ) from error
        return _publish(
            Job(
                staging=staging,
                target=target,
                digest=ref.digest,
                cell=cell,
                build=build,
                policy=policy,
                tag=tag,
                aliases=moving,
                paths=paths,
                keys=keys,
                now=moment,
                withhold=withhold,
                note=note,
            ),
            envelopes,
        )


def _check_inputs(ref: Reference, cell: Cell, build: BuildRecord, release: str, policy: Policy) -> None:
    if build.override is not None:
        refuse_forced(build.override)
    if build.ref.digest != ref.digest or build.cell_id != cell.id:
        msg = (
            f"the build record is about {build.ref.digest} of {build.cell_id}, not {ref.digest} of {cell.id}"
        )
        raise InputError(msg, fix="name the build record of this digest (--build FILE)")
    if policy.cell_id != cell.id or policy.build_id != build.build_id:
        msg = f"the policy is for build {policy.build_id[:12]} of {policy.cell_id}"
        raise InputError(msg, fix="make the policy for this cell and build")
    if release == ref.repository:
        msg = f"staging and release are the same repository, {release}"
        raise InputError(msg, fix="set registry.release in matrix.yaml to another one")


def _publish(job: Job, envelopes: Sequence[Envelope]) -> Promotion:
    manifest = job.staging.manifest(job.digest)
    check_label(job, manifest)
    is_tagged(job)
    staged = attached(job.staging, job.digest, note=job.note)
    released = attached(job.target, job.digest, note=job.note)
    known = {envelope.digest: envelope for envelope in (*envelopes, *staged, *released)}
    tests = {d: e for d, e in known.items() if evidence.predicate_type(e) == evidence.TEST_RESULT}
    statements = tuple(believed(job, tests.values()))
    verdict = judge(job.digest, statements, job.policy, now=job.now)
    counted = [e for d, e in sorted(tests.items()) if any(s.envelope == d for s in statements)]
    for envelope in counted:
        if envelope not in staged:
            attach(job.staging, manifest, envelope)
    fresh = [envelope for envelope in counted if envelope not in released]
    if verdict.passed and job.withhold:
        verdict = withheld(verdict, job.withhold)
    if not verdict.passed:
        _record_refusal(job, manifest, fresh, verdict)
        raise RefusedError(verdict)
    job.note(f"{job.digest} is {job.policy.channel} by {len(verdict.used)} run(s)")
    changed = _copy(job, manifest) or bool(fresh)
    for envelope in fresh:
        attach(job.target, manifest, envelope)
    changed |= _attach_verdict(job, manifest, verdict, statements)
    _read_back(job)
    if not is_tagged(job):  # again: copying took its time, and another machine holds another lock
        job.note(f"tag {job.target.name}:{job.tag}")
        job.target.put_manifest(manifest, tag=job.tag)
        changed = True
    moved, now_named = move_aliases(job, manifest)
    changed |= moved
    changed |= catalog.update(job.target, job.digest, job.keys, note=job.note, now=job.now)
    _write_verdict(job, verdict)
    return Promotion(
        repository=job.target.name,
        digest=job.digest,
        tags=(job.tag, *now_named),
        channel=job.policy.channel,
        verdict=verdict,
        changed=changed,
    )


def _record_refusal(job: Job, manifest: Manifest, fresh: Sequence[Envelope], verdict: Verdict) -> None:
    """Keep a failure where the next one looks: with the digest, also where it is released already."""
    if job.target.find_manifest(job.digest) is not None:
        for envelope in fresh:
            attach(job.target, manifest, envelope)
        catalog.update(job.target, job.digest, job.keys, note=job.note, now=job.now)
    _write_verdict(job, verdict)


def _copy(job: Job, manifest: Manifest) -> bool:
    """Blobs, then the manifest's own bytes, by digest only: nothing names it yet."""
    if job.target.find_manifest(manifest.digest) is not None:
        return False
    for child in manifest.children:
        _copy(job, job.staging.manifest(child.digest))
    for blob in manifest.blobs:
        job.note(f"copying {blob.digest.short} ({blob.size / 1e6:,.1f} MB)")
        job.target.copy_blob(job.staging, blob)
    job.target.put_manifest(manifest)
    return True


def _attach_verdict(job: Job, manifest: Manifest, verdict: Verdict, statements: Sequence[Statement]) -> bool:
    """Sign the verdict, bound to the release repository; one that says the same already stands."""
    summary = Summary(
        subject=job.digest,
        repository=job.target.name,
        policy=job.policy,
        verified_at=verdict.at,
        inputs=verdict.used,
        image=_image(job, verdict, manifest, statements),
    )
    _, standing = catalog.proof_of(job.target, job.digest, job.keys.trusted)
    for held in standing:
        if (held.policy, held.inputs, held.image) == (summary.policy, summary.inputs, summary.image):
            return False
    attach(job.target, manifest, vsa.sign(summary, job.keys.own))
    return True


def _image(job: Job, verdict: Verdict, manifest: Manifest, statements: Sequence[Statement]) -> Image:
    cell, build = job.cell, job.build
    # For which CUDA xFormers was compiled is the image's word; it can only raise the driver floor.
    told = {
        s.report.image_facts.get("suite.xformers.built_for_cuda")
        for s in statements
        if s.envelope in verdict.used
    }
    built = sorted(f"{code // 100}.{code % 100}" for code in told if isinstance(code, int))
    return Image(
        cell_id=cell.id,
        cell_name=cell.name,
        build_id=build.build_id,
        tag=job.tag,
        flavour=cell.flavour,
        platform=cell.platform,
        python=cell.python,
        torch=cell.torch,
        cuda=cell.cuda,
        triton=cell.triton,
        xformers=cell.xformers,
        targets=cell.targets,
        floors=floors(
            torch=cell.torch,
            cuda=cell.cuda,
            triton=cell.triton,
            extensions=tuple((f"xformers {cell.xformers}", cuda) for cuda in built),
        ),
        degraded=verdict.degraded,
        size_bytes=sum(blob.size for blob in manifest.blobs),
        created=build.created,
    )


def _read_back(job: Job) -> None:
    """The last look before a tag: what lies in the release repository is enough for a stranger to say yes."""
    job.target.manifest(job.digest)
    statements, summaries = catalog.proof_of(job.target, job.digest, job.keys.trusted)
    again = judge(job.digest, statements, job.policy, now=job.now)
    if not again.passed or not any(s.image.tag == job.tag for s in summaries):
        msg = f"{job.target.name} does not hold the evidence that was just attached to {job.digest}"
        raise InfrastructureError(msg, fix="nothing was tagged; run the same command again")


def _write_verdict(job: Job, verdict: Verdict) -> None:
    folder = job.paths.cell(job.cell.id, job.build.build_id[:12])
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "verdict.json.part"
    part.write_text(json.dumps(verdict.to_json(), indent=2) + "\n", encoding="utf-8")
    part.replace(folder / "verdict.json")
