"""The T5 encoder against the reference (gates: fp32 1e-5 of the maximum, bf16 rel. L2 0.04; multitalk.md
§8.4).
"""

import pytest
import torch
from goldens import config, error, fill, index, load, rel_l2, seeded

from wan.modules.t5 import T5Decoder, T5Encoder, T5EncoderModel, T5Model, T5RelativeEmbedding, umt5_xxl

NAME = "t5_encoder"
SMALL = {"dim": 32, "dim_attn": 48, "dim_ffn": 80, "num_heads": 4, "num_buckets": 32}


def outputs(model, golden):
    out = model(golden["ids"], golden["mask"])
    return [features[:n] for features, n in zip(out, golden["mask"].sum(1).tolist(), strict=True)]


def test_encoder_fp32(measured):
    golden = load(NAME)
    model = fill(T5Encoder(**config(NAME)), NAME)
    for row, y in enumerate(outputs(model, golden)):
        measured(NAME, f"fp32 text {row}", error(y, golden[f"y{row}"]), 1e-5)


def test_encoder_bf16(measured):
    golden = load(NAME)
    model = fill(T5Encoder(**config(NAME)), NAME).to(torch.bfloat16)
    for row, y in enumerate(outputs(model, golden)):
        assert y.dtype == torch.bfloat16
        measured(NAME, f"bf16 text {row}", rel_l2(y, golden[f"y{row}_bf16"]), 0.04, metric="rel L2")


def test_shared_positions(measured):
    golden = load(NAME)
    model = T5Encoder(**{**config(NAME), "shared_pos": True}).eval()
    seeded.fill(model, index(NAME)["salt"])
    measured(NAME, "shared positions", error(outputs(model, golden)[0], golden["y0_shared_pos"]), 1e-5)


def test_buckets(measured):
    golden = load(NAME)["rel_bucket_300"]
    table = T5RelativeEmbedding(32, 4, bidirectional=True)
    rows = [table.bucket(torch.arange(300) - q) for q in (0, 150, 299)]
    different = sum(int((a != b).sum()) for a, b in zip(rows, golden, strict=True))
    measured(NAME, "position buckets", different, 0, metric="count")


def test_decoder_is_causal_and_sees_its_context():
    decoder = T5Decoder(**SMALL, vocab=50, num_layers=2, shared_pos=False).eval()
    seeded.fill(decoder, "decoder:")
    ids = torch.arange(8)[None] + 3
    states = seeded.randn("decoder.states", (1, 5, 32))
    base = decoder(ids, None, states)
    changed = ids.clone()
    changed[0, 5] = 40
    other = decoder(changed, None, states)
    assert torch.equal(base[:, :5], other[:, :5])
    assert not torch.allclose(base[:, 5:], other[:, 5:])
    assert not torch.allclose(base, decoder(ids, None, states + 1))
    masked = decoder(ids, None, torch.cat([states, states + 9], 1), torch.tensor([[1] * 5 + [0] * 5]))
    torch.testing.assert_close(masked, base, atol=1e-5, rtol=1e-5)


def test_model_shares_its_embedding():
    model = T5Model(vocab_size=50, **SMALL, encoder_layers=1, decoder_layers=1).eval()
    assert model.encoder.token_embedding is model.decoder.token_embedding is model.token_embedding
    ids, mask = torch.ones(2, 6, dtype=torch.long), torch.ones(2, 6, dtype=torch.long)
    assert model(ids, mask, ids[:, :4], mask[:, :4]).shape == (2, 4, 50)


def test_umt5_xxl_size():
    assert sum(p.numel() for p in umt5_xxl(encoder_only=True, device="meta").parameters()) == 5_680_910_336


def test_decoder_without_context_is_an_error():
    decoder = T5Decoder(**SMALL, vocab=50, num_layers=1)
    with pytest.raises(ValueError, match="encoder_states"):
        decoder(torch.ones(1, 2, dtype=torch.long))


def test_wrapper_names_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="tokenizer_path"):
        T5EncoderModel(512, device="cpu")
