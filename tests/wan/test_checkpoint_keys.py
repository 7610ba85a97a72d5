"""Every tensor of the real checkpoints, by name and shape, on the meta device at real size."""

import json

import pytest
import torch
from goldens import GOLDEN, keys
from torch import nn

from wan.loading import wav2vec2_name
from wan.modules.clip import XLMRobertaCLIP
from wan.modules.t5 import umt5_xxl
from wan.modules.vae import VideoVAE
from wan.modules.wav2vec2 import Wav2Vec2Model


def multitalk_dit() -> nn.Module:
    from wan.modules.multitalk_model import WanModel

    sizes = {"in_dim": 36, "dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}
    return WanModel(model_type="i2v", **sizes, weight_init=False)


MODELS = {
    "vae": VideoVAE,
    "t5_umt5_xxl_encoder": lambda: umt5_xxl(encoder_only=True, device="meta"),
    "clip_xlm_roberta_vit_h_14": XLMRobertaCLIP,
    "wav2vec2_base": Wav2Vec2Model,
    "dit_multitalk_i2v_14B": multitalk_dit,
}


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes(name):
    golden = json.loads((GOLDEN / "keys" / f"{name}.json").read_text())
    with torch.device("meta"):
        model = MODELS[name]()
    found = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    assert len(found) == golden["tensors"]
    assert found == keys(name)
    assert sum(p.numel() for p in model.parameters()) == golden["params"]


def test_both_wav2vec2_namings():
    wanted = set(keys("wav2vec2_base"))
    old = {
        "wav2vec2."
        + name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        )
        for name in wanted
    }
    assert {wav2vec2_name(name) for name in wanted} == wanted
    assert {wav2vec2_name(name) for name in old} == wanted
    extra = ["quantizer.codevectors", "project_q.weight", "project_hid.bias"]
    assert [wav2vec2_name(name) for name in extra] == [None] * 3
