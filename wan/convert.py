"""Merging the published checkpoints into one folder that is half as large and loads faster, with the same
numbers.

Every tensor is stored in the dtype that the pipelines cast it to anyway: DiT with its audio weights and T5 in
bf16, CLIP in fp16 (only the 31 image blocks that are used), VAE and wav2vec2 in fp32. About 51 GB instead of
92.6 (performance.md §5.1). The folder is a drop-in: the same file names, `.safetensors` instead of `.pth`;
tensors lie in the order of the model's blocks, q, k and v of an attention side by side. The sources are never
changed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wan.configs import WAN_CONFIGS, WanConfig
from wan.loading import (
    SIZES_FILE,
    PathLike,
    Rename,
    build_from_config,
    build_on_meta,
    check_keys,
    config_arguments,
    dit_files,
    network_sizes,
    resolve,
    wav2vec2_files,
    wav2vec2_name,
)
from wan.shards import ConvertedFile, Item, Plan, block_order, shards, write
from wan.tensor_files import (
    CheckpointError,
    Progress,
    TensorEntry,
    read_header,
    read_pickle,
)

__all__ = ["Converted", "ConvertedFile", "Models", "convert"]

SHARD_BYTES = 5 << 30
MANIFEST = "wan-convert.json"
WAV2VEC_FOLDER = "chinese-wav2vec2-base"


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What `convert` wrote; the same is in `wan-convert.json` of the folder."""

    folder: Path
    files: tuple[ConvertedFile, ...]
    source_bytes: int

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True, kw_only=True)
class Models:
    """Who says which tensors there must be: functions that build each network (the defaults are the real
    ones).
    """

    dit: Callable[..., nn.Module] | None = None
    t5: Callable[[], nn.Module] | None = None
    clip: Callable[[], nn.Module] | None = None
    vae: Callable[[], nn.Module] | None = None

    def resolved(self, checkpoint: PathLike) -> dict[str, Callable[..., nn.Module]]:
        from wan.modules.clip import feature_tower
        from wan.modules.multitalk_model import WanModel
        from wan.modules.t5 import umt5_xxl
        from wan.modules.vae import VideoVAE

        t5, clip, vae = (network_sizes(checkpoint, name) for name in ("t5", "clip", "vae"))
        real = {
            "dit": WanModel,
            "t5": partial(umt5_xxl, encoder_only=True, device="meta", **t5),
            "clip": partial(feature_tower, **clip),
            "vae": partial(VideoVAE, **vae),
        }
        return {name: getattr(self, name) or factory for name, factory in real.items()}


