"""A warm job of 8 steps through `multitalk_runtime.Generator`: what it spends outside the DiT and the VAE.

    python benchmarks/gpu/job.py --out job.json
    python benchmarks/gpu/job.py --tiny --device cpu --out job.json

All networks in their real sizes with random weights (no file is read): DiT, umT5-xxl, CLIP, VAE, wav2vec2;
81 frames of 640×640 from an image and 3.3 s of sound, to an mp4. The first job warms up, the next are
measured. DiT and VAE time is between device events around their calls, so nothing waits for the clock.
Without ffmpeg on the PATH (or the imageio-ffmpeg package) frames are counted and thrown away, and the
result says so.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from setting import REAL, TINY, build  # noqa: E402
from sheet import Sheet, device_of, parser, say  # noqa: E402
from torch import nn  # noqa: E402
from watch import Watch  # noqa: E402

from multitalk_runtime import generator as runtime_generator  # noqa: E402
from multitalk_runtime import tiny as tiny_models  # noqa: E402
from multitalk_runtime.generator import Generator  # noqa: E402
from multitalk_runtime.request import Request  # noqa: E402
from wan.configs import WAN_CONFIGS  # noqa: E402
from wan.fuse import join_qkv  # noqa: E402
from wan.modules.clip import CLIPModel, feature_tower  # noqa: E402
from wan.modules.t5 import T5EncoderModel, umt5_xxl  # noqa: E402
from wan.modules.vae import VideoVAE, WanVAE  # noqa: E402
from wan.modules.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model  # noqa: E402
from wan.multitalk import MultiTalkPipeline  # noqa: E402
from wan.parts import Parts  # noqa: E402

AIM = 0.03
SIDE, TINY_SIDE = 640, 64


def random_module(factory: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A network with random weights that keep activations near one, made where it runs."""
    with torch.device("meta"):
        module = factory()
    module = module.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    generator = torch.Generator(device).manual_seed(0)
    for name, t in module.state_dict().items():
        if not t.is_floating_point():
            t.zero_()
        elif t.ndim < 2 or name.endswith("gamma") or "original0" in name:
            t.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            t.normal_(0, max(1, t[0].numel()) ** -0.5, generator=generator)
    return module


def make_generator(device: torch.device, folder: Path, *, tiny: bool) -> Generator:
    """Everything that `Generator.load` would read, made here; `fused` kernels where there is a GPU."""
    config = WAN_CONFIGS["multitalk-14B"]
    cuda = device.type == "cuda"
    dtype = config.param_dtype if cuda else torch.float32
    small = TINY | {"text_len": config.text_len, "text_dim": tiny_models.T5["dim"]}
    config = replace(config, param_dtype_name=str(dtype).removeprefix("torch."))
    model = build(small if tiny else REAL, device, dtype)
    t5 = tiny_models.T5 if tiny else {}
    tokenizer = folder / "tokenizer"
    tiny_models._write_tokenizer(tokenizer, ("<pad>", "</s>", "<unk>"), start="")
    text = random_module(lambda: umt5_xxl(encoder_only=True, **t5), device, dtype)
    image = random_module(lambda: feature_tower(**(tiny_models.CLIP if tiny else {})), device, dtype)
    vae = random_module(lambda: VideoVAE(**(tiny_models.VAE if tiny else {})), device, torch.float32)
    parts = Parts(
        model=model,
        vae=WanVAE(model=vae, device=device),
        text_encoder=T5EncoderModel(config.text_len, dtype, device, tokenizer_path=tokenizer, model=text),
        image_encoder=CLIPModel(dtype, device, model=image),
    )
    if cuda:
        from wan.kernels import FUSED, rms_norm_silu

        model.use(ops=FUSED)
        join_qkv(model)
        parts.vae.model.use(norm_silu=rms_norm_silu, channels_last=True)
    names = {} if not tiny else {"buckets": {"multitalk-480": {"1.00": (TINY_SIDE, TINY_SIDE)}}}
    pipeline = MultiTalkPipeline.from_parts(config, parts, device, **names)
    wav = Wav2Vec2Config.from_dict(tiny_models.WAV2VEC | ({} if tiny else REAL_WAV2VEC))
    speech = random_module(lambda: Wav2Vec2Model(wav), device, torch.float32)
    return Generator(pipeline=pipeline, speech_model=speech, device=device)


REAL_WAV2VEC = {
    "intermediate_size": 3072,
    "conv_dim": [512] * 7,
    "num_conv_pos_embeddings": 128,
}


