"""A complete model folder in the official layout with small networks: real files for tests and checks.

    python -m multitalk_runtime.tiny DIR [--seed N]

It has everything that the published folders have and is loaded by the very same code; `sizes.json` and
`config.json` say how small it is. Weights are random but seeded, so the same seed writes the same bytes.
Heads are 128 wide, so the production kernels run on it. Tokenizers are trained on the spot; nothing is
downloaded. About 90 MB, most of it wav2vec2, whose width and depth the DiT's audio input fixes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multitalk_runtime.model_dirs import AUDIO_WEIGHTS, ModelDirs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

__all__ = ["write_tiny"]

TEXT_DIM = 64
VOCABULARY = 512
DIT = {
    "_class_name": "WanModel",
    "_diffusers_version": "0.30.0",
    "dim": 256,
    "eps": 1e-06,
    "ffn_dim": 512,
    "freq_dim": 256,
    "in_dim": 36,
    "intermediate_dim": 32,
    "model_type": "i2v",
    "num_heads": 2,
    "num_layers": 2,
    "out_dim": 16,
    "text_dim": TEXT_DIM,
    "text_len": 512,
}
T5 = {"vocab": VOCABULARY, "dim": TEXT_DIM, "dim_attn": 64, "dim_ffn": 128, "num_heads": 2, "num_layers": 2}
CLIP = {"num_layers": 1, "mlp_ratio": 0.25}
VAE = {"dim": 8, "num_res_blocks": 1}
WAV2VEC = {
    "architectures": ["Wav2Vec2ForPreTraining"],
    "model_type": "wav2vec2",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 64,
    "conv_bias": False,
    "conv_dim": [32] * 7,
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "do_stable_layer_norm": False,
    "feat_extract_activation": "gelu",
    "feat_extract_norm": "group",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-05,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 16,
}
PREPROCESSOR = {
    "do_normalize": False,
    "feature_extractor_type": "Wav2Vec2FeatureExtractor",
    "feature_size": 1,
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": False,
    "sampling_rate": 16000,
}
SHRINK = 8  # of the published buckets' sides, to a multiple of 16
CORPUS = (
    "A person is talking to the camera.",
    "Two people sit at a table and have a conversation.",
    "A woman sings into a microphone in a recording studio, bright tones, close up.",
    "The man looks at his friend, smiles and answers the question slowly.",
    "worst quality, low quality, blurred details, subtitles, static, deformed, still picture",
)


def write_tiny(root: Path, *, seed: int = 0) -> ModelDirs:
    """Write the three folders under `root`, which must be new or empty (FileExistsError)."""
    if root.exists() and any(root.iterdir()):
        msg = f"{root}: the folder is not empty. Name a new one"
        raise FileExistsError(msg)
    dirs = ModelDirs.under(root)
    for folder in (dirs.wan, dirs.multitalk, dirs.wav2vec):
        folder.mkdir(parents=True)
    _write_dit(dirs, seed)
    _write_encoders(dirs.wan, seed + 1)
    _write_wav2vec(dirs.wav2vec, seed + 2)
    return dirs


def _write_dit(dirs: ModelDirs, seed: int) -> None:
    """The base in two shards, the audio weights in the other folder; each folder has its index."""
    import torch
    from safetensors.torch import save_file

    from wan.loading import config_arguments
    from wan.modules.multitalk_model import WanModel

    _write_json(dirs.wan / "config.json", DIT)
    state = _fill(WanModel(**config_arguments(WanModel, dirs.wan)), seed)
    audio = {k: v for k, v in state.items() if "audio" in k or ".norm_x." in k}
    base = {k: v for k, v in state.items() if k not in audio}
    names = list(base)
    weight_map = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        save_file({name: base[name] for name in part}, dirs.wan / file)
        weight_map |= dict.fromkeys(part, file)
    # As published: everything in fp32 but the norms before the audio attention.
    stored = {k: v.to(torch.bfloat16) if ".norm_x." in k else v for k, v in audio.items()}
    save_file(stored, dirs.multitalk / AUDIO_WEIGHTS)
    index = "diffusion_pytorch_model.safetensors.index.json"
    size = sum(tensor.nbytes for tensor in base.values())
    _write_json(dirs.wan / index, {"metadata": {"total_size": size}, "weight_map": weight_map})
    size += sum(tensor.nbytes for tensor in stored.values())
    weight_map = weight_map | dict.fromkeys(audio, AUDIO_WEIGHTS)
    _write_json(dirs.multitalk / index, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _write_encoders(folder: Path, seed: int) -> None:
    import torch

    from wan.configs import WAN_CONFIGS
    from wan.modules.clip import feature_tower
    from wan.modules.t5 import umt5_xxl
    from wan.modules.vae import VideoVAE
    from wan.preprocess import BUCKETS

    config = WAN_CONFIGS["multitalk-14B"]
    buckets = {size: {k: _shrunk(v) for k, v in table.items()} for size, table in BUCKETS.items()}
    _write_json(folder / "sizes.json", {"t5": T5, "clip": CLIP, "vae": VAE, "buckets": buckets})
    text = _fill(umt5_xxl(encoder_only=True, **T5), seed)
    torch.save({k: v.bfloat16() for k, v in text.items()}, folder / config.t5_checkpoint)
    torch.save(_fill(VideoVAE(**VAE), seed), folder / config.vae_checkpoint)
    image = _fill(feature_tower(**CLIP), seed)
    torch.save({f"visual.{k}": v.half() for k, v in image.items()}, folder / str(config.clip_checkpoint))
    _write_tokenizer(folder / config.t5_tokenizer, ("<pad>", "</s>", "<unk>"), start="")
    _write_tokenizer(folder / str(config.clip_tokenizer), ("<s>", "<pad>", "</s>", "<unk>"), start="<s> ")


def _shrunk(bucket: Sequence[int]) -> list[int]:
    return [max(32, round(side / SHRINK / 16) * 16) for side in bucket]


def _write_wav2vec(folder: Path, seed: int) -> None:
    import torch

    from wan.modules.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model

    _write_json(folder / "config.json", WAV2VEC)
    _write_json(folder / "preprocessor_config.json", PREPROCESSOR)
    state = _fill(Wav2Vec2Model(Wav2Vec2Config.from_dict(WAV2VEC)), seed)
    # The published file has the pre-training wrapper's prefix and weight norm's old names.
    old = {
        "parametrizations.weight.original0": "weight_g",
        "parametrizations.weight.original1": "weight_v",
    }
    stored = {}
    for name, tensor in state.items():
        head, _, tail = name.partition(".conv.parametrizations")
        published = f"{head}.conv.{old['parametrizations' + tail]}" if tail else name
        stored[f"wav2vec2.{published}"] = tensor.half()  # half the bytes; loading makes fp32 of it
    torch.save(stored, folder / "pytorch_model.bin")


def _write_tokenizer(folder: Path, special: tuple[str, ...], *, start: str) -> None:
    """A Unigram tokenizer trained on a few sentences, with the family's special tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    folder.mkdir(parents=True)
    vocabulary = [(token, 0.0) for token in special] + _train(VOCABULARY - len(special))
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=special.index("<unk>"), byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    ends = [(token, special.index(token)) for token in special if token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{start}$A </s>", special_tokens=ends)
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    _write_json(folder / "special_tokens_map.json", roles)
    _write_json(folder / "tokenizer_config.json", {**roles, "model_max_length": 512})


def _train(size: int) -> list[tuple[str, float]]:
    """The commonest pieces of the corpus with the logarithm of how common they are.

    By counting: the library's trainer gives another vocabulary each time.
    """
    counts = Counter({chr(code): 1 for code in range(33, 127)} | {"▁": 1})
    for word in " ".join(CORPUS).split():
        marked = f"▁{word}"
        counts[marked] += 2
        for length in range(1, 5):
            counts.update(marked[at : at + length] for at in range(len(marked) - length + 1))
    letters = {piece for piece in counts if len(piece) == 1}
    longer = sorted(counts.keys() - letters, key=lambda piece: (-counts[piece] * len(piece), piece))
    chosen = sorted(letters) + longer[: size - len(letters)]
    total = sum(counts[piece] for piece in chosen)
    return [(piece, math.log(counts[piece] / total)) for piece in chosen]


def _fill(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Random weights that keep activations of order one, so that every input shows in the frames."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name, old in model.state_dict().items():
        leaf = name.rpartition(".")[2]
        if leaf in ("gamma", "original0") or (old.ndim < 2 and leaf not in ("bias", "masked_spec_embed")):
            state[name] = torch.ones(old.shape)
            continue
        noise = torch.randn(old.shape, generator=generator)
        fan_in = math.prod(old.shape[1:])
        if leaf == "bias":
            state[name] = 0.05 * noise
        elif "embedding" in leaf or leaf == "modulation" or name.startswith("token_embedding"):
            state[name] = 0.3 * noise
        else:
            state[name] = noise / math.sqrt(fan_in)
    return state


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; exit code 2 for a folder that can't be written."""
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m multitalk_runtime.tiny", description=summary)
    parser.add_argument("folder", type=Path, help="new folder for the three models")
    parser.add_argument("--seed", type=int, default=0, help="another seed writes other weights (default 0)")
    options = parser.parse_args(arguments)
    try:
        dirs = write_tiny(options.folder, seed=options.seed)
    except OSError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    size = sum(path.stat().st_size for path in options.folder.rglob("*") if path.is_file())
    sys.stdout.write(f"{dirs.wan.parent}: {size / 1e6:.0f} MB\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
