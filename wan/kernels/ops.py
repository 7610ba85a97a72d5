"""`FUSED`: the Triton kernels as the set of operations that `model.use(ops=FUSED)` runs."""

from __future__ import annotations

from ..modules.ops import Ops
from .norm import gate_residual, gate_residual_norm, layer_norm_modulate
from .rope import rms_norm_rope

FUSED = Ops(
    name="triton",
    rms_norm_rope=rms_norm_rope,
    layer_norm_modulate=layer_norm_modulate,
    gate_residual=gate_residual,
    gate_residual_norm=gate_residual_norm,
)
