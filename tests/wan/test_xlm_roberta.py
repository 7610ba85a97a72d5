"""The XLM-R text tower against the reference (gate: 1e-5 of the maximum)."""

from goldens import config, error, fill, load

from wan.modules.xlm_roberta import XLMRoberta, xlm_roberta_large


def test_text_tower(measured):
    golden = load("xlm_roberta")
    model = fill(XLMRoberta(**config("xlm_roberta")), "xlm_roberta")
    measured("xlm_roberta", "features", error(model(golden["ids"]), golden["y"]), 1e-5)


def test_large_has_its_head_on_request():
    assert "head.0.weight" not in xlm_roberta_large(device="meta").state_dict()
    assert xlm_roberta_large(out_dim=1024, device="meta").head[2].weight.shape == (1024, 1024)
