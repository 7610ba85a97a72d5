"""int8 and fp8 weights: half the memory of bf16. Weight-only by default; fp8 matrix products are an opt-in.

A row of a weight is stored as q·scale with scale = max|row| / 127 (int8) or / 448 (fp8 e4m3). The state dict
has the official quantised files' layout (optimum-quanto): `weight._data`, `weight._scale`, `bias`,
`input_scale`, `output_scale`; a map names the modules: {"blocks.0.ffn.0": {"weights": "qint8",
"activations": "none"}}. Specification §6.2.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .fuse import join_tensors as join
from .fuse import whole

KINDS: dict[str, tuple[str, torch.dtype, float]] = {
    "int8": ("qint8", torch.int8, 127.0),
    "fp8": ("qfloat8_e4m3fn", torch.float8_e4m3fn, 448.0),
}


class QuantError(ValueError):
    """A quantised checkpoint or a request for quantisation that can't be served; the message says what to
    do.
    """


class QuantWeight(nn.Module):
    """The two tensors of a quantised weight, under the names that the official files give them."""

    def __init__(self, data: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("_data", data)
        self.register_buffer("_scale", scale)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """[out, in] in `dtype`; int8 values and e4m3 values are exact in bf16, so one rounding happens."""
        return self._data.to(dtype) * self._scale.to(dtype)


@dataclass(frozen=True)
class Fp8Rows:
    """An activation in fp8: data [..., C] e4m3, scale [..., 1] fp32, and the dtype that products come out in.

    It stands for the tensor data·scale wherever linears read it.
    """

    data: Tensor
    scale: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return self.data.shape


def eager_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., C] → (data e4m3, scale [..., 1] fp32), scale = max|row| / 448, 1 for zeros; in plain PyTorch.

    In fp64 for fp64. One division a row, as the kernels do: many bf16 values lie in the middle of two steps,
    where the last bit decides. Clamped: a product a bit above 448 would be NaN in e4m3.
    """
    top = KINDS["fp8"][2]
    wide = x if x.dtype == torch.float64 else x.float()
    largest = wide.abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 1e-30, largest / top, 1.0)  # 1 / scale stays finite
    return (wide * (1 / scale)).clamp(-top, top).to(torch.float8_e4m3fn), scale.float()


