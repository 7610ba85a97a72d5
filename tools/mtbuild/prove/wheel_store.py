"""Wheels where a build finds them: downloaded once into the user's cache, then once into BuildKit's.

The download happens on the host, so that no index address, credential or CA ever enters a build, and a build
needs no network for its wheels. The build reads them from a cache mount (`mtbuild-wheels`): a build context
would be sent anew for every clone and folder, and would make a layer's cache key depend on wheels of others.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from mtbuild.errors import InfrastructureError, InputError
from mtbuild.plan.index import Index
from mtbuild.proc import run

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mtbuild.digest import Reference
    from mtbuild.paths import Paths
    from mtbuild.plan.lock import Lock, LockedWheel
    from mtbuild.prove.engine import Engine

__all__ = ["CACHE_ID", "download", "fill", "path_of"]

CACHE_ID = "mtbuild-wheels"
_AT_ONCE = 4  # downloads side by side: one rarely fills a line, many fill the disk's queue
_LIST_S, _FILL_S = 300, 1800
_NOTE_EVERY = 500_000_000  # bytes between two lines of progress


def path_of(wheel: LockedWheel, cache: Path) -> Path:
    """Where a wheel lies in the cache: by hash, so that two builds of one version don't meet."""
    return cache / wheel.sha256 / wheel.filename


def download(
    lock: Lock, cache: Path, *, index: Index | None = None, note: Callable[[str], None] = lambda _: None
) -> None:
    """Fetch the wheels that the cache lacks, each checked against its hash before it gets its name.

    Raises InputError where no index has a locked file any more, InfrastructureError for network and disk.
    """
    missing = [wheel for wheel in lock.wheels if not path_of(wheel, cache).is_file()]
    if not missing:
        return
    source = index if index is not None else Index.from_environment()
    total = sum(wheel.size for wheel in missing)
    note(f"downloading {len(missing)} wheels, {total / 1e9:.2f} GB")
    meter = _Meter(total, note)
    with ThreadPoolExecutor(max_workers=_AT_ONCE) as pool:
        # largest first: the last one to end is then a small one
        jobs = [
            pool.submit(_fetch, wheel, cache, source, meter)
            for wheel in sorted(missing, key=lambda w: -w.size)
        ]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            meter.stop = True
            pool.shutdown(wait=True, cancel_futures=True)
            raise


class _Meter:
    """Progress of all downloads together; `stop` ends them at the next piece."""

    def __init__(self, total: int, note: Callable[[str], None]) -> None:
        self.total, self.note, self.stop = total, note, False
        self._done: dict[str, int] = {}
        self._told = 0
        self._lock = threading.Lock()

    def add(self, key: str, done: int) -> None:
        if self.stop:
            msg = "stopped"
            raise InfrastructureError(msg)
        with self._lock:
            self._done[key] = done
            now = sum(self._done.values())
            if now - self._told >= _NOTE_EVERY:
                self._told = now
                self.note(f"downloaded {now / 1e9:.1f} of {self.total / 1e9:.1f} GB")


def _fetch(wheel: LockedWheel, cache: Path, index: Index, meter: _Meter) -> None:
    link = next((link for link in index.links(wheel.name) if link.sha256 == wheel.sha256), None)
    if link is None:
        msg = f"no configured index has {wheel.filename} with the locked hash"
        raise InputError(msg, fix="lock the cell again (`mtbuild lock`), or configure the index that has it")
    target = path_of(wheel, cache)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        index.fetcher.download(link.url, fresh, lambda done: meter.add(wheel.sha256, done))
        with fresh.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != wheel.sha256:
            msg = f"{wheel.filename} has sha256 {found}, the lock says {wheel.sha256}"
            raise InfrastructureError(
                msg, fix="the index or a proxy changed the file: don't use it; nothing was kept"
            )
        fresh.replace(target)
    finally:
        fresh.unlink(missing_ok=True)


def fill(
    lock: Lock,
    *,
    paths: Paths,
    engine: Engine,
    base: Reference,
    log: Path,
    note: Callable[[str], None] = lambda _: None,
) -> None:
    """Put what BuildKit's cache lacks of the lock's wheels into it; download first what is missing here."""
    there = _listed(engine, base, log)
    missing = [wheel for wheel in lock.wheels if there.get(f"{wheel.sha256}/{wheel.filename}") != wheel.size]
    if not missing:
        return
    download(lock, paths.wheels, note=note)
    note(f"handing {len(missing)} wheels to the engine, {sum(w.size for w in missing) / 1e9:.2f} GB")
    with tempfile.TemporaryDirectory(prefix="mtbuild-fill-") as temporary:
        context = Path(temporary)
        (context / "Dockerfile").write_text(_fill_dockerfile(missing), encoding="utf-8")
        run(
            [
                *engine.buildx, "build", "--progress=plain", f"--build-arg=BASE={base}", _nonce(),
                f"--build-context=wheels={paths.wheels}", "--output=type=cacheonly", context,
            ],
            timeout_s=_FILL_S,
            log=log,
            fix="`mtbuild doctor` checks engine and disk",
        )  # fmt: skip
    # The copy that BuildKit took in to read from is as large as the wheels and is not needed again.
    run([*engine.buildx, "prune", "--force", "--filter=type=source.local"], timeout_s=_LIST_S, check=False)


def _fill_dockerfile(wheels: Sequence[LockedWheel]) -> str:
    mounts = " ".join(
        f"--mount=type=bind,from=wheels,source={wheel.sha256}/{wheel.filename},"
        f"target=/in/{wheel.sha256}/{wheel.filename}"
        for wheel in wheels
    )
    # By hash, as here; each under its name only when it is whole.
    copy = (
        "set -e; cd /in; for file in */*.whl; do "
        'mkdir -p "/w/${file%/*}"; cp "$file" /w/.new; mv /w/.new "/w/$file"; done'
    )
    mount = f"--mount=type=cache,id={CACHE_ID},target=/w,sharing=locked"
    return f'ARG BASE\nFROM ${{BASE}}\nARG NONCE\nRUN --network=none {mount} {mounts} : "$NONCE"; {copy}\n'


def _nonce() -> str:
    """An argument that makes a step run anew. `--no-cache` would do too, but it also empties cache mounts."""
    return f"--build-arg=NONCE={secrets.token_hex(8)}"


def _listed(engine: Engine, base: Reference, log: Path) -> dict[str, int]:
    """`hash/name` and size of the files in BuildKit's cache; a random argument makes it look anew."""
    dockerfile = (
        "ARG BASE\nFROM ${BASE} AS list\nARG NONCE\n"
        f"RUN --network=none --mount=type=cache,id={CACHE_ID},target=/w "
        ': "$NONCE" && find /w -name "*.whl" -printf "%P %s\\n" > /wheels.txt\n'
        "FROM scratch\nCOPY --from=list /wheels.txt /\n"
    )
    with tempfile.TemporaryDirectory(prefix="mtbuild-list-") as temporary:
        context, out = Path(temporary, "context"), Path(temporary, "out")
        context.mkdir()
        (context / "Dockerfile").write_text(dockerfile, encoding="utf-8")
        run(
            [
                *engine.buildx, "build", "--progress=plain", f"--build-arg=BASE={base}",
                _nonce(), f"--output=type=local,dest={out}", context,
            ],
            timeout_s=_LIST_S,
            log=log,
            fix="`mtbuild doctor` checks engine, buildx and disk",
        )  # fmt: skip
        lines = (out / "wheels.txt").read_text(encoding="utf-8").splitlines()
    return {name: int(size) for name, _, size in (line.rpartition(" ") for line in lines)}
