"""int8 and fp8 weights: error bounds, the official layout, loading it, and every way a file can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from wan.quant import KINDS, QuantError, QuantLinear, load_quantized, quantize, quantize_rows, use_fp8_matmul


class Net(nn.Module):
    """A root layer and two blocks, as far as quantisation can tell a DiT."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16, bias=False)) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return x


def net(dtype: torch.dtype = torch.bfloat16) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


STEP = {
    "int8": 0.5 / 127,
    "fp8": 2**-4,
}  # half a step: of the row's maximum; of the value itself (3 mantissa bits)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=50)
@given(
    rows=st.integers(1, 6), columns=st.integers(1, 9), power=st.integers(-20, 20), seed=st.integers(0, 2**31)
)
def test_rows_within_half_a_step(kind: str, rows: int, columns: int, power: int, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    weight[0] = 0  # a row of zeros must not divide by zero
    data, scale = quantize_rows(weight, kind)
    assert data.dtype == KINDS[kind][1]
    assert scale.shape == (rows, 1)
    restored = data.float() * scale
    # fp8 rounds relatively, down to its smallest normal number 2^-6 of 448 scaled
    top = weight.abs().amax(1, keepdim=True)
    bound = top * STEP["int8"] if kind == "int8" else weight.abs() * STEP["fp8"] + top / 448 * 2**-10
    assert bool(((restored - weight).abs() <= bound * 1.001).all())
    assert not restored[0].any()


@pytest.mark.parametrize(("kind", "gate"), [("int8", 0.012), ("fp8", 0.04)])
def test_quantized_model_is_near_and_smaller(kind: str, gate: float) -> None:
    exact, quantised = net(), net()
    quant_map = quantize(quantised, kind)
    assert sorted(quant_map) == ["blocks.0.0", "blocks.0.2", "blocks.1.0", "blocks.1.2"]
    x = torch.randn(5, 6).bfloat16()
    want, got = exact(x).float(), quantised(x).float()
    assert got.dtype == want.dtype
    error = float((got - want).norm() / want.norm())
    assert 0 < error < gate
    weight = quantised.blocks[0][0].weight._data
    assert weight.nbytes * 2 == exact.blocks[0][0].weight.nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_official_layout_round_trip(kind: str, tmp_path: Path) -> None:
    model = net()
    quant_map = quantize(model, kind)
    state = model.state_dict()
    assert {k for k in state if k.startswith("blocks.0.0.")} == {
        f"blocks.0.0.{n}" for n in ("weight._data", "weight._scale", "bias", "input_scale", "output_scale")
    }
    assert state["blocks.0.0.weight._scale"].shape == (24, 1)
    assert state["blocks.0.0.input_scale"].shape == ()
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "map.json").write_text(json.dumps(quant_map))
    with torch.device("meta"):
        empty = Net().to(torch.bfloat16)
    loaded = load_quantized(empty, tmp_path / "model.safetensors", tmp_path / "map.json")
    assert not any(t.is_meta for t in loaded.state_dict().values())
    x = torch.randn(3, 6).bfloat16()
    assert torch.equal(loaded(x), model(x))


class TestRefusals:
    """Every error names what is wrong."""

    def files(self) -> tuple[Net, dict[str, torch.Tensor], dict[str, dict[str, str]]]:
        model = net()
        quant_map = quantize(model, "int8")
        with torch.device("meta"):
            return Net(), dict(model.state_dict()), quant_map

    def test_unknown_module(self) -> None:
        model, state, quant_map = self.files()
        with pytest.raises(QuantError, match=r"'blocks\.7\.0' is no module of Net"):
            load_quantized(model, state, quant_map | {"blocks.7.0": {"weights": "qint8"}})

    def test_unknown_format(self) -> None:
        model, state, quant_map = self.files()
        quant_map["blocks.0.0"] = {"weights": "qint4", "activations": "none"}
        with pytest.raises(
            QuantError, match=r"'blocks\.0\.0' is .*qint4.*only Linears with qint8 or qfloat8"
        ):
            load_quantized(model, state, quant_map)

    def test_quantised_activations(self) -> None:
        model, state, quant_map = self.files()
        quant_map["blocks.0.0"] = {"weights": "qint8", "activations": "qint8"}
        with pytest.raises(QuantError, match="only Linears"):
            load_quantized(model, state, quant_map)

    def test_wrong_dtype_and_shape(self) -> None:
        model, state, quant_map = self.files()
        state["blocks.1.0.weight._data"] = state["blocks.1.0.weight._data"][:3].float()
        with pytest.raises(
            QuantError, match=r"blocks\.1\.0\.weight\._data should be torch\.int8 \[24, 16\], it is"
        ):
            load_quantized(model, state, quant_map)

    def test_map_without_its_file(self) -> None:
        model, _, quant_map = self.files()
        with pytest.raises(QuantError, match="it is absent"):
            load_quantized(model, {}, quant_map)

    def test_leftover_tensors(self) -> None:
        model, state, quant_map = self.files()
        state["extra"] = state.pop("embed.bias")
        with pytest.raises(
            QuantError, match=r"1 tensors missing \['embed\.bias'\], 1 unexpected \['extra'\]"
        ):
            load_quantized(model, state, quant_map)

    def test_unknown_kind_and_nothing_selected(self) -> None:
        with pytest.raises(QuantError, match="choose one of int8, fp8"):
            quantize(net(), "int4")
        with pytest.raises(QuantError, match="no Linear of Net was selected"):
            quantize(net(), "int8", select=lambda name: False)

    def test_fp8_products_need_the_hardware(self) -> None:
        model = net()
        with pytest.raises(QuantError, match="no fp8 weights"):
            use_fp8_matmul(model)
        quantize(model, "fp8")
        with pytest.raises(QuantError, match="no fp8 matrix units"):
            use_fp8_matmul(model)
        assert all(m.matmul == "dequantize" for m in model.modules() if isinstance(m, QuantLinear))
