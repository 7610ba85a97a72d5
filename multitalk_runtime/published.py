"""The three published models: their files, sizes and hashes, and the tensors that must be in them.

Facts of the repositories at the revisions named here (multitalk.md §5.1). Names and shapes of all tensors are
in `model_keys.json`, which `python -m multitalk_runtime.published` makes from `wan`: checking needs no torch.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multitalk_runtime.model_dirs import AUDIO_WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["CONFIG", "MODELS", "ModelFile", "PublishedModel", "Shapes", "published_shapes"]

Shapes = dict[str, tuple[int, ...]]
KEYS = Path(__file__).with_name("model_keys.json")
SHARDS = 7
SHARD_BYTES = 65_579_515_136 // SHARDS  # of the tensors; how they are spread is not published


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """A file that is needed. `size` in bytes; `about` says that it is not exact; `sha256` where published."""

    name: str
    size: int
    sha256: str | None = None
    about: bool = False
    network: str | None = None  # whose tensors are in it


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """One repository at one revision. `key` is the field of `ModelDirs`."""

    key: str
    repo: str
    revision: str
    files: tuple[ModelFile, ...]


WAN = PublishedModel(
    key="wan",
    repo="Wan-AI/Wan2.1-I2V-14B-480P",
    revision="6b73f84e66371cdfe870c72acd6826e1d61cf279",
    files=(
        ModelFile(name="config.json", size=250, about=True),
        *(
            ModelFile(
                name=f"diffusion_pytorch_model-{i:05d}-of-{SHARDS:05d}.safetensors",
                size=SHARD_BYTES,
                about=True,
                network="dit",
            )
            for i in range(1, SHARDS + 1)
        ),
        ModelFile(
            name="models_t5_umt5-xxl-enc-bf16.pth",
            size=11_361_920_418,
            sha256="7cace0da2b446bbbbc57d031ab6cf163a3d59b366da94e5afe36745b746fd81d",
            network="t5",
        ),
        ModelFile(
            name="models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
            size=4_772_359_047,
            sha256="628c9998b613391f193eb67ff68da9667d75f492911e4eb3decf23460a158c38",
            network="clip",
        ),
        ModelFile(
            name="Wan2.1_VAE.pth",
            size=507_609_880,
            sha256="38071ab59bd94681c686fa51d75a1968f64e470262043be31f7a094e442fd981",
            network="vae",
        ),
        ModelFile(
            name="google/umt5-xxl/tokenizer.json",
            size=16_837_417,
            sha256="6e197b4d3dbd71da14b4eb255f4fa91c9c1f2068b20a2de2472967ca3d22602b",
        ),
        ModelFile(
            name="google/umt5-xxl/tokenizer_config.json",
            size=61_728,
            sha256="ed9a3a8b0faa71a70a32847e0435fe036e6e112d4df4edb7bb48a921e344dc05",
        ),
    ),
)
MULTITALK = PublishedModel(
    key="multitalk",
    repo="MeiGen-AI/MeiGen-MultiTalk",
    revision="b3ccbea2f68c89fafb277b9bd907905fff7a9337",
    files=(
        ModelFile(
            name=AUDIO_WEIGHTS,
            size=9_947_889_040,
            sha256="f4b48e2eb148e2407711dfc29ef411820094e5684435d5791a6d34b53fe9e1db",
            network="dit",
        ),
    ),
)
WAV2VEC = PublishedModel(
    key="wav2vec",
    repo="TencentGameMate/chinese-wav2vec2-base",
    revision="3991242c806928916fff4a8c0e4f76acf661b743",
    files=(
        ModelFile(
            name="config.json",
            size=1951,
            sha256="dc2cd2f989104b9510ce9e43a343a6f1fe55aa60baa1fcfca0c5908e6590b8b6",
        ),
        ModelFile(
            name="preprocessor_config.json",
            size=160,
            sha256="c1707926644954affc391ab09ccfaf470ccd80af218d11350991090711441c09",
        ),
        ModelFile(
            name="pytorch_model.bin",
            size=380_261_837,
            sha256="be2da40c9e7ae26bfc904a3ed79ebb9e8f060bec6dba85d6a6ae86114bc38901",
            network="wav2vec",
        ),
    ),
)
MODELS = (WAN, MULTITALK, WAV2VEC)

CONFIG: Mapping[str, Any] = {
    "dim": 5120, "eps": 1e-06, "ffn_dim": 13824, "freq_dim": 256, "in_dim": 36, "model_type": "i2v",
    "num_heads": 40, "num_layers": 40, "out_dim": 16, "text_len": 512,
}  # fmt: skip
"""The DiT's config.json, without the lines of the library that wrote it."""


