"""Are the three models what they should be? Files, sizes, and each tensor's name and shape; none is read.

Published folders are held against the published facts, folders that `mtmodels convert` wrote against their
own manifest, small ones (with `sizes.json`) against the networks that `wan` builds for those sizes.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multitalk_runtime.model_dirs import AUDIO_WEIGHTS, ModelDirs
from multitalk_runtime.published import CONFIG, MODELS, ModelFile, PublishedModel, Shapes, published_shapes
from multitalk_runtime.tensor_index import FileProblem, Tensor, check_plain, read_index

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = ["Problem", "Report", "needed_files", "verify"]

SHOWN = 5  # names in a message
MANIFEST = "wan-convert.json"
_CHUNK = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong, and what to do. `kind`: missing, size, content, tensors, hash."""

    model: str
    file: str
    kind: str
    problem: str
    fix: str


@dataclass(kw_only=True)
class Report:
    """All that was found. `ok` if there is no problem."""

    folder: str
    layout: str  # published, converted, custom
    files: int = 0
    bytes: int = 0
    tensors: int = 0
    hashed: int = 0
    seconds: float = 0.0
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


def verify(
    dirs: ModelDirs, *, full: bool = False, progress: Callable[[int, int, str], None] | None = None
) -> Report:
    """Check the three folders; never raises for what is in them. `full` also reads and hashes the files whose
    SHA-256 is known; `progress(done, all, file)` counts those bytes.
    """
    begin = time.monotonic()
    converted = (dirs.wan / MANIFEST).is_file()
    custom = (dirs.wan / "sizes.json").is_file() or _other_sizes(dirs.wan)
    layout = "converted" if converted else "custom" if custom else "published"
    report = Report(folder=str(dirs.wan.parent if not dirs.merged else dirs.wan), layout=layout)
    _check_config(dirs, report, custom=custom)
    files = list(needed_files(dirs))
    found: dict[str, list[Path]] = {}
    for model, file, path in files:
        if _check_file(model, file, path, report, exact=layout == "published"):
            if file.network:
                found.setdefault(file.network, []).append(path)
            report.files += 1
            report.bytes += path.stat().st_size
    expected = _expected(dirs, report, custom=custom)
    broken = {p.file for p in report.problems}
    for network, paths in found.items():
        complete = not any(f.network == network and f.name in broken for _, f, _ in files)
        _check_tensors(network, paths, expected.get(network, {}), report, complete=complete)
    _check_index(dirs.wan, report)
    if full:
        _check_hashes(dirs, files, report, layout, progress)
    report.seconds = time.monotonic() - begin
    return report


def needed_files(dirs: ModelDirs) -> Iterable[tuple[PublishedModel, ModelFile, Path]]:
    """Every file that loading needs, and where it lies or should lie. Files that go by another name there
    (shards of another number, `.safetensors` instead of `.pth`, the audio weights in Wan's folder) count.
    """
    for model in MODELS:
        folder: Path = getattr(dirs, model.key)
        shards = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
        # Complete sets name their number; a set that lacks one is still the published set.
        other = [s for s in shards if "-of-00007" not in s.name]
        if model.key == "wan" and other:
            for shard in _whole_set(other):
                yield model, ModelFile(name=shard.name, size=0, about=True, network="dit"), shard
        for file in model.files:
            if file.network == "dit" and model.key == "wan" and other:
                continue
            if file.name == AUDIO_WEIGHTS and dirs.merged:
                if not (dirs.wan / MANIFEST).is_file():
                    yield model, file, dirs.wan / AUDIO_WEIGHTS
                continue
            path = folder / file.name
            alternatives = [path.with_suffix(".safetensors")] if path.suffix == ".pth" else []
            if file.network == "wav2vec":
                alternatives = [folder / "model.safetensors", folder / "pytorch_model.safetensors"]
            yield model, file, _present(path, alternatives)


def _present(path: Path, alternatives: list[Path]) -> Path:
    return next((p for p in (path, *alternatives) if p.is_file()), path)


