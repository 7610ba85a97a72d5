"""CLIP's image tower against the reference (gate: 1e-5 of the maximum; multitalk.md §8.4)."""

import pytest
import torch
from goldens import config, error, fill, load

from wan.modules.clip import (
    VIT_H_14,
    CLIPModel,
    VisionTransformer,
    XLMRobertaCLIP,
    feature_tower,
    interpolate_positions,
    preprocess,
    visual_name,
)

NAME, GATE = "clip_visual", 1e-5


@pytest.fixture
def tower():
    return fill(VisionTransformer(**config(NAME)), NAME)


def test_preprocess(measured):
    golden = load(NAME)
    measured(NAME, "preprocessing", error(preprocess(list(golden["img"]), 56), golden["preprocessed"]), GATE)


def test_last_block_but_one(tower, measured):
    golden = load(NAME)
    clip = CLIPModel(torch.float32, "cpu", model=tower)
    measured(NAME, "all blocks but the last", error(clip.visual(list(golden["img"])), golden["y"]), GATE)


def test_all_blocks(tower, measured):
    golden = load(NAME)
    measured(NAME, "all blocks", error(tower(golden["preprocessed"]), golden["full_last_block"]), GATE)


def test_feature_tower_is_the_same_without_the_last_block(tower):
    golden = load(NAME)
    small = VisionTransformer(**{**config(NAME), "num_layers": 2}, features_only=True)
    wanted = small.state_dict().keys()
    small.load_state_dict({k: v for k, v in tower.state_dict().items() if k in wanted})
    features = CLIPModel(torch.float32, "cpu", model=small).visual(list(golden["img"]))
    assert torch.equal(features, tower(preprocess(list(golden["img"]), 56), use_31_block=True))


def test_positions_of_another_size(tower, measured):
    golden = load(NAME)
    positions = interpolate_positions(tower.pos_embedding, 26)
    measured(NAME, "interpolated positions", error(positions, golden["pos_interp"]), GATE)
    assert interpolate_positions(tower.pos_embedding, 17) is tower.pos_embedding
    assert tower(torch.zeros(1, 3, 70, 70), interpolation=True).shape == (1, 26, 48)


def test_names_of_the_feature_tower():
    with torch.device("meta"):
        tower = feature_tower()
        whole = XLMRobertaCLIP()
    names = [visual_name(name) for name in whole.state_dict()]
    assert {name for name in names if name is not None} == set(tower.state_dict())
    assert len(tower.transformer) == VIT_H_14["num_layers"] - 1 == 31


def test_reduced_precision_output_dtype(tower):
    features = CLIPModel(torch.bfloat16, "cpu", model=tower).visual(list(load(NAME)["img"]))
    assert features.dtype == torch.bfloat16


def test_both_towers_run():
    sizes = {"vocab_size": 50, "max_seq_len": 20, "dim": 32, "num_heads": 4, "num_layers": 1}
    clip = XLMRobertaCLIP(visual=config(NAME), textual=sizes).eval()
    image, text = clip(torch.zeros(2, 3, 56, 56), torch.tensor([[5, 6, 7], [8, 1, 1]]))
    assert image.shape == text.shape == (2, 24)


def test_padding_does_not_change_a_text():
    sizes = {"vocab_size": 50, "max_seq_len": 20, "dim": 32, "num_heads": 4, "num_layers": 1}
    clip = XLMRobertaCLIP(visual=config(NAME), textual=sizes).eval()
    short, long = clip.textual(torch.tensor([[5, 6]])), clip.textual(torch.tensor([[5, 6, 1, 1]]))
    torch.testing.assert_close(short, long, atol=1e-6, rtol=1e-5)


def test_needs_a_file_or_a_model():
    with pytest.raises(ValueError, match="either checkpoint_path"):
        CLIPModel(torch.float32, "cpu")
