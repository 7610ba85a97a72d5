"""xFormers' attention runs on the GPU, by the operator it chooses itself, with the reference's numbers."""

from __future__ import annotations

from importlib.util import find_spec

from result import CheckResult, Context, failed, passed, skipped

ID = "xformers.attention"
TIERS = ("gpu",)
LIMIT_S = 240

_SHAPES = (
    (1, 1536, 4, 128),
    (2, 257, 3, 64),
)  # batch, tokens, heads, width: the DiT's head width, and an odd length


def run(ctx: Context) -> CheckResult:
    """memory_efficient_attention against fp32 softmax attention, plain and with a block-diagonal mask."""
    if find_spec("xformers") is None:
        if ctx.cell is not None and ctx.cell["xformers"] is not None:
            return failed(
                f"the cell has xformers {ctx.cell['xformers']}, the image has none",
                diagnosis="the image was not built from the cell's lock",
                fix="build it from the lock",
            )
        return skipped("the image has no xformers")
    import torch

    try:
        from xformers.ops import fmha, memory_efficient_attention

        generator = torch.Generator(device="cuda").manual_seed(3)
        worst, used = 0.0, set()
        for shape in _SHAPES:
            query, key, value = (
                torch.randn(shape, device="cuda", generator=generator).bfloat16() for _ in range(3)
            )
            used.add(fmha._dispatch_fw(fmha.Inputs(query=query, key=key, value=value), False).NAME)
            got = memory_efficient_attention(query, key, value)
            worst = max(worst, _error(got, _reference(query, key, value)))
        lengths = [700, 836]
        query, key, value = (
            torch.randn(1, sum(lengths), 4, 128, device="cuda", generator=generator).bfloat16()
            for _ in range(3)
        )
        mask = fmha.attn_bias.BlockDiagonalMask.from_seqlens(lengths)
        got = memory_efficient_attention(query, key, value, attn_bias=mask)
        parts = zip(*(tensor.split(lengths, dim=1) for tensor in (query, key, value)))  # noqa: B905
        worst = max(worst, _error(got, torch.cat([_reference(*part) for part in parts], dim=1)))
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return failed(
            f"attention does not run: {text.splitlines()[0]}"[:500],
            detail=text[-3000:],
            diagnosis="xFormers has no operator for this GPU and type, or its native code "
            "did not load (see xformers.extension)",
            fix="take the xformers built for this torch, and a GPU that its wheel has code for",
        )
    if worst > 2**-6:
        return failed(
            f"attention is off by {worst:.3g} of the largest value; {2**-6:.3g} is allowed",
            diagnosis="the operator computes wrongly on this GPU",
            fix="try another operator (sdpa) and report it to xformers",
        )
    return passed(
        f"{', '.join(sorted(used))} agrees with fp32 attention within {worst:.2g}",
        xformers_attention__operators=sorted(used),
        xformers_attention__error=worst,
    )


def _reference(query, key, value):
    """softmax(q·kᵀ/√d)·v in fp32; tensors [batch, tokens, heads, width]."""
    query, key, value = (tensor.float().transpose(1, 2) for tensor in (query, key, value))
    weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
    return (weights @ value).transpose(1, 2)


def _error(got, want) -> float:
    error = ((got.float() - want).abs().max() / want.abs().max()).item()
    return error if error == error else float("inf")