def fp8_product(x: Fp8Rows, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x·weightᵀ + bias: weight [out, C] e4m3 with scale [out, 1] fp32 → [..., out] in x's dtype.

    Products by rows come out in bf16, the only dtype that cuBLASLt and CUTLASS have for them.
    """
    out = torch._scaled_mm(
        x.data.reshape(-1, x.shape[-1]),
        weight.t(),
        scale_a=x.scale.reshape(-1, 1),
        scale_b=scale.t(),
        bias=None if bias is None else bias.bfloat16(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return out.view(*x.shape[:-1], -1).to(x.dtype)


class QuantLinear(nn.Module):
    """A Linear with a quantised weight: x [..., in] → [..., out] in x's dtype.

    `matmul` "dequantize" (default) restores the weight and multiplies as ever: less memory, not faster.
    "fp8" also rounds x row by row to fp8 and multiplies in fp8: about twice as fast on Hopper, lossy, only
    after `use_fp8_matmul`.
    """

    def __init__(
        self, in_features: int, out_features: int, kind: str, *, bias: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.kind = in_features, out_features, kind
        self.matmul = "dequantize"
        data = torch.empty(out_features, in_features, dtype=_kind(kind)[1])
        self.weight = QuantWeight(data, torch.empty(out_features, 1, dtype=dtype))
        self.bias = (
            nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None
        )
        self.register_buffer("input_scale", torch.ones((), dtype=dtype))
        self.register_buffer("output_scale", torch.ones((), dtype=dtype))
        self.register_buffer("wide_scale", None, persistent=False)
        self.rows: Callable[[Tensor], tuple[Tensor, Tensor]] = eager_rows

    @classmethod
    def from_linear(cls, linear: nn.Linear, kind: str) -> QuantLinear:
        """Quantise a Linear's weight row by row, on its device."""
        weight = linear.weight.detach()
        with torch.device("meta"):
            out = cls(
                linear.in_features,
                linear.out_features,
                kind,
                bias=linear.bias is not None,
                dtype=weight.dtype,
            )
        out.weight = QuantWeight(*quantize_rows(weight, kind))
        out.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        for name in ("input_scale", "output_scale"):
            setattr(out, name, torch.ones((), dtype=weight.dtype, device=weight.device))
        return out

    def forward(self, x: Tensor | Fp8Rows) -> Tensor:
        if self.matmul == "fp8":
            if not isinstance(x, Fp8Rows):
                x = Fp8Rows(*self.rows(x), dtype=x.dtype)
            return fp8_product(x, self.weight._data, self.wide_scale, self.bias)
        return F.linear(x, self.weight.dequantized(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.out_features}, {self.kind}, matmul={self.matmul}"


def quantize_rows(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(q [out, in], scale [out, 1] in weight's dtype) with q·scale ≈ weight; a row of zeros keeps scale 1."""
    _, dtype, top = _kind(kind)
    wide = weight.float()
    scale = wide.abs().amax(dim=1, keepdim=True) / top
    scale = torch.where(scale > 0, scale, 1.0).to(weight.dtype)
    ratio = (wide / scale.float()).clamp(-top, top)
    return (ratio.round() if dtype == torch.int8 else ratio).to(dtype), scale


def quantize(
    model: nn.Module, kind: str, *, select: Callable[[str], bool] = lambda name: name.startswith("blocks.")
) -> dict[str, dict[str, str]]:
    """Replace the selected Linears of `model` (default: those of the blocks) by QuantLinears; returns the
    map.

    Embeddings, head, norms and modulation keep their dtype: they are small, and the output depends on them
    directly.
    """
    chosen = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and select(n)]
    if not chosen:
        msg = f"quantize: no Linear of {type(model).__name__} was selected"
        raise QuantError(msg)
    for name in chosen:
        _replace(model, name, QuantLinear.from_linear(model.get_submodule(name), kind))
    return {name: {"weights": _kind(kind)[0], "activations": "none"} for name in chosen}


def load_quantized(
    model: nn.Module, weights: Path | str | Mapping[str, Tensor], quant_map: Path | str | Mapping[str, Any]
) -> nn.Module:
    """Fill `model` (built on the meta device) from a quantised checkpoint in the official layout.

    weights: a safetensors file or a state dict; quant_map: its json or the parsed form. Every tensor of the
    file is used and every tensor of the model filled. Raises QuantError naming the module, tensor or map
    entry at fault.
    """
    if not isinstance(quant_map, Mapping):
        quant_map = json.loads(Path(quant_map).read_text())
    if not isinstance(weights, Mapping):
        from safetensors.torch import load_file

        weights = load_file(weights)
    for name, entry in quant_map.items():
        _replace(model, name, _empty_like(model, name, entry, weights))
    missing, unexpected = model.load_state_dict(dict(weights), strict=False, assign=True)
    if missing or unexpected:
        msg = (
            f"quantised checkpoint: {len(missing)} tensors missing {sorted(missing)[:5]}, "
            f"{len(unexpected)} unexpected {sorted(unexpected)[:5]}; are file and map of one model?"
        )
        raise QuantError(msg)
    return model.requires_grad_(False)


def use_fp8_matmul(model: nn.Module, *, fused: bool = False, anywhere: bool = False) -> int:
    """Let every fp8 QuantLinear multiply in fp8 (lossy); returns how many. Raises QuantError where the GPU
    can't.

    Needs compute capability ≥ 8.9 and a torch whose `_scaled_mm` takes row-wise scales. `fused` rounds
    activations by `wan.kernels.fp8` instead of PyTorch. `anywhere` also runs on a CPU, slowly: for tests.
    """
    layers = [m for m in model.modules() if isinstance(m, QuantLinear) and m.kind == "fp8"]
    if not layers:
        msg = "use_fp8_matmul: the model has no fp8 weights; quantize(model, 'fp8') first"
        raise QuantError(msg)
    device = layers[0].weight._data.device
    if not anywhere and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        msg = f"use_fp8_matmul: {device} has no fp8 matrix units (compute capability 8.9 or newer is needed)"
        raise QuantError(msg)
    _try_product(device)
    rows = eager_rows
    if fused:
        from .kernels.fp8 import quantize_rows as fused_rows

        def rows(x: Tensor) -> tuple[Tensor, Tensor]:
            data, scale = fused_rows(x.reshape(1, -1, x.shape[-1]))
            return data.view(x.shape), scale.view(*x.shape[:-1], 1)

    for layer in layers:
        layer.matmul, layer.rows = "fp8", rows
        layer.wide_scale = layer.weight._scale.float().contiguous()
    return len(layers)


def _try_product(device: torch.device) -> None:
    """One small product, so that a torch which can't says so now and not in a job. Raises QuantError."""
    data = torch.ones(32, 32, device=device).to(torch.float8_e4m3fn)
    scale = torch.ones(32, 1, device=device)
    try:
        fp8_product(Fp8Rows(data, scale, torch.bfloat16), data, scale, scale[:, 0])
    except (RuntimeError, ValueError) as error:
        first = str(error).partition("\n")[0]
        msg = f"use_fp8_matmul: torch {torch.__version__} has no row-wise fp8 product on {device}: {first}"
        raise QuantError(msg) from error


def joined(linears: Sequence[nn.Module]) -> tuple[Tensor, Tensor, Tensor] | None:
    """(data, scale, bias) over fp8 linears that lie behind each other (`fuse.join`), or None."""
    if any(not isinstance(m, QuantLinear) or m.matmul != "fp8" or m.bias is None for m in linears):
        return None
    found = [
        whole([m.weight._data for m in linears]),
        whole([m.wide_scale for m in linears]),
        whole([m.bias for m in linears]),
    ]
    return None if any(t is None for t in found) else tuple(found)


FULL_RATE = (
    "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.o",
    "audio_cross_attn.q_linear", "audio_cross_attn.proj", "ffn.0", "ffn.2",
)  # fmt: skip
"""The linears of a block that see every token. Keys and values of text, image and audio are computed once a
job and stay as they are."""


def speed_up(model: nn.Module, *, fused: bool = True, anywhere: bool = False) -> int:
    """Quantise the block linears that see every token to fp8 and multiply in fp8; returns how many.

    Weights that are fp8 already (an official quantised file) stay as they are. `fused` lets the norms and
    GELU write fp8 (`wan.kernels.ops_fp8`) and joins q, k and v. `anywhere`: see `use_fp8_matmul`, as the
    QuantError where the device can't.
    """
    names = tuple(f".{name}" for name in FULL_RATE)
    if not any(isinstance(m, QuantLinear) for m in model.modules()):
        quantize(model, "fp8", select=lambda name: name.startswith("blocks.") and name.endswith(names))
    count = use_fp8_matmul(model, fused=fused, anywhere=anywhere)
    if fused:
        from .kernels.ops_fp8 import FUSED_FP8

        for block in model.blocks:
            attention = block.self_attn
            _join([attention.q, attention.k, attention.v])
        model.use(ops=FUSED_FP8)
    return count


def _join(linears: Sequence[QuantLinear]) -> None:
    """Lay what three fp8 linears multiply with behind each other in memory."""
    join([m.weight._data for m in linears])
    join([m.wide_scale for m in linears])
    join([m.bias for m in linears])


def _empty_like(
    model: nn.Module, name: str, entry: Mapping[str, str], weights: Mapping[str, Tensor]
) -> QuantLinear:
    try:
        linear = model.get_submodule(name)
    except AttributeError as e:
        msg = f"quantisation map: {name!r} is no module of {type(model).__name__}; is it another model's map?"
        raise QuantError(msg) from e
    kind = next((k for k, (label, *_) in KINDS.items() if label == entry.get("weights")), None)
    if kind is None or entry.get("activations", "none") != "none" or not isinstance(linear, nn.Linear):
        labels = " or ".join(label for label, *_ in KINDS.values())
        msg = f"quantisation map: {name!r} is {dict(entry)}; only Linears with {labels} weights alone load"
        raise QuantError(msg)
    data = weights.get(f"{name}.weight._data")
    wanted = KINDS[kind][1]
    if data is None or data.dtype != wanted or tuple(data.shape) != (linear.out_features, linear.in_features):
        found = "absent" if data is None else f"{data.dtype} {list(data.shape)}"
        shape = [linear.out_features, linear.in_features]
        msg = f"quantised checkpoint: {name}.weight._data should be {wanted} {shape}, it is {found}"
        raise QuantError(msg)
    with torch.device("meta"):
        return QuantLinear(
            linear.in_features,
            linear.out_features,
            kind,
            bias=linear.bias is not None,
            dtype=linear.weight.dtype,
        )


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def _kind(kind: str) -> tuple[str, torch.dtype, float]:
    if kind not in KINDS:
        msg = f"unknown quantisation {kind!r}; choose one of {', '.join(KINDS)}"
        raise QuantError(msg)
    return KINDS[kind]
