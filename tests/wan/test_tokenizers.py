"""Tokenisation without transformers: cleaning rules, ids, padding, cutting, bad folders."""

import json

import pytest
import torch
from tiny_parts import CONFIG, T5, write_tokenizer

from wan.loading import CheckpointError
from wan.modules import t5 as t5_module
from wan.modules.t5 import T5Encoder, T5EncoderModel
from wan.modules.tokenizers import HuggingfaceTokenizer, basic_clean, canonicalize, whitespace_clean


@pytest.fixture
def folder(tmp_path):
    return write_tokenizer(tmp_path / "tok")


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("  a \n\t cat  ", "a cat"),
        ("a&amp;quot;cat&amp;quot;", 'a"cat"'),  # entities twice
        ("schÃ¶n", "schön"),  # mojibake repaired
        ("ﬁne", "fine"),  # ftfy opens ligatures
        ("“a”", '"a"'),
        ("\u200ba cat", "\u200ba cat"),
    ],
)
def test_basic_and_whitespace_cleaning(text, clean):
    assert whitespace_clean(basic_clean(text)) == clean


def test_canonicalize():
    assert canonicalize("A_Cat, runs!  Fast") == "a cat runs fast"
    assert canonicalize("A, <s>, B.", keep_punctuation_exact_string="<s>") == "a <s> b"


def test_ids_padding_and_mask(folder):
    tokenizer = HuggingfaceTokenizer(folder, seq_len=6, clean="whitespace")
    ids, mask = tokenizer(["a cat", "  Talkings \n"], return_mask=True)
    assert ids.tolist() == [[4, 5, 1, 0, 0, 0], [8, 9, 10, 1, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]
    assert ids.dtype == mask.dtype == torch.int64
    assert tokenizer.vocab_size == 14


def test_cut_keeps_the_end_of_text(folder):
    tokenizer = HuggingfaceTokenizer(folder, seq_len=3)
    assert tokenizer("a cat runs a dog").tolist() == [[4, 5, 1]]


def test_without_length_the_longest_text_decides(folder):
    tokenizer = HuggingfaceTokenizer(folder)
    assert tokenizer(["a", "a cat runs"]).tolist() == [[4, 1, 0, 0], [4, 5, 7, 1]]
    assert tokenizer("a", add_special_tokens=False).tolist() == [[4]]


def test_unknown_characters_become_unk(folder):
    assert 2 in HuggingfaceTokenizer(folder)("Ω").tolist()[0]


def test_lower(folder):
    assert HuggingfaceTokenizer(folder, clean="lower").cleaned(" A  Cat") == "a cat"


def test_padding_token_from_its_config(folder):
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "</s>"}}))
    assert HuggingfaceTokenizer(folder, seq_len=3)("a").tolist() == [[4, 1, 1]]
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<nothing>"}))
    with pytest.raises(CheckpointError, match="'<nothing>' is not in the vocabulary"):
        HuggingfaceTokenizer(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        HuggingfaceTokenizer(folder)


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no such file"):
        HuggingfaceTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        HuggingfaceTokenizer(tmp_path)


def test_bad_options(folder):
    with pytest.raises(ValueError, match="clean must be one of"):
        HuggingfaceTokenizer(folder, clean="all")
    with pytest.raises(TypeError, match="unknown option use_fast"):
        HuggingfaceTokenizer(folder, use_fast=True)


@pytest.fixture
def small(monkeypatch):
    for name, value in T5.items():
        monkeypatch.setitem(t5_module.UMT5_XXL, name, value)
    monkeypatch.setattr(t5_module, "UMT5_XXL_LAYERS", 2)


def test_text_encoder_from_a_file(tmp_path, folder, small):
    model = T5Encoder(**T5, num_layers=2, shared_pos=False).eval()
    torch.save(model.state_dict(), tmp_path / "t5.pth")
    encoder = T5EncoderModel(16, torch.float32, "cpu", tmp_path / "t5.pth", folder)
    features = encoder(["a cat", "a dog runs."], "cpu")
    assert [tuple(f.shape) for f in features] == [(3, 20), (5, 20)]
    ids, mask = encoder.tokenizer(["a cat", "a dog runs."], return_mask=True)
    assert torch.equal(features[1], model(ids, mask)[1, :5])
    assert not encoder.model.training


def test_text_encoder_shards_through_its_function(tmp_path, folder, small):
    model = T5Encoder(**T5, num_layers=2, shared_pos=False)
    torch.save(model.state_dict(), tmp_path / "t5.pth")
    calls = []

    def shard(module, **options):
        calls.append(options)
        return module

    T5EncoderModel(CONFIG.text_len, torch.float32, "cpu", tmp_path / "t5.pth", folder, shard_fn=shard)
    assert calls == [{"sync_module_states": False}]


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantised_text_encoder(tmp_path, folder, small, kind):
    from safetensors.torch import save_file

    from wan.quant import quantize

    model = T5Encoder(**T5, num_layers=2, shared_pos=False).eval()
    exact = T5EncoderModel(16, torch.float32, "cpu", None, folder, model=model)(["a cat runs"], "cpu")[0]
    (tmp_path / f"t5_map_{kind}.json").write_text(json.dumps(quantize(model, kind)))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / f"t5_{kind}.safetensors")
    options = {"quant": kind, "quant_dir": tmp_path}
    encoder = T5EncoderModel(16, torch.float32, "cpu", None, folder, **options)
    close = encoder(["a cat runs"], "cpu")[0]
    assert 0 < (close - exact).norm() / exact.norm() < 0.1
    published = tmp_path / "MeiGen" / "quant_models"
    published.mkdir(parents=True)
    for path in tmp_path.glob("t5_*"):
        path.rename(published / path.name)
    options["quant_dir"] = published.parent
    again = T5EncoderModel(16, torch.float32, "cpu", None, folder, **options)
    assert torch.equal(again(["a cat runs"], "cpu")[0], close)
    with pytest.raises(ValueError, match="needs quant_dir"):
        T5EncoderModel(16, torch.float32, "cpu", None, folder, quant=kind)


def test_text_encoder_needs_weights(folder):
    with pytest.raises(ValueError, match="checkpoint_path"):
        T5EncoderModel(16, torch.float32, "cpu", None, folder)
