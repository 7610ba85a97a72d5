"""VAE encode and decode of one clip on a GPU: time, peak memory, and how far each way is from fp32.

python benchmarks/wan_vae.py --height 480 --width 832 --frames 81
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from wan.modules.vae import VideoVAE, WanVAE


def seeded_vae(device: str) -> WanVAE:
    torch.manual_seed(0)
    with torch.device(device):
        model = VideoVAE()
    for name, p in model.named_parameters():
        scale = 0.05 if name.endswith("bias") else p[0].numel() ** -0.5 if p.ndim > 1 else 0.0
        p.data = torch.randn_like(p) * scale + (1.0 if name.endswith("gamma") else 0.0)
    return WanVAE(model=model, device=device)


def timed(run) -> tuple[float, float, torch.Tensor]:
    run()  # plans and compilations
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    base, begin = torch.cuda.memory_allocated(), time.perf_counter()
    out = run()
    torch.cuda.synchronize()
    return time.perf_counter() - begin, (torch.cuda.max_memory_allocated() - base) / 2**30, out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 4])
    options = parser.parse_args()
    vae = seeded_vae("cuda")
    shape = (3, options.frames, options.height, options.width)
    video = torch.randn(shape, device="cuda").clamp_(-1, 1)
    latents = vae.encode([video])[0]
    reference = vae.decode([latents])[0]
    from wan.kernels import rms_norm_silu
    from wan.modules.vae_layers import norm_silu_eager

    ways = [(False, "eager"), (True, "eager"), (True, "triton")]
    for channels_last, norm in ways:
        fused = rms_norm_silu if norm == "triton" else norm_silu_eager
        vae.model.use(channels_last=channels_last, norm_silu=fused)
        for chunk in options.chunks:
            for what, dtype, run in (
                ("encode", "float32", lambda c=chunk: vae.encode([video], c)[0]),
                ("decode", "float32", lambda c=chunk: vae.decode([latents], c)[0]),
                ("decode", "bfloat16", lambda c=chunk: vae.decode([latents], c, torch.bfloat16)[0]),
            ):
                try:
                    seconds, gib, out = timed(run)
                except Exception as error:  # noqa: BLE001  (the other ways are still worth measuring)
                    print(json.dumps({"what": what, "dtype": dtype, "error": str(error)[:200]}), flush=True)
                    continue
                wanted = latents if what == "encode" else reference
                row = {"what": what, "dtype": dtype, "channels_last": channels_last, "norm_silu": norm}
                row |= {"chunk": chunk, "ms": round(seconds * 1e3), "extra_gib": round(gib, 2)}
                row["rel_l2"] = float((out - wanted).norm() / wanted.norm())
                print(json.dumps(row), flush=True)
                del out
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
