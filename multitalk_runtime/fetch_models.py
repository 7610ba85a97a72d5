"""Bringing model files here: from the Hub, from S3, or from a mounted volume. Disk space is checked first.

A file has its name only when it is complete and, where its SHA-256 is published, has been compared; what is
there already and of the right size is left alone.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multitalk_runtime.errors import FetchFault, ModelFault, StorageFault
from multitalk_runtime.model_dirs import MULTITALK, WAN, WAV2VEC, ModelDirs
from multitalk_runtime.tensor_index import FileProblem, check_plain
from multitalk_runtime.verify import needed_files

if TYPE_CHECKING:
    from collections.abc import Sequence

    from multitalk_runtime.published import ModelFile, PublishedModel

__all__ = ["Missing", "fetch", "plan", "source_of"]

FOLDERS = {"wan": WAN, "multitalk": MULTITALK, "wav2vec": WAV2VEC}
SPARE = 1 << 30  # bytes that stay free
_CHUNK = 16 << 20
Source = Callable[["Missing"], None]
"""Brings one file to `missing.target`."""
Progress = Callable[[int, int, str], None]
"""(bytes done, of how many, file)."""


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A file that is not there, or not whole; `size` in bytes (`about`: not exactly)."""

    model: PublishedModel
    file: ModelFile
    target: Path

    @property
    def size(self) -> int:
        return self.file.size

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model.key,
            "repo": self.model.repo,
            "file": self.file.name,
            "bytes": self.file.size,
            "about": self.file.about,
            "target": str(self.target),
        }


def plan(dirs: ModelDirs) -> tuple[Missing, ...]:
    """What is missing of the published models, or of another size than published."""
    custom = (dirs.wan / "sizes.json").is_file() or (dirs.wan / "wan-convert.json").is_file()
    missing = []
    for model, file, path in needed_files(dirs):
        try:
            size = check_plain(path)
        except FileProblem:
            pass
        else:
            weights = file.network is not None and path.name == Path(file.name).name
            if custom or file.about or not weights or size == file.size:
                continue
        missing.append(Missing(model=model, file=file, target=getattr(dirs, model.key) / file.name))
    return tuple(missing)


def fetch(missing: Sequence[Missing], source: Source, *, progress: Progress | None = None) -> None:
    """Bring every file. Raises ModelFault (disk too small, a file that is not as published), FetchFault or
    StorageFault; files that came before stay.
    """
    check_space(missing)
    total, done = sum(m.size for m in missing), 0
    for item in missing:
        if progress is not None:
            progress(done, total, item.file.name)
        item.target.parent.mkdir(parents=True, exist_ok=True)
        source(item)
        _check(item)
        done += item.size
    if progress is not None:
        progress(done, total, "")


def check_space(missing: Sequence[Missing]) -> None:
    """Whether everything fits, disk by disk. Raises ModelFault with the numbers."""
    needed: dict[int, tuple[Path, int]] = {}
    for item in missing:
        folder = item.target.parent
        while not folder.exists():
            folder = folder.parent
        device = folder.stat().st_dev
        needed[device] = (folder, needed.get(device, (folder, 0))[1] + item.size)
    for folder, size in needed.values():
        free = shutil.disk_usage(folder).free
        if free < size + SPARE:
            msg = f"{size / 1e9:.1f} GB are missing, {free / 1e9:.1f} GB are free on the disk of {folder}"
            raise ModelFault("model.missing", msg, hint="free some space, or name another folder")


def _check(item: Missing) -> None:
    """The file as it came: whole, of the published size and hash."""
    wrong = ""
    try:
        size = check_plain(item.target)
    except FileProblem as error:
        raise ModelFault("model.invalid", f"{item.file.name}: {error.problem}", hint=error.fix) from error
    if not item.file.about and size != item.size:
        wrong = f"{size} bytes came, published are {item.size}"
    elif item.file.sha256 and _sha256(item.target) != item.file.sha256:
        wrong = "its SHA-256 is not the published one"
    if wrong:
        item.target.unlink()
        raise ModelFault("model.invalid", f"{item.file.name}: {wrong}", hint="is the source the right one?")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def source_of(text: str, *, endpoint: str | None = None) -> Source:
    """`hub`, `s3://bucket/prefix`, or a folder with the published folders in it. Raises FetchFault.

    `endpoint` is the address of another Hub, or of the storage (otherwise the usual variables name it).
    """
    if text == "hub":
        return _hub(endpoint)
    if text.startswith("s3://"):
        return _s3(text, endpoint)
    folder = Path(text)
    if not folder.is_dir():
        hint = "name hub, s3://bucket/prefix, or a folder"
        raise FetchFault("fetch.not_found", f"no folder {text!r}", field="--from", hint=hint)
    return _folder(folder)


def _hub(endpoint: str | None) -> Source:
    def bring(item: Missing) -> None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

        folder = item.target
        for _ in Path(item.file.name).parts:
            folder = folder.parent
        try:
            hf_hub_download(
                item.model.repo,
                item.file.name,
                revision=item.model.revision,
                local_dir=folder,
                endpoint=endpoint,
            )
        except LocalEntryNotFoundError as error:
            raise FetchFault("fetch.unreachable", "the Hub can't be reached", field=item.file.name) from error
        except EntryNotFoundError as error:
            msg = f"{item.model.repo} has no {item.file.name}"
            raise FetchFault("fetch.not_found", msg, field=item.file.name) from error
        except (HfHubHTTPError, OSError) as error:
            msg = f"the Hub's download failed ({type(error).__name__})"
            raise FetchFault("fetch.status", msg, field=item.file.name) from error

    return bring


def _s3(text: str, endpoint: str | None) -> Source:
    from multitalk_runtime.settings import Settings
    from multitalk_runtime.storage import Storage

    bucket, _, prefix = text.removeprefix("s3://").strip("/").partition("/")
    settings = Settings.from_environment()
    # The person at the command line is the operator: what they name is allowed, and may take its time.
    settings = replace(
        settings, s3_allowed=(bucket,), fetch_s=7 * 86_400.0, s3_endpoint=endpoint or settings.s3_endpoint
    )
    storage = Storage(settings)

    def bring(item: Missing) -> None:
        names = [prefix, FOLDERS[item.model.key], item.file.name]
        key = "/".join(name for name in names if name)
        part = item.target.with_name(item.target.name + ".part")
        part.unlink(missing_ok=True)
        try:
            storage.get(bucket, key, part, max_bytes=1 << 40, field=item.file.name)
            part.replace(item.target)
        finally:
            part.unlink(missing_ok=True)

    return bring


def _folder(folder: Path) -> Source:
    def bring(item: Missing) -> None:
        source = folder / FOLDERS[item.model.key] / item.file.name
        if not source.is_file():
            raise FetchFault("fetch.not_found", f"no file {str(source)!r}", field=item.file.name)
        part = item.target.with_name(item.target.name + ".part")
        try:
            shutil.copyfile(source, part)
            part.replace(item.target)
        except OSError as error:
            msg = f"copying failed: {error.strerror}"
            raise StorageFault("storage.unavailable", msg, field=item.file.name) from error
        finally:
            part.unlink(missing_ok=True)

    return bring
