"""Videos made by the image's own runtime from a tiny model, and what must be true of them.

A job goes through the handler, on the CPU or the GPU; its video is looked at from outside (ffprobe) and
inside (its raw frames).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

FPS = 25
PROMPT = "A person is talking to the camera."


class Wrong(Exception):  # noqa: N818 - what is wrong is the image
    """Something that must be true of the videos is not; `diagnosis` says what that means."""

    def __init__(self, message: str, diagnosis: str) -> None:
        super().__init__(message)
        self.diagnosis = diagnosis


@dataclass(frozen=True)
class Size:
    """How much work: frames and steps of the job, and of the runs that are compared."""

    job_frames: int
    job_steps: int
    frames: int
    steps: int


class Studio:
    """A worker with a tiny model on one device, and the frames of whatever it makes."""

    def __init__(self, folder: Path, device: str, weights: Path | None = None) -> None:
        self.folder, self.device, self.weights = folder, device, weights
        self.models = weights or folder / "models"
        self.seconds: dict = {}
        self.frames = None

    def prepare(self) -> None:
        """Write the model (where no weights are given), verify it, and start the handler's worker on it."""
        with self.timed("import_s"):
            import torch

            import wan.multitalk  # noqa: F401 - the time it takes is the handler's too
            from multitalk_runtime import core, generator
            from multitalk_runtime.defaults import AUDIO, IMAGE
            from multitalk_runtime.settings import Settings
            from multitalk_runtime.tiny import write_tiny
        self.image, self.audio = IMAGE, AUDIO
        if self.weights is None:
            # Of a tiny model's tensors there is so little to share that threads wait longer than they work:
            # on a busy machine two take eight times as long as one.
            torch.set_num_threads(1)
            with self.timed("tiny_s"):
                write_tiny(self.models)
        with self.timed("verify_s"):
            self._verify()
        settings = Settings.from_environment({"MODEL_PATH": str(self.models), "MT_DEVICE": self.device})
        with self.timed("load_s"):
            self.worker = core.start_worker(settings)
        self.generator = self.worker.generator
        if self.generator.device.type != self.device:
            msg = f"the models are on {self.generator.device}, not on {self.device}"
            raise Wrong(
                msg,
                "MT_DEVICE is not followed",
            )
        self._watch(generator)

    def job(self, size: Size):
        """Through the handler, with the built-in inputs: (the video's file, what the reply says of it)."""
        from multitalk_runtime.handler import make_handler

        self.reports = reports = []
        handle = make_handler(self.worker, report=lambda job, state: reports.append(state))
        job = {"prompt": PROMPT, "frame_num": size.job_frames, "sample_steps": size.job_steps, "seed": 7}
        with self.timed("job_s"):
            reply = asyncio.run(handle({"id": "suite", "input": job}))
        if reply["status"] != "completed":
            error = json.loads(reply["error"])
            msg = f"the handler's job with default inputs fails: {error['code']}: {error['message']}"
            raise Wrong(
                msg,
                "the image can't do the one thing that it is for",
            )
        if not reports:
            msg = "the job reported no progress"
            raise Wrong(msg, "callers can't see how far a job is")
        video = self.folder / "job.mp4"
        video.write_bytes(base64.b64decode(reply["video_base64"]))
        self.told = reply["result"]
        return video, self.told

    def run(self, *, attention: str | None = None, ops: object = None, **changes: object):
        """One short run: its raw frames [3, F, H, W] on the CPU, in [-1, 1]."""
        from multitalk_runtime.request import Request

        model, old = self.generator.pipeline.model, self.generator.pipeline.model.runtime
        given = getattr(self.generator, "given", {})
        if attention is not None:
            from wan.attention_backends import AttentionBackend

            model.use(attention=AttentionBackend(name=attention))
            self.generator.given = {**given, "attention": attention}
        if ops is not None:
            model.use(ops=ops)
        values = {
            "prompt": PROMPT,
            "image": self.image,
            "tracks": (self.audio,),
            "output": self.folder / "run.mp4",
            "text_guide_scale": 1.0,
            "seed": 7,
            **changes,
        }
        try:
            self.result = self.generator.run(Request(**values))
        finally:
            model.runtime, self.generator.given = old, given
        return self.frames

    def _watch(self, module) -> None:
        """Keep the raw frames of a run: the encoder's input, before it becomes a file."""
        studio = self

        class Watched(module.VideoWriter):
            def __init__(self, *words: object, **named: object) -> None:
                super().__init__(*words, **named)
                studio.frames = None

            def write(self, frames) -> None:
                import torch

                new = frames.detach().float().cpu().clone()
                studio.frames = new if studio.frames is None else torch.cat([studio.frames, new], dim=1)
                super().write(frames)

        module.VideoWriter = Watched

    def _verify(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "multitalk_runtime.models", "verify", str(self.models)],
            capture_output=True,
            text=True,
            timeout=200,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode != 0:
            if self.weights is not None:
                msg = f"mtmodels verify refuses the weights: {(done.stdout + done.stderr).strip()[-1500:]}"
                raise Wrong(msg, "files are missing, cut short or of another model")
            msg = f"mtmodels verify refuses the tiny model: {(done.stdout + done.stderr).strip()[-300:]}"
            raise Wrong(
                msg,
                "what writes the models and what verifies them disagree in this image",
            )

    @contextlib.contextmanager
    def timed(self, name: str):
        """The seconds that the block takes, under `name`."""
        begin = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - begin, 3)


