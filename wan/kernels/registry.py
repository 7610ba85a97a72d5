"""`KERNELS`: every Triton kernel with what is needed to compile it without a GPU and to check it with one.

The smoke suite compiles each for every target capability in every image (`triton.aot`), and runs each against
its reference where there is a GPU (`triton.jit`) or under TRITON_INTERPRET=1 (`triton.interpret`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from . import fp8, norm, reference, reference_lossy, rotary, softmax, vae

Call = tuple[tuple[Any, ...], dict[str, Any]]
Example = Callable[[torch.device | str, torch.Generator], Call]


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """One kernel at its real width.

    name: unique. fn: the `triton.jit` function. signature: argument → Triton type, run-time arguments only.
    constexprs: argument → value. options: compile options. launch: the Python launcher. reference: the same
    call in PyTorch. example(device, generator) → (args, kwargs) for both, drawn fresh on each call.
    floor: the lowest capability that it compiles for. lossy: its outputs have 8 bits, where a value next to
    the middle of two steps may go either way.
    """

    name: str
    fn: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    launch: Callable[..., Any]
    reference: Callable[..., Any]
    example: Example
    options: Mapping[str, int] = field(default_factory=lambda: {"num_warps": 4})
    floor: int = 80  # the first capability that has what it needs
    lossy: bool = False  # rounds to 8 bits

    def source(self) -> Any:
        """The `ASTSource` in the form that the installed triton (3.0–3.9) takes."""
        from triton.compiler import ASTSource

        names = list(self.fn.arg_names)
        if "constexprs" in inspect.signature(ASTSource.__init__).parameters:  # triton ≥ 3.2
            signature = {n: self.signature.get(n, "constexpr") for n in names}
            constexprs = {(names.index(n),): v for n, v in self.constexprs.items()}
            return ASTSource(fn=self.fn, signature=signature, constexprs=constexprs)
        return ASTSource(fn=self.fn, signature=dict(self.signature), constants=dict(self.constexprs))

    def compile(self, capability: int) -> Any:
        """Compile for one capability (80, 86, 89, 90, 100, 120) with no GPU, driver or C compiler."""
        from triton.backends.compiler import GPUTarget

        target = GPUTarget("cuda", capability, 32)
        return triton.compile(self.source(), target=target, options=dict(self.options))


def _rows(device: torch.device | str, generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device, generator=generator, dtype=torch.float32)


def _example_rope(rows: int = 48, heads: int = 40, half: int = 64, *, norm: bool = True) -> Example:
    def example(device: torch.device | str, generator: torch.Generator) -> Call:
        channels = heads * 2 * half
        angle = _rows(device, generator, rows, half) * 10
        x = _rows(device, generator, 1, rows, channels).bfloat16()
        weight = (1 + 0.1 * _rows(device, generator, channels)).bfloat16()
        table = angle.cos(), angle.sin()
        return ((x, weight, *table) if norm else (x, *table)), {}

    return example


def _example_norm(kind: str, rows: int = 48, channels: int = 5120) -> Example:
    def example(device: torch.device | str, generator: torch.Generator) -> Call:
        x = (3 * _rows(device, generator, 1, rows, channels) + 0.5).bfloat16()
        y = _rows(device, generator, 1, rows, channels).bfloat16()
        gate, scale, shift = (0.3 * _rows(device, generator, 1, 1, channels) for _ in range(3))
        affine = (1 + scale.view(-1)).bfloat16(), shift.view(-1).bfloat16()
        return {
            "rms_norm": ((x, affine[0]), {}),
            "layer_norm": ((x, *affine), {}),
            "layer_norm_modulate": ((x, scale, shift), {}),
            "gate_residual": ((x, y, gate), {}),
            "gate_residual_norm": ((x, y, gate, *affine), {"modulate": False}),
            "residual_modulate": ((x, y, None, scale, shift), {"modulate": True}),
        }[kind]

    return example


def _example_vae(last: bool, channels: int = 96, size: int = 16) -> Example:
    def example(device: torch.device | str, generator: torch.Generator) -> Call:
        x = _rows(device, generator, 1, channels, 2, size, size)
        if last:
            x = x.bfloat16().contiguous(memory_format=torch.channels_last_3d)
        return (x, 1 + 0.1 * _rows(device, generator, channels, 1, 1, 1)), {}

    return example


def _example_softmax(tokens: int = 48, frames: int = 2, heads: int = 40, keys: int = 32) -> Example:
    def example(device: torch.device | str, generator: torch.Generator) -> Call:
        scores = (3 * _rows(device, generator, frames, tokens, heads * keys)).bfloat16()
        return (scores, _rows(device, generator, frames, 1, heads * keys).bfloat16(), heads), {}

    return example


def _dit(gate: str, affine: str) -> dict[str, str]:
    """The signature of `gate_residual_norm_kernel` with a gate and an affine or modulation of these types."""
    bf16 = dict.fromkeys(("x", "y"), "*bf16")
    vectors = {"gate": gate, "scale": affine, "shift": affine}
    strides = dict.fromkeys(
        ("rows", "x_stride", "y_stride", "gate_stride", "scale_stride", "shift_stride"), "i32"
    )
    return {**bf16, **vectors, "out": "*bf16", "normed_out": "*bf16", **strides, "eps": "fp32"}


def _layer_norm_signature(affine: str) -> dict[str, str]:
    vectors = {"x": "*bf16", "scale": affine, "shift": affine, "out": "*bf16"}
    return (
        vectors | dict.fromkeys(("rows", "x_stride", "scale_stride", "shift_stride"), "i32") | {"eps": "fp32"}
    )


_VAE_TAIL = {"positions": "i32", "total": "i32", "root": "fp32"}
_WIDE = {"C": 5120, "BLOCK": 8192}

EXACT: tuple[KernelSpec, ...] = (
    KernelSpec(
        name="rms_norm_rope",
        fn=rotary.rms_norm_rope_kernel,
        signature={
            "x": "*bf16",
            "weight": "*bf16",
            "cos": "*fp32",
            "sin": "*fp32",
            "out": "*bf16",
            "rows": "i32",
            "x_stride": "i32",
            "out_stride": "i32",
            "eps": "fp32",
        },
        constexprs={"HEADS": 40, "HALF": 64, "HEADS_BLOCK": 64, "HALF_BLOCK": 64, "NORM": True},
        launch=rotary.rms_norm_rope,
        reference=reference.rms_norm_rope,
        example=_example_rope(),
    ),
    KernelSpec(
        name="rope",
        fn=rotary.rms_norm_rope_kernel,
        signature={
            "x": "*bf16",
            "weight": "*bf16",
            "cos": "*fp32",
            "sin": "*fp32",
            "out": "*bf16",
            "rows": "i32",
            "x_stride": "i32",
            "out_stride": "i32",
            "eps": "fp32",
        },
        constexprs={"HEADS": 40, "HALF": 64, "HEADS_BLOCK": 64, "HALF_BLOCK": 64, "NORM": False},
        launch=rotary.rope,
        reference=reference.rope,
        example=_example_rope(norm=False),
    ),
    KernelSpec(
        name="rms_norm",
        fn=norm.rms_norm_kernel,
        signature={"x": "*bf16", "weight": "*bf16", "out": "*bf16", "x_stride": "i32", "eps": "fp32"},
        constexprs=_WIDE,
        launch=norm.rms_norm,
        reference=reference.rms_norm,
        example=_example_norm("rms_norm"),
    ),
    KernelSpec(
        name="layer_norm",
        fn=norm.layer_norm_kernel,
        signature=_layer_norm_signature("*bf16"),
        constexprs={**_WIDE, "MODULATE": False},
        launch=norm.layer_norm,
        reference=reference.layer_norm,
        example=_example_norm("layer_norm"),
    ),
    KernelSpec(
        name="layer_norm_modulate",
        fn=norm.layer_norm_kernel,
        signature=_layer_norm_signature("*fp32"),
        constexprs={**_WIDE, "MODULATE": True},
        launch=norm.layer_norm_modulate,
        reference=reference.layer_norm_modulate,
        example=_example_norm("layer_norm_modulate"),
    ),
    KernelSpec(
        name="gate_residual",
        fn=norm.gate_residual_norm_kernel,
        signature=_dit("*fp32", "*bf16"),
        constexprs={**_WIDE, "GATE": True, "NORM": False, "MODULATE": False},
        launch=norm.gate_residual,
        reference=reference.gate_residual,
        example=_example_norm("gate_residual"),
    ),
    KernelSpec(
        name="gate_residual_norm",
        fn=norm.gate_residual_norm_kernel,
        signature=_dit("*fp32", "*bf16"),
        constexprs={**_WIDE, "GATE": True, "NORM": True, "MODULATE": False},
        launch=norm.gate_residual_norm,
        reference=reference.gate_residual_norm,
        example=_example_norm("gate_residual_norm"),
    ),
    KernelSpec(
        name="residual_modulate",
        fn=norm.gate_residual_norm_kernel,
        signature=_dit("*bf16", "*fp32"),
        constexprs={**_WIDE, "GATE": False, "NORM": True, "MODULATE": True},
        launch=norm.gate_residual_norm,
        reference=reference.gate_residual_norm,
        example=_example_norm("residual_modulate"),
    ),
    KernelSpec(
        name="bias_softmax",
        fn=softmax.bias_softmax_kernel,
        signature={"scores": "*bf16", "bias": "*bf16", "out": "*bf16", "rows": "i32", "heads": "i32"},
        constexprs={"M": 32, "BLOCK": 32, "ROWS": 128},
        launch=softmax.bias_softmax,
        reference=reference.bias_softmax,
        example=_example_softmax(),
    ),
    KernelSpec(
        name="rms_norm_silu",
        fn=vae.rms_norm_silu_kernel,
        signature={"x": "*fp32", "gamma": "*fp32", "out": "*fp32", **_VAE_TAIL},
        constexprs={"C": 96, "BLOCK_C": 128, "BLOCK_P": 32, "CHANNELS_LAST": False},
        launch=vae.rms_norm_silu,
        reference=reference.rms_norm_silu,
        example=_example_vae(last=False),
    ),
    KernelSpec(
        name="rms_norm_silu_last",
        fn=vae.rms_norm_silu_kernel,
        signature={"x": "*bf16", "gamma": "*fp32", "out": "*bf16", **_VAE_TAIL},
        constexprs={"C": 96, "BLOCK_C": 128, "BLOCK_P": 32, "CHANNELS_LAST": True},
        launch=vae.rms_norm_silu,
        reference=reference.rms_norm_silu,
        example=_example_vae(last=True),
    ),
)


def _example_fp8(kind: str, rows: int = 48, channels: int = 5120) -> Example:
    def example(device: torch.device | str, generator: torch.Generator) -> Call:
        if kind == "gelu":
            return ((3 * _rows(device, generator, 1, rows, 13824)).bfloat16(),), {}
        if kind == "rows":
            return ((3 * _rows(device, generator, 1, rows, channels)).bfloat16(),), {}
        name = "layer_norm_modulate" if kind == "modulate" else "gate_residual_norm"
        return _example_norm(name, rows, channels)(device, generator)

    return example


def _example_heads(rows: int = 48, heads: int = 40, width: int = 128, *, quantize: bool = True) -> Example:
    """v as it lies in the joined product of q, k and v; some of it goes beyond 448."""

    def example(device: torch.device | str, generator: torch.Generator) -> Call:
        x = _rows(device, generator, 1, rows, 3, heads, width).bfloat16()[:, :, 2]
        centre = 3 * _rows(device, generator, 1, heads, width)
        inverse = 448 / (4 + _rows(device, generator, 1, heads).abs())
        return ((x, centre, inverse) if quantize else (x,)), {}

    return example


_FP8_OUT = {"data": "*fp8e4nv", "scale": "*fp32"}
_FP8_STRIDES = ("rows", "x_stride", "y_stride", "gate_stride", "a_stride", "b_stride")


def _fp8_norm(vectors: str) -> dict[str, str]:
    pointers = {"x": "*bf16", "y": "*bf16", "gate": "*fp32", "a": vectors, "b": vectors, "out": "*bf16"}
    return {**pointers, **_FP8_OUT, **dict.fromkeys(_FP8_STRIDES, "i32"), "eps": "fp32"}


_HEADS = dict.fromkeys(("tokens", "heads", "sample_stride", "token_stride", "head_stride"), "i32")


FP8: tuple[KernelSpec, ...] = (
    KernelSpec(
        name="quantize_rows",
        fn=fp8.quantize_kernel,
        signature={"x": "*bf16", **_FP8_OUT, "x_stride": "i32"},
        constexprs={**_WIDE, "GELU": False},
        launch=fp8.quantize_rows,
        reference=reference_lossy.quantize_rows,
        example=_example_fp8("rows"),
        floor=89,
        lossy=True,
    ),
    KernelSpec(
        name="gelu_quantize_rows",
        fn=fp8.quantize_kernel,
        signature={"x": "*bf16", **_FP8_OUT, "x_stride": "i32"},
        constexprs={"C": 13824, "BLOCK": 16384, "GELU": True},
        launch=fp8.gelu_quantize_rows,
        reference=reference_lossy.gelu_quantize_rows,
        example=_example_fp8("gelu"),
        floor=89,
        lossy=True,
    ),
    KernelSpec(
        name="layer_norm_modulate_quantize",
        fn=fp8.norm_quantize_kernel,
        signature=_fp8_norm("*fp32"),
        constexprs={**_WIDE, "RESIDUAL": False, "GATE": False, "MODULATE": True},
        launch=fp8.layer_norm_modulate_quantize,
        reference=reference_lossy.layer_norm_modulate_quantize,
        example=_example_fp8("modulate"),
        floor=89,
        lossy=True,
    ),
    KernelSpec(
        name="gate_residual_norm_quantize",
        fn=fp8.norm_quantize_kernel,
        signature=_fp8_norm("*bf16"),
        constexprs={**_WIDE, "RESIDUAL": True, "GATE": True, "MODULATE": False},
        launch=fp8.gate_residual_norm_quantize,
        reference=reference_lossy.gate_residual_norm_quantize,
        example=_example_fp8("affine"),
        floor=89,
        lossy=True,
    ),
    KernelSpec(
        name="head_extremes",
        fn=fp8.head_extremes_kernel,
        signature={"x": "*bf16", "out": "*fp32", **_HEADS},
        constexprs={"D": 128, "BLOCK": 128, "TOKENS": 512, "STEP": 32},
        launch=fp8.head_extremes,
        reference=reference_lossy.head_extremes,
        example=_example_heads(rows=200, quantize=False),
        options={"num_warps": 2},
    ),
    KernelSpec(
        name="quantize_heads",
        fn=fp8.head_quantize_kernel,
        signature={"x": "*bf16", "centre": "*fp32", "inverse": "*fp32", "data": "*fp8e4nv", **_HEADS},
        constexprs={"D": 128, "BLOCK": 128, "TOKENS": 32},
        launch=fp8.quantize_heads,
        reference=reference_lossy.quantize_heads,
        example=_example_heads(rows=100),
        options={"num_warps": 2},
        floor=89,
        lossy=True,
    ),
)

KERNELS: tuple[KernelSpec, ...] = EXACT + FP8
