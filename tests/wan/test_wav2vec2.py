"""wav2vec2 against the reference (gate: 1e-5 of the maximum; multitalk.md §8.4)."""

import json

import pytest
import torch
from goldens import GOLDEN, config, error, fill, index, load

from wan.modules.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model, interpolate_features
from wan.tensor_files import CheckpointError

NAME, GATE = "wav2vec2", 1e-5


@pytest.fixture(scope="module")
def model():
    return fill(Wav2Vec2Model(Wav2Vec2Config.from_dict(config(NAME))), NAME)


def test_stages(model, measured):
    golden, frames = load(NAME), index(NAME)["seq_len"]
    features = model.features(golden["input_values"][None])
    measured(NAME, "convolution features", error(features, golden["conv_features"]), GATE)
    rows = interpolate_features(features, frames)
    measured(NAME, "interpolation", error(rows, golden["interpolated"]), GATE)
    out = model(golden["input_values"][None], frames)
    measured(NAME, "first state", error(out.hidden_states[0], golden["hidden0"]), GATE)
    measured(NAME, "last state", error(out.last_hidden_state, golden["last"]), GATE)


def test_embedding(model, measured):
    golden, frames = load(NAME), index(NAME)["seq_len"]
    assert torch.equal(golden["wav"], golden["input_values"])  # the waveform is not normalised
    embedding = model.embed(golden["wav"], frames)
    assert embedding.dtype == torch.float32
    measured(NAME, "audio embedding", error(embedding, golden["audio_embedding"]), GATE)
    # for contrast: normalising the waveform is really another result
    assert error(embedding, golden["audio_embedding_if_do_normalize"]) > 100 * GATE


def test_real_config_file():
    real = json.loads((GOLDEN / "keys" / "chinese_wav2vec2_base_config.json").read_text())
    assert Wav2Vec2Config.from_dict(real) == Wav2Vec2Config()


def test_other_architecture_is_refused_by_key():
    with pytest.raises(CheckpointError, match="do_stable_layer_norm is True"):
        Wav2Vec2Config.from_dict({"do_stable_layer_norm": True}, "config.json")


@pytest.mark.parametrize("wave", [torch.zeros(1, 300), torch.zeros(27200)])
def test_audio_too_short_or_of_wrong_shape(model, wave):
    with pytest.raises(ValueError, match="at least 400 samples"):
        model(wave, 5)


def test_shortest_audio(model):
    assert model.embed(torch.zeros(400), 1).shape == (1, 3, 32)
