"""What was predicted before a measurement; docs/performance.md sets the results beside it."""

from __future__ import annotations

# The reference on one H200, an earlier run on other cards (median ms): ours should come near it.
REFERENCE = {
    "plain, flash": 5891,
    "plain, cuDNN": 4856,
    "tuned, flash": 5141,
    "tuned, cuDNN": 4132,
}
# ms a forward at 33,600 tokens, written down before the run of each; by the run's JSON. In the first one
# "fused" was with cuDNN, in the second it is with flash-attn 3.
PREDICTED = {
    "candidates": {
        "eager, kept K/V": ("cuDNN attention, no waste, separate passes", 3500),
        "fused": ("+ fused elementwise, joined q k v, GELU epilogue", 2700),
        "fused, absorbed": ("+ absorbed audio projections", 2560),
        "fused, graph": ("fused as one CUDA graph: gaps are 8 ms by the profile", 3205),
        "compiled": ("torch.compile's own fusions, GELU as a pass of its own", 3280),
        "fused, cross kernel": ("one read of q, padding as one key, no addition: 0.8 ms a block", 3180),
        "fused, cuDNN plans": ("a better plan for self-attention, at 545 TFLOP/s", 3150),
        "fused, flash-attn 3": ("its kernel at 560 TFLOP/s inside a forward", 3085),
        "fused, absorbed, cross kernel": ("both", 3005),
        "fused, absorbed, cross kernel, flash-attn 3": ("all, with flash-attn 3", 2880),
        "fast, fp8 linears": ("linears at 1,250 TFLOP/s, their inputs rounded by norms and GELU", 2600),
        "fast, fp8 linears, int8 attention": ("+ self-attention in 0.75 of its time", 2160),
        "fast, fp8 linears, int8 and fp8 attention": ("+ in half of its time", 1720),
    },
    "forward": {
        "fused": ("flash-attn 3 for every attention, short keys as fast as cuDNN's", 2960),
        "fused, absorbed": ("+ absorbed audio projections", 2795),
        "fused, two speakers": ("the map and a second voice: 88 ms more", 3050),
        "fused, cross kernel": ("16 ms less, as with cuDNN", 2945),
        "fused, absorbed, cross kernel": ("both", 2785),
        "fast, fp8 linears": ("the linears' 670 ms less", 2295),
        "fast, fp8 linears, fp8 attention": ("self-attention at 950 TFLOP/s, 50 ms for rounding", 1830),
        "fast, fp8 linears, fp8 attention, absorbed": (
            "125 ms of linears and attention for 65 of products",
            1860,
        ),
    },
}
# The forward's variants as the candidates' run names them, where the names differ. There flash-attn 3 did
# self-attention alone.
TWINS = {
    "fused": "fused, flash-attn 3",
    "fused, cuDNN": "fused",
    "fused, absorbed, cross kernel": "fused, absorbed, cross kernel, flash-attn 3",
}
# Of the other parts: (what, value), likewise before the first run.
OTHERS = {
    "hybrid": ("step on 2 GPUs, whole passes first: × one GPU", 1.96),
    "Ulysses": ("step on 2 GPUs, every pass by both: × one GPU", 1.93),
    "outside": ("time outside DiT and VAE of a warm 8-step job", 0.025),
    "share_of_disk": ("cold load, of the disk's own rate", 0.9),
}
