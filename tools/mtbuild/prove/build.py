"""One cell into one image: BuildKit builds it and pushes it to staging, and its digest comes back.

The digest is taken from BuildKit's metadata file, once, and read back from the registry; nothing later
looks at a tag. A build is known by what goes into it (`buildid`): if staging still serves the digest that
these very inputs gave, nothing is built.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtbuild.digest import Digest, Reference
from mtbuild.errors import CommandError, InfrastructureError, InputError
from mtbuild.plan.lock import Lock, check, runtime_requirements
from mtbuild.plan.render import MISSING_WHEEL, render
from mtbuild.plan.resolve import uv_program
from mtbuild.proc import run
from mtbuild.prove import wheel_store
from mtbuild.prove.base import ensure_base, secret_flags
from mtbuild.prove.build_log import BuildFailed, Progress, failure, step_output
from mtbuild.prove.buildid import build_id
from mtbuild.prove.disk import preflight
from mtbuild.prove.engine import retire
from mtbuild.prove.layers import wheels_in_layers
from mtbuild.prove.runtime_wheel import RuntimeWheel, runtime_wheel

if TYPE_CHECKING:
    from collections.abc import Callable

    from mtbuild.paths import Paths
    from mtbuild.plan.cell import Cell
    from mtbuild.prove.engine import Engine

__all__ = ["Build", "BuildFailed", "build", "builds_of", "committed"]

_BUILD_S = 7200
_TRIES = 3
# zstd: pulls are a fifth smaller than gzip's and unpack three times as fast; higher levels cost more than
# they save. Forced, so that layers which exist as gzip are not taken over as they are.
OUTPUT = {
    "compression": "zstd",
    "compression-level": "3",
    "force-compression": "true",
    "oci-mediatypes": "true",
}


@dataclass(frozen=True, kw_only=True)
class Build:
    """A finished build; `build.json`, schema 1. Sizes in bytes (`size_bytes` is what a pull fetches).

    `override` is the reason given for building a refused cell: such a build can never be published.
    `created` is ISO 8601.
    """

    cell_id: str
    cell_name: str
    build_id: str
    ref: Reference
    config_digest: Digest
    base_digest: Digest
    size_bytes: int
    seconds: float
    override: str | None
    created: str
    runtime_sha256: str = ""

    @property
    def build12(self) -> str:
        return self.build_id[:12]

    def to_json(self) -> str:
        """One JSON object, with a newline at its end."""
        document = {"schema": 1, **asdict(self)}
        document["ref"] = str(self.ref)
        document["config_digest"] = str(self.config_digest)
        document["base_digest"] = str(self.base_digest)
        return json.dumps(document, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str = "build.json") -> Build:
        """Raises InputError for anything that `to_json` did not write."""
        try:
            data: dict[str, Any] = json.loads(text)
            if data.pop("schema") != 1:
                msg = "written by another version of mtbuild"
                raise InputError(msg, where=where, fix="build the cell again")
            data["ref"] = Reference.parse(data["ref"])
            data["config_digest"] = Digest.parse(data["config_digest"])
            data["base_digest"] = Digest.parse(data["base_digest"])
            data.pop("wheels", None)  # of older records; BuildKit is asked instead (`layers`)
            return cls(**data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            msg = f"not a build record: {error}"
            raise InputError(msg, where=where, fix="remove the file and build the cell again") from error

    @classmethod
    def load(cls, file: Path) -> Build:
        """From its state file; raises InputError for a broken one and OSError for a missing one."""
        return cls.from_json(file.read_text(encoding="utf-8"), where=str(file))


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """All that a build is made from."""

    cell: Cell
    lock: Lock
    dockerfile: str
    base: Reference
    runtime: RuntimeWheel | None
    labels: dict[str, str]

    @property
    def id(self) -> str:
        return build_id(
            dockerfile=self.dockerfile,
            lock=self.lock.requirements(),
            base=self.base.digest,
            runtime_sha256=self.runtime.sha256 if self.runtime else "",
            platform=self.cell.platform,
            output={**OUTPUT, **self.labels, "epoch": str(self.lock.epoch)},
        )


def build(
    cell: Cell,
    *,
    paths: Paths,
    engine: Engine,
    staging: str,
    override: str | None = None,
    base: Reference | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Build:
    """Build a cell from its committed files and push it to `<staging>:bld-<build12>`.

    Whether the cell may be built at all was decided before (mtbuild.plan.compat); `override` says why a
    refused one is built anyway. `base` replaces the cell's own base, for a `minimal` cell on a given image.
    Raises InputError for an out-of-date lock or Dockerfile, NotEnoughSpace, BuildFailed.
    """
    started = time.monotonic()
    plan = _plan(cell, paths, engine, staging, override, base, note)
    folder = paths.cell(cell.id, plan.id[:12])
    known = _known(folder / "build.json", plan, staging, engine)
    if known is not None:
        note(f"{cell.name}: nothing changed since {known.created}: {known.ref}")
        return known
    _preflight(plan, paths, engine)
    paths.logs.mkdir(parents=True, exist_ok=True)
    log = paths.logs / f"build-{cell.id}-{plan.id[:12]}.log"
    log.unlink(missing_ok=True)
    digest = _with_wheels(plan, paths, engine, staging, log, note)
    ref = replace(_repository(staging), digest=digest)
    manifest = _served(ref, engine)
    if manifest is None:
        msg = f"the registry does not serve what BuildKit pushed: {ref}"
        raise InfrastructureError(msg, fix="check the registry's disk and log, then build again")
    done = Build(
        cell_id=cell.id,
        cell_name=cell.name,
        build_id=plan.id,
        ref=ref,
        config_digest=Digest.parse(manifest["config"]["digest"]),
        base_digest=plan.base.digest,
        size_bytes=sum(int(layer["size"]) for layer in manifest["layers"]),
        seconds=round(time.monotonic() - started, 1),
        override=override,
        created=datetime.now(UTC).isoformat(timespec="microseconds"),
        runtime_sha256=plan.runtime.sha256 if plan.runtime else "",
    )
    _write(folder / "build.json", done.to_json())
    # 9 GB each in the engine: what this build replaces goes; staging still has it.
    retire(engine, (old.ref for old in builds_of(paths, cell.id) if old.ref.digest != ref.digest))
    note(f"{cell.name}: {done.size_bytes / 1e9:.2f} GB in {done.seconds:.0f} s: {ref}")
    return done


def builds_of(paths: Paths, cell_id: str = "*") -> tuple[Build, ...]:
    """All builds that have a readable record here, newest first."""
    found = []
    for file in (paths.state / "cells").glob(f"{cell_id}/*/build.json"):
        try:
            found.append(Build.load(file))
        except (InputError, OSError):
            continue  # half written by another version: as if it were not there
    return tuple(sorted(found, key=lambda one: one.created, reverse=True))


def committed(cell: Cell, paths: Paths) -> tuple[Lock, str]:
    """The cell's lock and Dockerfile as they are committed; InputError where matrix or templates moved on.

    Needs no engine and no registry: ask before either is started.
    """
    folder = paths.images / cell.id
    check(cell, folder, runtime=runtime_requirements(paths.root))
    lock = Lock.load(folder)
    rendered = render(cell, lock, templates=paths.templates)
    rendered.check(folder)
    return lock, rendered.dockerfile


def _plan(
    cell: Cell,
    paths: Paths,
    engine: Engine,
    staging: str,
    override: str | None,
    base: Reference | None,
    note: Callable[[str], None],
) -> _Plan:
    lock, dockerfile = committed(cell, paths)
    runtime = runtime_wheel(paths, note=note) if cell.flavour == "runtime-deps" else None
    if base is None:
        base = _base(cell, paths, engine, staging, note)
    labels = {}
    if runtime is not None:
        labels["mtbuild.runtime.sha256"] = runtime.sha256
    if override is not None:
        labels["mtbuild.override"] = override
    return _Plan(cell=cell, lock=lock, dockerfile=dockerfile, base=base, runtime=runtime, labels=labels)


def _base(cell: Cell, paths: Paths, engine: Engine, staging: str, note: Callable[[str], None]) -> Reference:
    """The base by digest; a base of kind `cell` is the newest build here of the cell that `ref` names."""
    if cell.base.kind != "cell":
        return ensure_base(
            cell.base, engine=engine, registry=staging.rpartition("/")[0], paths=paths, note=note
        )
    newest = next((b for b in builds_of(paths) if cell.base.ref in (b.cell_id, b.cell_name)), None)
    if newest is None:
        msg = f"its base is the image of cell {cell.base.ref!r}, which was not built here"
        raise InputError(msg, where=cell.where or cell.name, fix=f"run `mtbuild build {cell.base.ref}` first")
    return newest.ref


def _preflight(plan: _Plan, paths: Paths, engine: Engine) -> None:
    local = plan.base.host.startswith(("127.", "localhost"))
    preflight(
        plan.lock,
        engine.data_root,
        wheels=paths.wheels,
        registry=paths.registry if local else None,
        built=wheels_in_layers(engine),
    )


def _with_wheels(
    plan: _Plan, paths: Paths, engine: Engine, staging: str, log: Path, note: Callable[[str], None]
) -> Digest:
    """Hand the engine the wheels and build; again if it dropped them in between to make room.

    BuildKit may clear a cache whenever no step is using it, and only the layer that needs a wheel finds out.
    """
    for _ in range(_TRIES):
        if plan.lock.wheels:
            wheel_store.fill(plan.lock, paths=paths, engine=engine, base=plan.base, log=log, note=note)
        try:
            return _buildx(plan, paths, engine, staging, log, note)
        except BuildFailed as error:
            if f"{MISSING_WHEEL}: " not in step_output(error.output):
                raise
            note(f"{plan.cell.name}: the engine dropped wheels to make room")
    msg = f"the engine drops wheels from its cache faster than {plan.cell.name} can be built"
    raise InfrastructureError(
        msg,
        fix="raise the engine's cache limit (builder.gc.defaultKeepStorage), or run `mtbuild engine prune`",
    )


def _buildx(
    plan: _Plan, paths: Paths, engine: Engine, staging: str, log: Path, note: Callable[[str], None]
) -> Digest:
    """Run the build; the digest is what BuildKit says it pushed."""
    cell = plan.cell
    output = ",".join(f"{key}={value}" for key, value in OUTPUT.items())
    with tempfile.TemporaryDirectory(prefix="mtbuild-build-") as temporary:
        context, metadata = Path(temporary, "context"), Path(temporary, "metadata.json")
        context.mkdir()  # empty: what goes in comes from named contexts and the wheel cache
        dockerfile = Path(temporary, "Dockerfile")
        dockerfile.write_text(plan.dockerfile, encoding="utf-8")
        words: list[str | Path] = [
            *engine.buildx, "build", "--progress=plain", f"--platform={cell.platform}",
            "--provenance=false", "--sbom=false",
            f"--file={dockerfile}", f"--metadata-file={metadata}",
            f"--output=type=image,name={staging}:bld-{plan.id[:12]},push=true,{output}",
            f"--build-arg=BASE={plan.base}", f"--build-arg=SOURCE_DATE_EPOCH={plan.lock.epoch}",
            f"--build-context=uv={uv_program().parent}",
            *secret_flags(paths, suite=_suite(plan, engine)),
            *(f"--label={key}={value}" for key, value in {**plan.labels, "mtbuild.build": plan.id}.items()),
        ]  # fmt: skip
        if plan.runtime is not None:
            words.append(f"--build-context=runtime={plan.runtime.path.parent}")
        try:
            run([*words, context], timeout_s=_BUILD_S, log=log, on_line=Progress(cell.name, note))
        except CommandError as error:
            raise failure(error, cell, log) from error
        try:
            return Digest.parse(str(json.loads(metadata.read_text())["containerimage.digest"]))
        except (OSError, ValueError, KeyError) as error:
            msg = f"BuildKit's metadata names no digest: {error}"
            raise InfrastructureError(msg, fix="check the buildx version: `mtbuild doctor`") from error


def _suite(plan: _Plan, engine: Engine) -> str:
    """The Debian release whose packages the image takes; empty for a foreign image: it has its own sources.

    An image of ours holds no package source, but a label that says what it was made from.
    """
    if plan.cell.base.suite:
        return plan.cell.base.suite
    words = [*engine.buildx, "imagetools", "inspect", "--format", "{{json .Image}}", str(plan.base)]
    image: Any = json.loads(run(words, timeout_s=120).output)
    labels = (image.get("config") or {}).get("Labels") or {}
    return str(labels.get("mtbuild.suite", ""))


def _known(file: Path, plan: _Plan, staging: str, engine: Engine) -> Build | None:
    """The earlier build of the same inputs, if staging still serves exactly that digest."""
    try:
        known = Build.load(file)
    except (OSError, InputError):
        return None
    if known.build_id != plan.id or known.ref.repository != staging:
        return None
    return known if _served(known.ref, engine) is not None else None


def _served(ref: Reference, engine: Engine) -> dict[str, Any] | None:
    """The manifest, if the registry serves exactly this digest; asked with the user's registry logins."""
    try:
        done = run([*engine.buildx, "imagetools", "inspect", "--raw", str(ref)], timeout_s=120)
    except CommandError:
        return None
    if hashlib.sha256(done.output.encode()).hexdigest() != ref.digest.hex:
        return None
    manifest: dict[str, Any] = json.loads(done.output)
    return manifest


def _repository(staging: str) -> Reference:
    """`HOST/PATH` as a reference whose digest is still to be set."""
    return Reference.parse(f"{staging}@sha256:{'0' * 64}")


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_suffix(".new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(file)
