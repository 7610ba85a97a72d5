"""`mtmodels`: are the models there, what is missing, bring it, make it smaller.

mtmodels verify DIR            files, sizes, and the names and shapes of all tensors, in about a second
mtmodels plan DIR              what is missing, and how much that is
mtmodels fetch DIR --from hub  bring it: from the Hub, s3://bucket/prefix, or a folder (a volume)
mtmodels convert DIR OUT       one folder of half the size that loads faster, with the same numbers
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multitalk_runtime.errors import Fault, FetchFault, StorageFault
from multitalk_runtime.fetch_models import fetch, plan, source_of
from multitalk_runtime.model_dirs import ModelDirs
from multitalk_runtime.verify import Report, verify

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["check_models", "main"]

EPILOG = """
DIR holds the published folders Wan2.1-I2V-14B-480P, MeiGen-MultiTalk and chinese-wav2vec2-base, or is one
that `mtmodels convert` wrote. --wan, --multitalk and --wav2vec name folders that lie elsewhere.

examples:
  mtmodels plan /models
  mtmodels fetch /models --from hub
  mtmodels fetch /models --from s3://bucket/weights --endpoint https://storage.example
  mtmodels verify /models --full            also SHA-256, which reads every byte
  mtmodels convert /models /models-small

exit codes: 0 all well, 1 something is wrong or missing, 2 bad input, 3 network or disk
"""


def check_models(dirs: ModelDirs) -> Report:
    """For a worker's start: `verify` without reading weights. Raises ModelFault with the first problem."""
    from multitalk_runtime.errors import ModelFault

    report = verify(dirs)
    if report.problems:
        first = report.problems[0]
        more = f" (and {len(report.problems) - 1} more)" if len(report.problems) > 1 else ""
        code = "model.missing" if first.kind == "missing" else "model.invalid"
        raise ModelFault(code, f"{first.file}: {first.problem}{more}", hint=first.fix)
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see the module."""
    flags = _parser().parse_args(arguments)
    try:
        return flags.run(flags)
    except (FetchFault, StorageFault) as fault:
        sys.stderr.write(f"error: {fault}\n  fix: {fault.hint}\n")
        return 2 if fault.field.startswith("--") else 3
    except Fault as fault:
        sys.stderr.write(f"error: {fault}\n  fix: {fault.hint}\n")
        return 3
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; files that are complete stay\n")
        return 130


def _parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="mtmodels",
        description=(__doc__ or "").partition("\n")[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("folder", type=Path, metavar="DIR", help="folder of the models")
        for part in ("wan", "multitalk", "wav2vec"):
            sub.add_argument(f"--{part}", type=Path, default=None, help=f"{part}'s folder, if elsewhere")
        sub.add_argument("--json", action="store_true", help="machine-readable output")
        sub.set_defaults(run=run)
        return sub

    check = command("verify", _verify, "check files, sizes, tensor names and shapes")
    check.add_argument("--full", action="store_true", help="also compare SHA-256 (reads every byte)")
    command("plan", _plan, "say what is missing and how big it is")
    bring = command("fetch", _fetch, "bring what is missing")
    where = "hub, s3://bucket/prefix, or a folder that holds the published folders"
    bring.add_argument("--from", dest="source", default="hub", help=where)
    bring.add_argument("--endpoint", default=None, help="address of another Hub or of the storage")
    small = command("convert", _convert, "write one folder of half the size, with the same numbers")
    small.add_argument("output", type=Path, metavar="OUT", help="new folder")
    return top


def _dirs(flags: argparse.Namespace) -> ModelDirs:
    found = ModelDirs.under(flags.folder)
    return ModelDirs(
        wan=flags.wan or found.wan,
        multitalk=flags.multitalk or found.multitalk,
        wav2vec=flags.wav2vec or found.wav2vec,
    )


def _verify(flags: argparse.Namespace) -> int:
    report = verify(_dirs(flags), full=flags.full, progress=_show if flags.full else None)
    if flags.json:
        _print_json(report.to_json())
        return 0 if report.ok else 1
    for problem in report.problems:
        sys.stdout.write(f"{problem.model}/{problem.file}: {problem.problem}\n  fix: {problem.fix}\n")
    count = len(report.problems)
    state = "all well" if report.ok else f"{count} problem{'s' if count > 1 else ''}"
    hashed = f", {report.hashed} hashed" if flags.full else ""
    sys.stdout.write(
        f"{report.folder} ({report.layout}): {state}; {report.files} files, {report.bytes / 1e9:.2f} GB, "
        f"{report.tensors} tensors{hashed}, {report.seconds:.2f} s\n"
    )
    return 0 if report.ok else 1


def _plan(flags: argparse.Namespace) -> int:
    missing = plan(_dirs(flags))
    total = sum(item.size for item in missing)
    folder = flags.folder
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if flags.json:
        content = {"missing": [i.to_json() for i in missing], "bytes": total, "free_bytes": free}
        _print_json(content)
        return 1 if missing else 0
    for item in missing:
        about = "about " if item.file.about else ""
        sys.stdout.write(f"{item.target}: {about}{_size(item.size)}, from {item.model.repo}\n")
    sys.stdout.write(f"{len(missing)} files missing, {_size(total)}; {_size(free)} free\n")
    return 1 if missing else 0


def _fetch(flags: argparse.Namespace) -> int:
    missing = plan(_dirs(flags))
    fetch(missing, source_of(flags.source, endpoint=flags.endpoint), progress=_show)
    if flags.json:
        _print_json({"fetched": [item.to_json() for item in missing]})
    else:
        sys.stdout.write(f"{len(missing)} files fetched, {_size(sum(i.size for i in missing))}\n")
    return 0


def _convert(flags: argparse.Namespace) -> int:
    from wan.convert import convert
    from wan.tensor_files import CheckpointError

    dirs = _dirs(flags)
    try:
        done = convert(dirs.wan, flags.output, multitalk=dirs.audio, wav2vec_dir=dirs.wav2vec, progress=_show)
    except (CheckpointError, FileExistsError) as error:
        sys.stderr.write(f"\nerror: {error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"\nerror: {error}\n")
        return 3
    if flags.json:
        _print_json({"folder": str(done.folder), "bytes": done.bytes, "source_bytes": done.source_bytes})
    else:
        sys.stdout.write(f"{done.folder}: {_size(done.bytes)} from {_size(done.source_bytes)}\n")
    return 0


def _show(done: int, total: int, name: str) -> None:
    """Progress on a terminal; a log file gets none."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{_size(done)} of {_size(total)} {name}")
        if done >= total:
            sys.stderr.write("\n")


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} bytes"


def _print_json(content: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
