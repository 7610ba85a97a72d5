"""V73 against the plain Dockerfile of its day, in one run: time, bytes to pull, bytes unpacked.

The plain one is a single `pip install` of the very same wheels on the same base, exported by default (gzip).
Both find the wheels in the engine's cache and take Debian's packages from the mirror; all layers are built
anew (the templates get a salt) and pushed to an empty registry. Then v72 (override) as the second cell, which
shares torch, and v73 once more with nothing changed.

    python benchmarks/build.py            # about 15 minutes and 35 GB; results in docs/benchmarks/build.*
    python benchmarks/build.py --skip-plain
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mtbuild.digest import Reference
from mtbuild.paths import Paths
from mtbuild.plan.lock import Lock
from mtbuild.plan.matrix import load
from mtbuild.plan.render import render
from mtbuild.proc import run
from mtbuild.prove import wheel_store
from mtbuild.prove.base import ensure_base, secret_flags
from mtbuild.prove.build import Build, build
from mtbuild.prove.engine import Engine, connect, retire
from mtbuild.prove.local_registry import ensure_registry, stop_registry
from mtbuild.prove.runtime_wheel import runtime_wheel

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "benchmarks"
AIMS = {"time": 0.5, "pulled": 0.72, "unpacked": 0.85, "second cell": 0.2}
PLAIN = """\
ARG BASE
FROM ${BASE}
RUN --mount=type=secret,id=apt.conf --mount=type=secret,id=apt.sources --mount=type=secret,id=apt.auth \\
    --mount=type=secret,id=ca.pem \\
    : SALT && export APT_CONFIG=/run/secrets/apt.conf DEBIAN_FRONTEND=noninteractive && apt-get update -qq \\
    && apt-get install -y -qq --no-install-recommends \\
        ca-certificates ffmpeg g++ gcc libc6-dev python3 python3-dev python3-pip \\
    && rm -rf /var/lib/apt/lists/*
COPY requirements.txt wheels.txt /tmp/
RUN --mount=type=cache,id=CACHE,target=/wheels,readonly --mount=type=bind,from=runtime,target=/runtime \\
    mkdir /dev/shm/w && xargs -I_ ln -s /wheels/_ /dev/shm/w/ < /tmp/wheels.txt \\
    && pip install --break-system-packages --no-cache-dir --no-index --no-deps --find-links /dev/shm/w \\
        --require-hashes -r /tmp/requirements.txt \\
    && pip install --break-system-packages --no-cache-dir --no-index --no-deps /runtime/*.whl
"""


def note(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def project(folder: Path, salt: str) -> Paths:
    """A copy of this project whose layers are all new; wheels and base come from the user's cache."""
    for name in ("matrix.yaml", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    for name in ("wan", "multitalk_runtime", "templates", "images"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("layer.j2", "runtime-deps.j2"):
        path = folder / "templates" / "partials" / file
        path.write_text(path.read_text().replace("set -eu\n", f"set -eu\n: {salt}\n"))
    paths = Paths(root=folder, cache=Paths.of(ROOT).cache)
    matrix = load(paths.matrix)
    for name in ("v72", "v73"):
        cell = matrix.cell(name)
        where = paths.images / cell.id
        render(cell, Lock.load(where), templates=paths.templates).write(where)
    return paths


def plain(paths: Paths, engine: Engine, base: Reference, staging: str, salt: str) -> dict[str, Any]:
    lock = Lock.load(paths.images / load(paths.matrix).cell("v73").id)
    with tempfile.TemporaryDirectory() as temporary:
        context, metadata = Path(temporary, "context"), Path(temporary, "metadata.json")
        context.mkdir()
        (context / "requirements.txt").write_text(lock.requirements())
        # By hash: other builds' wheels, same names among them, lie in the engine's cache too.
        wheels = "".join(f"{wheel.sha256}/{wheel.filename}\n" for wheel in lock.wheels)
        (context / "wheels.txt").write_text(wheels)
        text = PLAIN.replace("SALT", salt).replace("CACHE", wheel_store.CACHE_ID)
        (context / "Dockerfile").write_text(text)
        started = time.monotonic()
        run(
            [
                *engine.buildx, "build", "--progress=plain", "--provenance=false", "--sbom=false",
                f"--build-arg=BASE={base}", f"--metadata-file={metadata}",
                f"--build-context=runtime={runtime_wheel(paths).path.parent}",
                f"--output=type=image,name={staging}:plain,push=true",
                *secret_flags(paths, suite="bookworm"), context,
            ],
            timeout_s=3600,
            log=paths.root / "plain.log",
        )  # fmt: skip
        seconds = time.monotonic() - started
        digest = json.loads(metadata.read_text())["containerimage.digest"]
    ref = Reference.parse(f"{staging}@{digest}")
    raw = run([*engine.buildx, "imagetools", "inspect", "--raw", str(ref)], timeout_s=60).output
    pulled = sum(layer["size"] for layer in json.loads(raw)["layers"])
    return {"seconds": seconds, "pulled": pulled, "ref": ref}


def unpacked(engine: Engine, ref: Reference) -> int:
    """Bytes of all files, as `du` counts them, in a container of the image."""
    output: bytes = engine.client.containers.run(
        str(ref), ["-sxb", "/"], entrypoint="du", user="0", remove=True, network_mode="none"
    )
    return int(output.split()[0])


def measured(work: Path, *, with_plain: bool) -> dict[str, Any]:
    salt = secrets.token_hex(4)
    engine = connect(Paths.of(ROOT), bootstrap=True, note=note)
    paths = project(work, salt)
    registry = ensure_registry(paths, note=note)
    try:
        return _measured(engine, paths, registry, salt, with_plain=with_plain)
    finally:
        stop_registry(paths)  # its folder goes with the benchmark's, however that ends


def _measured(engine: Engine, paths: Paths, registry: str, salt: str, *, with_plain: bool) -> dict[str, Any]:
    staging = f"{registry}/bench"
    matrix = load(paths.matrix)
    v72, v73 = matrix.cell("v72"), matrix.cell("v73")
    note("warming: base, wheels")
    base = ensure_base(v73.base, engine=engine, registry=registry, paths=paths, note=note)
    for cell in (v72, v73):
        lock = Lock.load(paths.images / cell.id)
        wheel_store.fill(lock, paths=paths, engine=engine, base=base, log=paths.root / "fill.log", note=note)
    runtime_wheel(paths)
    rows: dict[str, Any] = {}
    load_before = os.getloadavg()[0]

    def timed(name: str, cell: Any, override: str | None = None) -> Build:
        started = time.monotonic()
        done = build(cell, paths=paths, engine=engine, staging=staging, override=override, note=note)
        rows[name] = {"seconds": time.monotonic() - started, "pulled": done.size_bytes}
        return done

    first = timed("v73", v73)
    second = timed("v72, sharing torch", v72, override="benchmark")
    timed("v73, nothing changed", v73)
    rows["v73"]["unpacked"] = unpacked(engine, first.ref)
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    rows["python -c pass"] = {"seconds": time.monotonic() - started}
    retire(engine, [first.ref, second.ref])
    if with_plain:
        note("plain Dockerfile")
        done = plain(paths, engine, base, staging, salt)
        ref = done.pop("ref")
        rows["plain"] = {**done, "unpacked": unpacked(engine, ref)}
        retire(engine, [ref])
    return {
        "schema": 1,
        "date": time.strftime("%Y-%m-%d"),
        "host": {
            "cpus": os.cpu_count(),
            "machine": platform.machine(),
            "engine": engine.facts.version,
            "load_before": round(load_before, 2),
            "load_after": round(os.getloadavg()[0], 2),
        },
        "rows": rows,
    }


def ratios(rows: dict[str, Any]) -> dict[str, float]:
    v73 = rows["v73"]
    found = {"second cell": rows["v72, sharing torch"]["seconds"] / v73["seconds"]}
    if "plain" in rows:
        found |= {
            "time": v73["seconds"] / rows["plain"]["seconds"],
            "pulled": v73["pulled"] / rows["plain"]["pulled"],
            "unpacked": v73["unpacked"] / rows["plain"]["unpacked"],
        }
    return {key: round(value, 3) for key, value in found.items()}


def markdown(result: dict[str, Any]) -> str:
    host = result["host"]
    lines = [
        "# Builds: V73 against the plain Dockerfile of its day",
        "",
        f"Made by `python benchmarks/build.py` on {result['date']}: {host['cpus']} cores, "
        f"Docker {host['engine']}, warm wheel cache, empty registry; load before {host['load_before']}, "
        f"after {host['load_after']}.",
        "",
        "| build | seconds | GB to pull | GB unpacked |",
        "|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        cells = [
            f"{row[key] / scale:.{digits}f}" if key in row else ""
            for key, scale, digits in (("seconds", 1, 2), ("pulled", 1e9, 2), ("unpacked", 1e9, 2))
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| ratio | measured | aim |", "|---|---|---|"]
    for key, value in result["ratios"].items():
        lines.append(f"| {key} | {value:.3f} | ≤ {AIMS[key]} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--skip-plain", action="store_true", help="only the own builds; nothing is written")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mtbuild-bench-", ignore_cleanup_errors=True) as temporary:
        result = measured(Path(temporary), with_plain=not words.skip_plain)
    result["ratios"] = ratios(result["rows"])
    print(markdown(result))
    print(json.dumps(result, indent=1))
    if not words.skip_plain:
        OUT.mkdir(parents=True, exist_ok=True)
        (OUT / "build.json").write_text(json.dumps(result, indent=1) + "\n")
        (OUT / "build.md").write_text(markdown(result))


if __name__ == "__main__":
    main()
