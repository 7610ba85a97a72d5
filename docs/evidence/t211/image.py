"""On the GPU host, after stage.py: import the base, build the cell on it, push both, record the build.

    python3 image.py CELL STAGE

The base is an image of its own, known by its digest; the cell's image adds the Python packages, a layer a
processor (a layer is compressed by one thread), and takes its environment, labels, user and command from the
cell's rendered Dockerfile. The build's record is what `mtbuild smoke` and `mtbuild publish` look for. Prints
the reference by digest.
"""

# ruff: noqa: T201
from __future__ import annotations

import hashlib
import json
import re
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mtbuild.digest import Digest, Reference
from mtbuild.paths import Paths
from mtbuild.plan.matrix import load
from mtbuild.proc import run
from mtbuild.prove.build import Build
from mtbuild.prove.buildid import build_id
from mtbuild.prove.engine import Engine, connect, retire
from mtbuild.prove.registries import registries

HERE = Path(__file__).parent
# zstd-1: the host's time counts here, not the pull's
OUTPUT = {
    "compression": "zstd",
    "compression-level": "1",
    "force-compression": "true",
    "oci-mediatypes": "true",
}
SETTINGS = re.compile(r"^(?:ENV|LABEL|USER|CMD|ENTRYPOINT) (?:.*\\\n)*.*$", re.MULTILINE)


def say(text: str) -> None:
    print(f"== {text}", file=sys.stderr, flush=True)


def buildx(engine: Engine, dockerfile: str, name: str, contexts: dict[str, Path], *more: str) -> Digest:
    """Build and push; the digest is BuildKit's word."""
    output = ",".join(f"{key}={value}" for key, value in OUTPUT.items())
    with tempfile.TemporaryDirectory() as folder:
        place, empty = Path(folder), Path(folder, "empty")
        empty.mkdir()
        (place / "Dockerfile").write_text(dockerfile)
        run(
            [
                *engine.buildx, "build", "--progress=plain", "--provenance=false", "--sbom=false",
                f"--file={place / 'Dockerfile'}", f"--metadata-file={place / 'metadata.json'}",
                f"--output=type=image,name={name},push=true,{output}",
                *(f"--build-context={key}={path}" for key, path in contexts.items()), *more, empty,
            ],
            timeout_s=500,
            on_line=lambda line: say(line) if re.search(r" DONE [1-9]|ERROR", line) else None,
        )  # fmt: skip
        return Digest.parse(json.loads((place / "metadata.json").read_text())["containerimage.digest"])


def manifest_of(engine: Engine, ref: Reference) -> str:
    """Its very bytes: whoever keeps them can hash them again."""
    text = run([*engine.buildx, "imagetools", "inspect", "--raw", str(ref)], timeout_s=60).output
    assert hashlib.sha256(text.encode()).hexdigest() == ref.digest.hex, "not what was pushed"
    return text


def main() -> None:
    name, stage = sys.argv[1], Path(sys.argv[2]).resolve()
    started = time.monotonic()
    paths = Paths.of(Path.cwd())
    matrix = load(paths.matrix)
    cell = matrix.cell(name)
    engine = connect(paths, note=say)
    staging = registries(matrix.registry, paths, note=say).staging
    bases = f"{staging.rpartition('/')[0]}/mt-base"
    text = (HERE / "base.Dockerfile").read_text()
    base = buildx(engine, text, f"{bases}:{cell.base.name}", {"root": stage / "root"})
    say(f"base {bases}@{base} after {time.monotonic() - started:.0f} s")
    layers = {path.name: path for path in sorted(stage.glob("layer*"))}
    copies = "".join(f"COPY --from={layer} / /\n" for layer in layers)
    settings = "\n".join(SETTINGS.findall((paths.images / cell.id / "Dockerfile").read_text()))
    dockerfile = f"ARG BASE\nFROM ${{BASE}}\n{copies}{settings}\n"
    inventory = (stage / "inventory.txt").read_text()
    (runtime,) = (stage.parent / "image").glob("multitalk_runtime-*.whl")
    labels = {"mtbuild.runtime.sha256": hashlib.sha256(runtime.read_bytes()).hexdigest()}
    build = build_id(
        dockerfile=dockerfile,
        lock=inventory,
        base=base,
        runtime_sha256=labels["mtbuild.runtime.sha256"],
        platform=cell.platform,
        output={**OUTPUT, **labels},
    )
    labels["mtbuild.build"] = build
    words = (f"--label={key}={value}" for key, value in labels.items())
    digest = buildx(
        engine, dockerfile, f"{staging}:bld-{build[:12]}", layers, f"--build-arg=BASE={bases}@{base}", *words
    )
    ref = Reference.parse(f"{staging}@{digest}")
    text = manifest_of(engine, ref)
    manifest: dict[str, Any] = json.loads(text)
    done = Build(
        cell_id=cell.id,
        cell_name=cell.name,
        build_id=build,
        ref=ref,
        config_digest=Digest.parse(manifest["config"]["digest"]),
        base_digest=base,
        size_bytes=sum(int(layer["size"]) for layer in manifest["layers"]),
        seconds=round(time.monotonic() - started, 1),
        override=None,
        created=datetime.now(UTC).isoformat(timespec="microseconds"),
        runtime_sha256=labels["mtbuild.runtime.sha256"],
    )
    folder = paths.cell(cell.id, done.build12)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.json").write_text(done.to_json())
    (folder / "manifest.json").write_bytes(text.encode())
    (folder / "Dockerfile").write_text(dockerfile)
    retire(engine, [ref])  # so that the smoke run pulls what the registry has, and times it
    say(f"{done.size_bytes / 1e9:.2f} GB in {done.seconds:.0f} s")
    print(ref)


if __name__ == "__main__":
    main()