# --- one video --------------------------------------------------------------------------------------------


def look_at_frames(frames, count: int) -> dict:
    """Finite, as many as asked for, neither one colour nor a still: else Wrong. Measurements of them."""
    if not bool(frames.isfinite().all()):
        msg = "the frames are not finite"
        raise Wrong(msg, "NaN or infinity in the networks: see the kernels' checks")
    if frames.shape[1] != count:
        msg = f"{frames.shape[1]} frames instead of {count}"
        raise Wrong(msg, "frames are lost or made twice")
    contrast = frames.flatten(2).std(dim=2).mean().item()
    if contrast < 0.01:
        msg = f"the frames are of one colour (deviation {contrast:.2g})"
        raise Wrong(msg, "black or grey video")
    motion = (frames[:, 1:] - frames[:, :-1]).abs().mean(dim=(0, 2, 3))
    if motion.max().item() < 1e-3:
        msg = "the frames don't change over time"
        raise Wrong(msg, "a still picture instead of a video")
    return {"contrast": round(contrast, 4), "motion": round(motion.mean().item(), 5)}


def look_at_file(video: Path, result: dict, count: int) -> dict:
    """The video by ffprobe and by decoding: duration, size, rate, sound. What was seen, or Wrong."""
    asked = [
        "-show_entries",
        "stream=codec_type,codec_name,width,height,avg_frame_rate,nb_read_frames,duration",
    ]
    command = ["ffprobe", "-v", "error", "-count_frames", *asked, "-of", "json", str(video)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        msg = f"ffprobe can't read the video: {done.stderr.strip()[-300:]}"
        raise Wrong(msg, "the encoder is broken")
    streams = {stream["codec_type"]: stream for stream in json.loads(done.stdout)["streams"]}
    if set(streams) != {"video", "audio"}:
        msg = f"the video has the streams {', '.join(sorted(streams))}"
        raise Wrong(msg, "a video without sound")
    picture, sound, seconds = streams["video"], streams["audio"], count / FPS
    seen = {
        "size": [picture["width"], picture["height"]],
        "fps": picture["avg_frame_rate"],
        "frames": int(picture["nb_read_frames"]),
        "seconds": float(picture["duration"]),
        "audio_seconds": float(sound["duration"]),
        "codecs": [picture["codec_name"], sound["codec_name"]],
    }
    wanted = {"size": [result["width"], result["height"]], "fps": f"{FPS}/1", "frames": count}
    for name, value in wanted.items():
        if seen[name] != value:
            msg = f"the video's {name} is {seen[name]}, not {value}"
            raise Wrong(msg, "frames and file disagree")
    for name in ("seconds", "audio_seconds"):
        if abs(seen[name] - seconds) > 0.1:
            msg = f"{name} of the video: {seen[name]:.2f}, not {seconds:.2f}"
            raise Wrong(msg, "sound and picture disagree")
    raw = [
        "ffmpeg",
        "-nostdin",
        "-v",
        "error",
        "-i",
        str(video),
        "-map",
        "0:a",
        "-ac",
        "1",
        "-f",
        "s16le",
        "-",
    ]
    done = subprocess.run(raw, capture_output=True, timeout=100, stdin=subprocess.DEVNULL)
    samples = memoryview(done.stdout[: len(done.stdout) // 2 * 2]).cast("h")
    loudest = max((abs(sample) for sample in samples), default=0)
    if done.returncode != 0 or loudest < 300:
        msg = f"the video's sound is silent (peak {loudest} of 32767)"
        raise Wrong(msg, "the track does not reach the file")
    return {**seen, "audio_peak": loudest}


def contact_sheet(frames, target: Path, *, columns: int = 6, most: int = 12) -> None:
    """Up to `most` frames [3, F, H, W] spread over the video, row by row, as one PNG."""
    from PIL import Image

    count = frames.shape[1]
    chosen = sorted({round(i * (count - 1) / max(1, most - 1)) for i in range(most)})
    pixels = ((frames.clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 3, 0).contiguous().numpy()
    height, width = pixels.shape[1:3]
    scale = max(1, 160 // width)
    rows = math.ceil(len(chosen) / columns)
    sheet = Image.new("RGB", (columns * width * scale, rows * height * scale))
    for place, index in enumerate(chosen):
        tile = Image.fromarray(pixels[index]).resize(
            (width * scale, height * scale), Image.Resampling.NEAREST
        )
        sheet.paste(tile, (place % columns * width * scale, place // columns * height * scale))
    sheet.save(target)


def keep(ctx, name: str, video: Path, frames) -> None:
    """The video and its contact sheet, for the host to keep with the report."""
    (ctx.out / f"{name}.mp4").write_bytes(video.read_bytes())
    contact_sheet(frames, ctx.out / f"{name}.png")