def convert(
    checkpoint_dir: PathLike,
    output_dir: PathLike,
    *,
    multitalk: PathLike | None = None,
    wav2vec_dir: PathLike | None = None,
    config: WanConfig | None = None,
    models: Models | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Converted:
    """Write the converted checkpoint into the new or empty folder `output_dir`.

    `multitalk` is the audio weights' file or folder, if they aren't in `checkpoint_dir`. All names and shapes
    and the free space are checked before a byte is written, every file appears under its name only when it is
    complete, and the manifest comes last. Peak memory: about 1 GB. `progress(done, total, stage)` counts
    written bytes. Raises CheckpointError (sources), FileExistsError (output not empty), OSError (no space).
    """
    source, output = Path(checkpoint_dir), Path(output_dir)
    config = config or WAN_CONFIGS["multitalk-14B"]
    if output.exists() and any(output.iterdir()):
        msg = f"{output}: the output folder is not empty. Name a new one"
        raise FileExistsError(msg)
    plans = plan(source, multitalk, wav2vec_dir, config, (models or Models()).resolved(source), shard_bytes)
    total = sum(p.nbytes for p in plans)
    output.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output).free
    if free < total * 1.01:
        msg = (
            f"{output}: {total / 1e9:.1f} GB will be written, {free / 1e9:.1f} GB are free. Name another disk"
        )
        raise OSError(msg)

    done = 0

    def count(written: int) -> None:
        nonlocal done
        done += written
        if progress is not None:
            progress(done, total, "convert")

    files = tuple(write(output, p, count) for p in plans)
    copy_small_files(source, output, config, wav2vec_dir)
    write_index(output, plans)
    result = Converted(folder=output, files=files, source_bytes=source_bytes(plans))
    manifest = {"schema": 1, "source_bytes": result.source_bytes, "files": [asdict(f) for f in files]}
    (output / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return result


def plan(
    source: Path,
    multitalk: PathLike | None,
    wav2vec_dir: PathLike | None,
    config: WanConfig,
    models: Mapping[str, Callable[..., nn.Module]],
    shard_bytes: int,
) -> list[Plan]:
    """Every file that will be written, after checking all names and shapes. Reads headers only."""
    dit = build_from_config(models["dit"], config_arguments(models["dit"], source))
    files = dit_files(source, [] if multitalk is None else [multitalk])
    plans = list(shards(collect(files, dit, dtype=config.param_dtype, order=block_order), shard_bytes))
    parts: list[tuple[str, nn.Module, torch.dtype, Rename | None]] = [
        (config.t5_checkpoint, build_on_meta(models["t5"]), config.t5_dtype, None),
        (config.vae_checkpoint, build_on_meta(models["vae"]), torch.float32, None),
    ]
    if config.clip_checkpoint is not None:
        from wan.modules.clip import visual_name

        # `visual.` stays in the names, so that original and converted file load in the same way.
        clip = Prefixed(visual=build_on_meta(models["clip"]))
        keep: Rename = lambda name: name if visual_name(name) else None  # noqa: E731
        parts.append((config.clip_checkpoint, clip, config.clip_dtype, keep))
    for name, model, dtype, rename in parts:
        items = collect([resolve(source / name)], model, dtype=dtype, rename=rename)
        plans.append(Plan(name=str(Path(name).with_suffix(".safetensors")), items=items))
    if wav2vec_dir is not None:
        model, file = wav2vec2_files(wav2vec_dir)
        items = collect([file], model, dtype=torch.float32, rename=wav2vec2_name)
        plans.append(Plan(name=f"{WAV2VEC_FOLDER}/model.safetensors", items=items))
    return plans


class Prefixed(nn.Module):
    """A module under another name, for the names in its state dict."""

    def __init__(self, **inner: nn.Module) -> None:
        super().__init__()
        for name, module in inner.items():
            self.add_module(name, module)


def collect(
    files: Sequence[Path],
    model: nn.Module,
    *,
    dtype: torch.dtype,
    rename: Rename | None = None,
    order: Callable[[str], Any] | None = None,
) -> tuple[Item, ...]:
    """The tensors of the files under the model's names, in its order. Raises CheckpointError,
    KeyMismatchError.
    """
    found: dict[str, TensorEntry | Tensor] = {}
    for file in files:
        for name, tensor in (
            read_header(file) if file.suffix == ".safetensors" else read_pickle(file)
        ).items():
            new = rename(name) if rename else name
            if new in found:
                raise CheckpointError(
                    file, f"{new!r} is in another file of this model too", "Keep one of the two"
                )
            if new is not None:
                found[new] = tensor
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_keys(
        files[0] if len(files) == 1 else files[0].parent,
        {n: tuple(t.shape) for n, t in found.items()},
        wanted,
    )
    names = sorted(wanted, key=order) if order else list(wanted)
    return tuple(
        Item(name=n, dtype=dtype if found[n].dtype.is_floating_point else found[n].dtype, source=found[n])
        for n in names
    )


def copy_small_files(source: Path, output: Path, config: WanConfig, wav2vec_dir: PathLike | None) -> None:
    """config.json, the T5 tokenizer, and wav2vec2's configuration."""
    shutil.copyfile(source / "config.json", output / "config.json")
    if (source / SIZES_FILE).is_file():
        shutil.copyfile(source / SIZES_FILE, output / SIZES_FILE)
    tokenizer = source / config.t5_tokenizer
    if tokenizer.is_dir():
        shutil.copytree(tokenizer, output / config.t5_tokenizer, dirs_exist_ok=True)
    if wav2vec_dir is not None:
        for path in sorted(Path(wav2vec_dir).glob("*config.json")):
            shutil.copyfile(path, output / WAV2VEC_FOLDER / path.name)


def write_index(output: Path, plans: Iterable[Plan]) -> None:
    """The index of the DiT's shards, for loaders that ask for one."""
    dit = [p for p in plans if p.name.startswith("diffusion_pytorch_model")]
    index = {
        "metadata": {"total_size": sum(p.nbytes for p in dit)},
        "weight_map": {item.name: p.name for p in dit for item in p.items},
    }
    path = output / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def source_bytes(plans: Iterable[Plan]) -> int:
    """Bytes of the tensors as they were stored (of CLIP: only those that are used)."""
    return sum(item.source.nbytes for p in plans for item in p.items)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m wan.convert CHECKPOINT OUTPUT [--multitalk PATH] [--wav2vec DIR]`."""
    parser = argparse.ArgumentParser(
        prog="python -m wan.convert", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("checkpoint", type=Path, help="folder of Wan2.1-I2V-14B-480P")
    parser.add_argument("output", type=Path, help="new folder for the converted checkpoint")
    parser.add_argument(
        "--multitalk", type=Path, help="multitalk.safetensors or its folder, if not in CHECKPOINT"
    )
    parser.add_argument("--wav2vec", type=Path, help="folder of chinese-wav2vec2-base")
    options = parser.parse_args(arguments)

    def show(done: int, total: int, _: str) -> None:
        sys.stderr.write(f"\r{done / 1e9:8.2f} of {total / 1e9:.2f} GB")

    try:
        result = convert(
            options.checkpoint,
            options.output,
            multitalk=options.multitalk,
            wav2vec_dir=options.wav2vec,
            progress=show,
        )
    except (CheckpointError, OSError) as error:
        sys.stderr.write(f"\nerror: {error}\n")
        return 2
    sys.stdout.write(
        f"{result.folder}: {result.bytes / 1e9:.2f} GB from {result.source_bytes / 1e9:.2f} GB\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