@cache
def published_shapes() -> dict[str, Shapes]:
    """Network (`dit`, `t5`, `clip`, `vae`, `wav2vec`) → tensor name → shape. CLIP: the 31 blocks in use."""
    content = json.loads(KEYS.read_text(encoding="utf-8"))
    return {network: _unfold(spec) for network, spec in content.items()}


def _unfold(spec: Mapping[str, Any]) -> Shapes:
    shapes: Shapes = {}
    for name, shape in spec["tensors"].items():
        for number in range(spec["blocks"]) if "#" in name else ("",):
            shapes[name.replace("#", str(number))] = tuple(shape)
    return shapes


def fold(shapes: Shapes, blocks: str) -> dict[str, Any]:
    """Names with `blocks`' number replaced by #: a network's blocks all have the same tensors."""
    pattern = re.compile(rf"^{blocks}\.(\d+)\.") if blocks else None
    folded: dict[str, list[int]] = {}
    count = 0
    for name, shape in shapes.items():
        found = pattern.match(name) if pattern else None
        if found:
            count = max(count, int(found[1]) + 1)
            name = f"{blocks.replace(chr(92), '')}.#.{name[found.end() :]}"
        folded[name] = list(shape)
    spec = {"blocks": count, "tensors": folded}
    if _unfold(spec) != shapes:
        msg = f"the blocks {blocks!r} differ from one another"
        raise ValueError(msg)
    return spec


def shapes_of(folder: Path | None = None, wav2vec: Path | None = None) -> dict[str, Shapes]:
    """The tensors that `wan` expects, by building the networks without memory: slower, but right for any
    size. `folder` and `wav2vec` say the sizes; without them they are the published ones.
    """
    from wan.loading import (
        build_from_config,
        build_on_meta,
        config_arguments,
        network_sizes,
        read_config,
    )
    from wan.modules.clip import feature_tower
    from wan.modules.multitalk_model import WanModel
    from wan.modules.t5 import umt5_xxl
    from wan.modules.vae import VideoVAE
    from wan.modules.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model

    sizes = {name: network_sizes(folder, name) if folder else {} for name in ("t5", "clip", "vae")}
    arguments = config_arguments(WanModel, folder) if folder else dict(CONFIG)
    speech = Wav2Vec2Config.from_dict(read_config(wav2vec)) if wav2vec else Wav2Vec2Config()
    networks = {
        "dit": build_from_config(WanModel, arguments),
        "t5": umt5_xxl(encoder_only=True, device="meta", **sizes["t5"]),
        "clip": build_on_meta(lambda: feature_tower(**sizes["clip"])),
        "vae": build_on_meta(lambda: VideoVAE(**sizes["vae"])),
        "wav2vec": build_on_meta(lambda: Wav2Vec2Model(speech)),
    }
    return {
        network: {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        for network, module in networks.items()
    }


def main() -> None:
    """Write model_keys.json anew, from `wan`."""
    blocks = {"dit": "blocks", "t5": "blocks", "clip": "transformer", "vae": "",
              "wav2vec": r"encoder\.layers"}  # fmt: skip
    content = {network: fold(shapes, blocks[network]) for network, shapes in shapes_of().items()}
    text = json.dumps(content, separators=(",", ":")).replace('"],"', '"],\n"').replace("],", "],\n")
    KEYS.write_text(re.sub(r"(\d),\n(\d)", r"\1,\2", text) + "\n", encoding="utf-8")
    sys.stdout.write(f"{KEYS}: {sum(len(s['tensors']) for s in content.values())} names\n")


if __name__ == "__main__":
    main()