class Stopwatch:
    """Adds up the time between the begin and the end of calls, on the device's own clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: dict[str, list[tuple[Any, Any]]] = {}

    def around(self, owner: Any, method: str, name: str) -> None:
        """Wrap owner.method; its calls count as `name`."""
        inner = getattr(owner, method)

        @wraps(inner)
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = self.mark()
            try:
                return inner(*args, **kwargs)
            finally:
                self.marks.setdefault(name, []).append((begin, self.mark()))

        setattr(owner, method, call)

    def around_pieces(self, owner: Any, method: str, name: str) -> None:
        """The same for a method that yields: what its caller does in between doesn't count."""
        inner = getattr(owner, method)

        @wraps(inner)
        def call(*args: Any, **kwargs: Any) -> Iterator[Any]:
            pieces = inner(*args, **kwargs)
            while True:
                begin = self.mark()
                piece = next(pieces, None)
                self.marks.setdefault(name, []).append((begin, self.mark()))
                if piece is None:
                    return
                yield piece

        setattr(owner, method, call)

    def mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Seconds by name since the last reading."""
        out = {}
        for name, pairs in self.marks.items():
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
                out[name] = sum(a.elapsed_time(b) for a, b in pairs) / 1e3
            else:
                out[name] = sum(b - a for a, b in pairs)
        self.marks.clear()
        return out


class NoVideo:
    """Stands for VideoWriter where there is no ffmpeg: takes the frames and keeps nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.frames, self.size, self.sha256 = 0, None, ""

    def write(self, frames: torch.Tensor) -> None:
        self.frames, self.size = self.frames + frames.shape[1], tuple(frames.shape[2:])

    def __enter__(self) -> NoVideo:
        return self

    def __exit__(self, *_: Any) -> None:
        return


@contextmanager
def encoder(folder: Path) -> Iterator[str]:
    """ffmpeg on the PATH: the machine's, imageio-ffmpeg's, or none (then frames are thrown away)."""
    before = os.environ["PATH"]
    if shutil.which("ffmpeg") is None:
        try:
            from imageio_ffmpeg import get_ffmpeg_exe

            (folder / "bin").mkdir()
            (folder / "bin/ffmpeg").symlink_to(get_ffmpeg_exe())
            os.environ["PATH"] = f"{folder / 'bin'}{os.pathsep}{before}"
        except Exception as error:  # noqa: BLE001  (measured without it, and said so)
            runtime_generator.VideoWriter = NoVideo  # type: ignore[misc,assignment]
            yield f"frames thrown away: no ffmpeg ({type(error).__name__})"
            return
    try:
        yield "mp4"
    finally:
        os.environ["PATH"] = before


def request(folder: Path, *, tiny: bool, steps: int) -> Request:
    side = TINY_SIDE if tiny else SIDE
    seconds = 0.7 if tiny else 3.4
    rng = np.random.default_rng(0)
    picture = folder / "image.png"
    Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(picture)
    sound = (0.1 * rng.standard_normal(int(16_000 * seconds))).astype(np.float32)
    return Request(
        prompt="A person is talking to the camera in a recording studio, close up.",
        image=picture,
        tracks=(sound,),
        output=folder / "video.mp4",
        frame_num=13 if tiny else 81,
        sample_steps=steps,
        normalise=False,
        seed=1,
        color_correction_strength=0.0,
    )


def measure(sheet: Sheet, device: torch.device, folder: Path, *, tiny: bool, steps: int, jobs: int) -> None:
    begin = time.perf_counter()
    generator = make_generator(device, folder, tiny=tiny)
    parts, clock = generator.pipeline.parts, Stopwatch(device)
    for method in ("predict", "embed_text", "embed_audio", "embed_time"):
        clock.around(parts.model, method, "dit")
    clock.around(parts.vae, "encode", "vae encode")
    clock.around_pieces(parts.vae, "decode_pieces", "vae decode")
    sheet["made_s"] = round(time.perf_counter() - begin, 1)
    rows: list[dict[str, Any]] = []
    sheet["rows"] = rows
    with encoder(folder) as video:
        sheet["video"] = video
        for number in range(jobs + 1):
            wanted = request(folder, tiny=tiny, steps=1 if number == 0 else steps)
            started = time.perf_counter()
            with Watch(device) as watch:
                result = generator.run(wanted)
            total, spent = time.perf_counter() - started, clock.read()
            outside = total - sum(spent.values())
            row = {
                "job": "warm-up" if number == 0 else number,
                "steps": wanted.steps,
                "s": round(total, 3),
                **{f"{name} s": round(s, 3) for name, s in spent.items()},
                "outside_s": round(outside, 3),
                "outside": round(outside / total, 4),
                "phases": {k: round(v, 3) for k, v in result.phases.items()},
                "frames": result.frames,
                "size": [result.height, result.width],
                "peak_gib": round(result.peak_bytes / 2**30, 2),
                **watch.summary(),
            }
            rows.append(row)
            sheet.save()
            say(str(row))
            if sheet.left < 1.2 * total * (steps if number == 0 else 1):
                break


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=8)
    options.add_argument("--jobs", type=int, default=2, help="measured jobs after the warm-up (default 2)")
    args = options.parse_args()
    device = device_of(args, options)
    torch.backends.cudnn.allow_tf32 = True  # PyTorch's default, with which a job runs, as the reference does
    sheet = Sheet(args.out, "job.py", device, args.budget_s)
    with tempfile.TemporaryDirectory(prefix="mt-job-") as name:
        measure(sheet, device, Path(name), tiny=args.tiny, steps=args.steps, jobs=args.jobs)
    for row in sheet["rows"]:
        print(row)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