def _whole_set(shards: list[Path]) -> list[Path]:
    """The shards, and those that `…-of-N` says there must be."""
    _, of, count = shards[0].stem.partition("-of-")
    if not of or not count.isdigit() or int(count) > 1000:
        return shards
    stem = shards[0].stem.partition("-of-")[0].rpartition("-")[0]
    return [shards[0].with_name(f"{stem}-{i:05d}-of-{count}.safetensors") for i in range(1, int(count) + 1)]


def _add(report: Report, model: str, file: str, kind: str, problem: str, fix: str) -> None:
    report.problems.append(Problem(model=model, file=file, kind=kind, problem=problem, fix=fix))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _other_sizes(wan: Path) -> bool:
    config = _read_json(wan / "config.json")
    # A wrong base model is a problem, not a size of its own: only the width and depth make another model.
    return isinstance(config, dict) and (config.get("dim"), config.get("num_layers")) != (5120, 40)


def _check_config(dirs: ModelDirs, report: Report, *, custom: bool) -> None:
    config = _read_json(dirs.wan / "config.json")
    if isinstance(config, dict) and not custom:
        for key, wanted in CONFIG.items():
            if config.get(key) != wanted:
                fix = "use the folder of Wan2.1-I2V-14B-480P"
                problem = f"{key} is {config.get(key)!r}, not {wanted!r}"
                _add(report, "wan", "config.json", "content", problem, fix)
    elif config is not None and not isinstance(config, dict):
        _add(report, "wan", "config.json", "content", "this is not a JSON object", "fetch it again")
    preprocessor = _read_json(dirs.wav2vec / "preprocessor_config.json")
    if isinstance(preprocessor, dict) and preprocessor.get("do_normalize") is not False:
        problem = "do_normalize is not false: this is another speech model"
        fix = "fetch chinese-wav2vec2-base"
        _add(report, "wav2vec", "preprocessor_config.json", "content", problem, fix)


def _check_file(model: PublishedModel, file: ModelFile, path: Path, report: Report, *, exact: bool) -> bool:
    try:
        size = check_plain(path)
    except FileProblem as error:
        kind = "missing" if error.problem.startswith("no such") else "content"
        fix = error.fix if kind == "content" else f"{error.fix}: mtmodels fetch, from {model.repo}"
        _add(report, model.key, file.name, kind, error.problem, fix)
        return False
    if path.suffix == ".json" and _read_json(path) is None:
        _add(report, model.key, file.name, "content", "this is not JSON", "fetch it again")
        return False
    # JSON may be written anew with the same content; weights may not.
    same_name = path.name == Path(file.name).name and file.network is not None
    if exact and same_name and not file.about and size != file.size:
        problem = f"{size} bytes, published are {file.size}"
        _add(report, model.key, file.name, "size", problem, "fetch it again")
        return False
    return True


def _expected(dirs: ModelDirs, report: Report, *, custom: bool) -> Mapping[str, Shapes]:
    if not custom:
        return published_shapes()
    from multitalk_runtime.published import shapes_of
    from wan.tensor_files import CheckpointError

    try:
        return shapes_of(dirs.wan, dirs.wav2vec)
    except (CheckpointError, TypeError, ValueError) as error:
        _add(report, "wan", "sizes.json", "content", f"no network has these sizes: {error}", "write it again")
        return {}


