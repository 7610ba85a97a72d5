"""Loading models: built on the meta device, filled by assignment, checked name by name.

Nothing is initialised at random and nothing is held twice: the module is built without memory, the tensors
are read straight into their final dtype and device (`wan.tensor_files`), and `load_state_dict(assign=True)`
makes them its parameters. Missing, unexpected and mis-shaped tensors are an error that lists them; the model
folder is never changed (multitalk.md §5.2: the audio weights are merged by key, from wherever they lie).
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from wan.tensor_files import (
    THREADS,
    CheckpointError,
    DtypeRule,
    Progress,
    TensorEntry,
    move,
    read_header,
    read_pickle,
    read_safetensors,
)

if TYPE_CHECKING:
    from wan.modules.wav2vec2 import Wav2Vec2Model

__all__ = [
    "CheckpointError",
    "KeyMismatchError",
    "assign",
    "build_on_meta",
    "dit_files",
    "load_model",
    "load_pretrained",
    "load_wav2vec2",
    "network_sizes",
    "read_config",
    "read_state",
    "resolve",
]

M = TypeVar("M", bound=nn.Module)
PathLike = str | os.PathLike[str]
Rename = Callable[[str], str | None]
"""A file's tensor name → the module's, or None for a tensor that the module has no use for."""

SHARD_PATTERN = "diffusion_pytorch_model*.safetensors"
MULTITALK_FILE = "multitalk.safetensors"
SIZES_FILE = "sizes.json"
SHOWN = 20  # names listed in a message; the exception carries all


class KeyMismatchError(CheckpointError):
    """The tensors of a checkpoint aren't those of the model. `missing`, `unexpected` and `misshaped` hold
    the names.
    """

    def __init__(
        self,
        path: PathLike,
        missing: Sequence[str],
        unexpected: Sequence[str],
        misshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
    ) -> None:
        self.missing, self.unexpected, self.misshaped = tuple(missing), tuple(unexpected), dict(misshaped)
        shapes = [
            f"{k}: file {list(found)}, model {list(wanted)}" for k, (found, wanted) in misshaped.items()
        ]
        groups = {"missing": self.missing, "unexpected": self.unexpected, "mis-shaped": shapes}
        parts = [f"{len(names)} {what}: {_some(names)}" for what, names in groups.items() if names]
        super().__init__(path, "the tensors don't fit the model; " + "; ".join(parts), self._hint())

    def _hint(self) -> str:
        if any("audio_cross_attn" in name for name in self.missing):
            return f"The audio weights are absent: put {MULTITALK_FILE} into the folder or name it as extra"
        if self.misshaped.get("patch_embedding.weight"):
            return "Is this another base model? MultiTalk needs Wan2.1-I2V-14B-480P (36 input channels)"
        return "Is this the right file for this model?"


def _some(names: Sequence[str]) -> str:
    more = f" … and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def resolve(path: PathLike) -> Path:
    """The file itself, or the `.safetensors` beside it that `wan.convert` wrote; CheckpointError if neither
    is there.
    """
    path = Path(path)
    converted = path.with_suffix(".safetensors")
    if path.is_file():
        return path
    if converted.is_file():
        return converted
    raise CheckpointError(path, f"no such file (nor {converted.name})", "Download it, or correct the folder")


def build_on_meta(factory: Callable[[], M]) -> M:
    """Build a module without memory and without initialisation."""
    with torch.device("meta"):
        return factory()


def read_state(
    files: Iterable[PathLike],
    wanted: Mapping[str, Sequence[int]] | None = None,
    *,
    rename: Rename | None = None,
    dtype: DtypeRule = None,
    device: str | torch.device = "cpu",
    threads: int = THREADS,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """All tensors of the files under their new names. With `wanted` (name → shape), names and shapes are
    checked first.

    Raises CheckpointError for a bad file or a name that two files have, KeyMismatchError if they aren't as
    wanted.
    """
    files = [Path(file) for file in files]
    headers: dict[str, TensorEntry] = {}
    pickled: dict[str, Tensor] = {}
    origin: dict[str, Path] = {}
    for file in files:
        found = read_header(file) if file.suffix == ".safetensors" else read_pickle(file)
        for name, item in found.items():
            new = rename(name) if rename else name
            if new is None:
                continue
            if new in origin:
                fix = f"It is in {origin[new]} too: keep one of the two files"
                raise CheckpointError(file, f"{new!r} is there twice", fix)
            origin[new] = file
            if isinstance(item, TensorEntry):
                headers[new] = item
            else:
                pickled[new] = item
    if wanted is not None:
        source = files[0] if len(files) == 1 else files[0].parent
        check_keys(source, {n: tuple(i.shape) for n, i in {**headers, **pickled}.items()}, wanted)
    options: dict[str, Any] = {"device": device, "threads": threads, "progress": progress}
    entries = [entry.named(name) for name, entry in headers.items()]
    state = read_safetensors(entries, dtype=dtype, **options) if entries else {}
    return state | (move(pickled, dtype=dtype, **options) if pickled else {})


def check_keys(
    source: PathLike, found: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]]
) -> None:
    """Raise KeyMismatchError unless both have the same names and shapes."""
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    misshaped = {
        name: (tuple(found[name]), tuple(shape))
        for name, shape in wanted.items()
        if name in found and tuple(found[name]) != tuple(shape)
    }
    if missing or unexpected or misshaped:
        raise KeyMismatchError(source, missing, unexpected, misshaped)


def assign(model: M, state: Mapping[str, Tensor], source: PathLike = "state dict") -> M:
    """Make the tensors the model's own (no copy), freeze it and put it into eval mode. Checks names and
    shapes.
    """
    check_keys(
        source, {n: t.shape for n, t in state.items()}, {n: t.shape for n, t in model.state_dict().items()}
    )
    model.load_state_dict(dict(state), assign=True)
    empty = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if empty:
        # A table that no file holds (a non-persistent buffer) has to be made outside the meta device.
        msg = f"{type(model).__name__} still has tensors without memory after loading: {_some(empty)}"
        raise RuntimeError(msg)
    return model.eval().requires_grad_(False)


def load_model(
    factory: Callable[[], M],
    files: PathLike | Iterable[PathLike],
    *,
    rename: Rename | None = None,
    dtype: DtypeRule = None,
    device: str | torch.device = "cpu",
    threads: int = THREADS,
    progress: Progress | None = None,
) -> M:
    """Build `factory()` on the meta device and fill it from one file or several; eval mode, no gradients.

    A path that isn't there may also be the `.safetensors` file of the same name. Raises CheckpointError.
    """
    paths = [resolve(p) for p in ([files] if isinstance(files, str | os.PathLike) else files)]
    model = build_on_meta(factory)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    options: dict[str, Any] = {"device": device, "threads": threads, "progress": progress}
    state = read_state(paths, wanted, rename=rename, dtype=dtype, **options)
    return assign(model, state, paths[0])


def read_config(directory: PathLike) -> dict[str, Any]:
    """The folder's `config.json`. Raises CheckpointError if it is missing or no JSON object."""
    path = Path(directory) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(path, "no such file", "Is this the folder of Wan2.1-I2V-14B-480P?") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(path, f"can't be read ({error})", "Download it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(path, "this is not a JSON object", "Download it again")
    return config


def network_sizes(checkpoint: PathLike, network: str) -> dict[str, Any]:
    """Sizes of network `t5`, `clip` or `vae`, or the `buckets`, where a checkpoint's `sizes.json` sets them.

    `checkpoint` is the folder or a file in it. Published checkpoints have no such file: {} means their own
    sizes. It is how small models of the same layout say what they are. Raises CheckpointError.
    """
    folder = Path(checkpoint)
    path = (folder if folder.is_dir() else folder.parent) / SIZES_FILE
    try:
        sizes = json.loads(path.read_text(encoding="utf-8")).get(network, {})
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(path, f"can't be read ({error})", "Delete it, or write it again") from error
    if not isinstance(sizes, dict):
        raise CheckpointError(path, f"{network!r} is not an object of sizes", "Write it again")
    return sizes


def dit_files(directory: PathLike, extra: Iterable[PathLike] = ()) -> list[Path]:
    """The weight files of a DiT folder: its shards, `multitalk.safetensors` if it is there, then `extra`.

    `extra` are further files, or folders with a `multitalk.safetensors`. An index JSON is only used to
    notice a missing shard: names come from the files themselves, so the base model's index does no harm.
    Raises CheckpointError.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(
            directory, "no such folder", "Name the folder that holds config.json and the weights"
        )
    files = sorted(directory.glob(SHARD_PATTERN))
    for index in sorted(directory.glob("diffusion_pytorch_model*.safetensors.index.json")):
        for name in _indexed_files(index):
            if name != MULTITALK_FILE and not (directory / name).is_file():
                raise CheckpointError(
                    directory / name, f"no such file, but {index.name} names it", "Download it"
                )
    if not files:
        raise CheckpointError(directory, f"there is no {SHARD_PATTERN} in it", "Download the weights")
    candidates = [directory / MULTITALK_FILE, *map(Path, extra)]
    for path in candidates:
        file = path / MULTITALK_FILE if path.is_dir() else path
        if file.is_file():
            files.append(file)
        elif path is not candidates[0]:
            raise CheckpointError(file, "no such file", "Download it, or correct the path")
    return list(dict.fromkeys(file.resolve() for file in files))


def _indexed_files(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            index, f"can't be read ({type(error).__name__}: {error})", "Delete it"
        ) from error


def config_arguments(factory: Callable[..., nn.Module], directory: PathLike) -> dict[str, Any]:
    """The values of the folder's `config.json` that `factory` has parameters for."""
    accepted = inspect.signature(factory).parameters
    return {k: v for k, v in read_config(directory).items() if k in accepted}


def build_from_config(factory: Callable[..., M], arguments: Mapping[str, Any]) -> M:
    """`factory(**arguments)` on the meta device, without the original's weight initialisation."""
    quiet = {"weight_init": False} if "weight_init" in inspect.signature(factory).parameters else {}
    return build_on_meta(lambda: factory(**(quiet | dict(arguments))))


def load_pretrained(
    cls: type[M],
    directory: PathLike,
    *,
    extra: Iterable[PathLike] = (),
    dtype: DtypeRule = torch.bfloat16,
    device: str | torch.device = "cpu",
    threads: int = THREADS,
    progress: Progress | None = None,
    **overrides: object,
) -> M:
    """A DiT from a checkpoint folder: `config.json` gives the arguments of `cls`, `overrides` change them.

    `extra` names further weight files or folders (MultiTalk's audio weights). A `multitalk.safetensors` in
    the folder is left alone if the model has none of its tensors. Raises CheckpointError or
    KeyMismatchError.
    """
    model = build_from_config(cls, config_arguments(cls, directory) | overrides)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    files = [
        file
        for file in dit_files(directory, extra)
        if file.name != MULTITALK_FILE or not wanted.keys().isdisjoint(read_header(file))
    ]
    state = read_state(files, wanted, dtype=dtype, device=device, threads=threads, progress=progress)
    return assign(model, state, directory)


def wav2vec2_name(name: str) -> str | None:
    """A wav2vec2 tensor's name without the pre-training wrapper and with today's weight-norm names."""
    name = name.removeprefix("wav2vec2.")
    if name.startswith(("quantizer.", "project_q.", "project_hid.", "lm_head.")):
        return None
    name = name.replace(
        "pos_conv_embed.conv.weight_g", "pos_conv_embed.conv.parametrizations.weight.original0"
    )
    return name.replace(
        "pos_conv_embed.conv.weight_v", "pos_conv_embed.conv.parametrizations.weight.original1"
    )


def wav2vec2_files(directory: PathLike) -> tuple[Wav2Vec2Model, Path]:
    """The network on the meta device and the weight file of a wav2vec2 folder. Raises CheckpointError."""
    from wan.modules.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model

    directory = Path(directory)
    config = Wav2Vec2Config.from_dict(read_config(directory), source=directory / "config.json")
    names = ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin")
    file = next((directory / n for n in names if (directory / n).is_file()), None)
    if file is None:
        raise CheckpointError(
            directory, f"none of {', '.join(names)} is in it", "Download chinese-wav2vec2-base"
        )
    return build_on_meta(lambda: Wav2Vec2Model(config)), file


def load_wav2vec2(
    directory: PathLike, device: str | torch.device = "cpu", threads: int = THREADS
) -> Wav2Vec2Model:
    """The speech model in fp32 from a folder with config.json and model.safetensors or pytorch_model.bin."""
    model, file = wav2vec2_files(directory)
    options: dict[str, Any] = {"dtype": torch.float32, "device": device, "threads": threads}
    return load_model(lambda: model, file, rename=wav2vec2_name, **options)