def _check_tensors(
    network: str, paths: list[Path], expected: Shapes, report: Report, *, complete: bool
) -> None:
    """All files of a network together against what it needs. Not `complete`: only what is there is judged."""
    model = "wav2vec" if network == "wav2vec" else "wan"
    tensors: dict[str, Tensor] = {}
    for path in paths:
        try:
            index = read_index(path)
        except FileProblem as error:
            _add(report, model, path.name, "content", error.problem, error.fix)
            complete = False
            continue
        for raw, tensor in index.items():
            name = _own_name(network, raw)
            if name in tensors:
                problem = f"{name!r} is in another file of this model too"
                _add(report, model, path.name, "tensors", problem, "keep one of the two files")
            elif name is not None:
                tensors[name] = tensor
    report.tensors += len(tensors)
    if not expected:
        return
    missing = [name for name in expected if name not in tensors] if complete else []
    unexpected = [name for name in tensors if name not in expected]
    shapes = [
        f"{n} {list(t.shape)}, not {list(expected[n])}"
        for n, t in tensors.items()
        if n in expected and t.shape != expected[n]
    ]
    whole = [n for n, t in tensors.items() if not t.dtype.startswith(("F", "BF", "Half", "Double", "BFloat"))]
    where = paths[0].name if len(paths) == 1 else f"{network} ({len(paths)} files)"
    for names, what in (
        (missing, "missing"),
        (unexpected, "unexpected"),
        (shapes, "of another shape"),
        (whole, "not of a floating-point type"),
    ):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            problem = f"{len(names)} tensors {what}: {', '.join(names[:SHOWN])}{more}"
            _add(report, model, where, "tensors", problem, _diagnosis(network, missing, shapes, whole))


def _own_name(network: str, name: str) -> str | None:
    """A file's tensor under the network's name; None for what is never loaded."""
    if network == "clip":
        inner = name.removeprefix("visual.")
        unused = inner == name or inner.startswith(("transformer.31.", "post_norm.")) or inner == "head"
        return None if unused else inner
    if network == "wav2vec":
        name = name.removeprefix("wav2vec2.")
        if name.startswith(("quantizer.", "project_q.", "project_hid.", "lm_head.")):
            return None
        weight = "pos_conv_embed.conv.parametrizations.weight.original"
        return name.replace("pos_conv_embed.conv.weight_g", f"{weight}0").replace(
            "pos_conv_embed.conv.weight_v", f"{weight}1"
        )
    return name


def _diagnosis(network: str, missing: list[str], shapes: list[str], whole: list[str]) -> str:
    if network == "dit":
        if whole or any(text.startswith("patch_embedding") and "16" in text for text in shapes):
            return "this is another base or a quantised file: use Wan2.1-I2V-14B-480P as published"
        if any("k_img" in name for name in missing):
            return "this is a text-to-video base: use Wan2.1-I2V-14B-480P"
        if missing and all("audio" in name or "norm_x" in name for name in missing):
            return f"the audio weights are not there: fetch {AUDIO_WEIGHTS} of MeiGen-MultiTalk"
    return "is this the right file? fetch it again"


def _check_index(wan: Path, report: Report) -> None:
    """An index may name only shards that are there: the loader takes it as the list of files."""
    for path in sorted(wan.glob("diffusion_pytorch_model*.safetensors.index.json")):
        index = _read_json(path)
        names = index.get("weight_map", {}) if isinstance(index, dict) else None
        if not isinstance(names, dict) or not names:
            _add(report, "wan", path.name, "content", "it names no files", "delete it: it is not needed")
            continue
        for name in sorted(set(map(str, names.values())) - {AUDIO_WEIGHTS}):
            if not (wan / name).is_file() and not any(p.file == name for p in report.problems):
                _add(report, "wan", name, "missing", f"{path.name} names it", "fetch it, or delete the index")


def _check_hashes(
    dirs: ModelDirs,
    files: list[tuple[PublishedModel, ModelFile, Path]],
    report: Report,
    layout: str,
    progress: Callable[[int, int, str], None] | None,
) -> None:
    wanted = [
        (m.key, p, f.sha256) for m, f, p in files if f.sha256 and p.is_file() and p.name == Path(f.name).name
    ]
    if layout == "converted":
        manifest = _read_json(dirs.wan / MANIFEST) or {}
        wanted = [("wan", dirs.wan / f["name"], f["sha256"]) for f in manifest.get("files", [])]
        wanted = [entry for entry in wanted if entry[1].is_file()]
    elif layout == "custom":
        wanted = []
    total, done = sum(path.stat().st_size for _, path, _ in wanted), 0
    for model, path, sha256 in wanted:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done, total, path.name)
        report.hashed += 1
        if digest.hexdigest() != sha256:
            problem = f"SHA-256 is {digest.hexdigest()}, published is {sha256}"
            _add(report, model, path.name, "hash", problem, "fetch it again")
