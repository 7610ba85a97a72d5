"""A job's inputs arrive: built in, by URL, S3, base64 and volume; what is wrong is refused by its code (V71).

No model and no GPU: the jobs go through the very core of the handler, with a stand-in where the generator
would be, which looks at what arrived and decodes it. The servers run on loopback inside the container.
"""

from __future__ import annotations

import base64
import hashlib
import io
import logging
import os
import shutil
import struct
import time
import urllib.request
import wave
from importlib.util import find_spec
from pathlib import Path

from loopback import KEY_ID, serving
from packages import not_installed
from result import CheckResult, Context, failed, passed, skipped, unsaid

ID = "handler.inputs"
TIERS = ("cpu", "gpu")
LIMIT_S = 180

_BUCKET, _SECRET = "suite-bucket", "suite-secret-that-no-reply-may-hold"
_VIDEO = b"what a generator would have made" * 4096


class Refused(Exception):  # noqa: N818 - not an error of this program
    """A job did not end as it should."""


class Looks:
    """In the generator's place: decodes what arrived, by the generator's own functions."""

    device = None

    def __init__(self) -> None:
        self.image = self.tracks = None

    def run(self, request, *, progress=None, cancelled=None):
        """Keep what arrived, and return a file."""
        from multitalk_runtime.generator import read_image, read_tracks

        self.image = (_hash(request.image), read_image(request.image).size)
        self.tracks = (
            tuple(_hash(track) if track is not None else None for track in request.tracks),
            tuple(len(track) for track in read_tracks(request).tracks),
        )
        request.output.write_bytes(_VIDEO)
        self.video, self.frames = request.output, 1
        return self

    def to_json(self) -> dict:
        return {"frames": self.frames}


def run(ctx: Context) -> CheckResult:
    """Good jobs of every kind, bad ones each with its code, and a good one again."""
    if find_spec("multitalk_runtime") is None:
        if not ctx.request["runtime"]:
            return skipped("the image is not meant to hold the runtime")
        return not_installed("multitalk_runtime")
    log = io.StringIO()
    logging.basicConfig(stream=log, level=logging.INFO, force=True)
    os.environ |= {"BUCKET_ACCESS_KEY_ID": KEY_ID, "BUCKET_SECRET_ACCESS_KEY": _SECRET}
    folder, doing = ctx.fresh("inputs"), "the handler's modules"
    started = time.monotonic()
    try:
        with serving() as server:
            bench = Bench(folder, server, log)
            seconds = {}
            for doing, job in bench.good().items():
                begin = time.monotonic()
                bench.expect_done(job)
                seconds[doing.split()[0]] = round(time.monotonic() - begin, 3)
            cases = bench.bad()
            for doing, (code, job) in cases.items():  # noqa: B007 - what failed, for the message
                bench.expect_refused(code, job)
            doing = "default inputs, after all those that were refused"
            bench.expect_done({})
            doing = "s3"
            if not server.signed:
                msg = "no signed request came to the storage"
                raise Refused(msg)
    except Exception as error:
        said = f"{doing}: {type(error).__name__}: {error}".replace("Refused: ", "")
        return failed(
            unsaid(said, log.getvalue())[:500],
            detail=log.getvalue()[-5000:],
            diagnosis="the handler does not take its inputs as it should in this image: a job of this kind "
            "fails, or a bad one gets through (V71)",
            fix="see the log under `detail`; run tests/runtime/test_inputs.py in the tree that the wheel was "
            "built from",
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return passed(
        f"{len(seconds)} kinds of input arrive, {len(cases)} bad ones are refused by their codes",
        handler_inputs__seconds=seconds,
        handler_inputs__refused=sorted({code for code, _ in cases.values()}),
        handler_inputs__total_s=round(time.monotonic() - started, 3),
    )


class Bench:
    """A worker with everything that it may use on this machine, and the jobs for it."""

    def __init__(self, folder: Path, server, log: io.StringIO) -> None:
        from multitalk_runtime.core import Worker
        from multitalk_runtime.defaults import AUDIO, IMAGE
        from multitalk_runtime.settings import Settings
        from multitalk_runtime.storage import Storage

        self.server, self.log = server, log
        self.jobs, self.volume = folder / "jobs", folder / "volume"
        self.jobs.mkdir()
        self.volume.mkdir()
        settings = Settings.from_environment(
            {
                "MT_ALLOW_ADDRESSES": "127.0.0.0/8",
                "MT_VOLUMES": str(self.volume),
                "BUCKET_ENDPOINT_URL": server.url,
                "AWS_S3_BUCKET_NAME": _BUCKET,
                "MT_S3_BUCKETS": f"{_BUCKET}/in,{_BUCKET}/results",
                "MT_FETCH_S": "10",
                "MT_MAX_IMAGE_BYTES": "1000000",
                "MT_MAX_PIXELS": "4000000",
                "MT_MAX_AUDIO_S": "30",
            }
        )
        self.looks = Looks()
        self.worker = Worker(
            settings=settings, generator=self.looks, storage=Storage(settings), folder=self.jobs
        )
        self.image, self.audio = IMAGE.read_bytes(), AUDIO.read_bytes()
        server.pages |= {"/face": self.image, "/speech": self.audio, "/moved": ("redirect", "/face")}
        server.pages |= {
            "/inside": ("redirect", "http://10.0.0.1/face"),
            "/loop": ("redirect", "/loop"),
            "/short": ("short", self.image[:500]),
        }
        server.objects |= {f"{_BUCKET}/in/face": self.image, f"{_BUCKET}/in/speech": self.audio}
        (self.volume / "face").write_bytes(self.image)
        (self.volume / "speech").write_bytes(self.audio)
        (self.volume / "link").symlink_to("/etc/passwd")

    def good(self) -> dict:
        """What it is → the job. Every one has the built-in files, so that what arrives is known."""
        text = base64.b64encode(self.audio).decode()
        data = "data:image/png;base64," + base64.b64encode(self.image).decode()
        url, s3 = self.server.url, f"s3://{_BUCKET}/in"
        return {
            "default inputs": {},
            "url inputs": {"image": f"{url}/moved", "audio": {"person1": {"url": f"{url}/speech"}}},
            "s3 inputs and output": {
                "image": f"{s3}/face",
                "audio": {"person1": {"s3": {"key": "in/speech"}}},
                "output": {"format": "s3"},
            },
            "base64 inputs": {"image": data, "audio": {"person1": {"base64": text}}},
            "volume inputs": {"image": str(self.volume / "face"), "audio": "speech"},
            "v7x inputs": {
                "image_s3_key": "in/face",
                "audio_1": text,
                "sampling_steps": 4,
                "output_format": "base64",
            },
            "two speakers": {"audio": {"person1": "speech", "person2": f"{url}/speech"}},
        }

    def bad(self) -> dict:
        """What is wrong → (its code, the job)."""
        url, long_name = self.server.url, "a" * 5000
        image, audio = "image", "audio"
        return {
            "a job that is a list": ("job.invalid", []),
            "an unknown key": ("job.unknown_key", {"imgae": "face"}),
            "80 frames": ("job.frame_num", {"frame_num": 80}),
            "a prompt without end": ("job.prompt_too_long", {"prompt": long_name}),
            "two sources of one image": ("job.invalid", {image: {"url": f"{url}/face", "path": "face"}}),
            "an ftp URL": ("forbidden.scheme", {image: "ftp://127.0.0.1/face"}),
            "a file URL": ("forbidden.scheme", {image: "file:///etc/passwd"}),
            "a private address": ("forbidden.address", {image: "http://10.0.0.1/face"}),
            "the cloud's own address": ("forbidden.address", {image: "http://169.254.169.254/latest"}),
            "a redirect to a private address": ("forbidden.address", {image: f"{url}/inside"}),
            "a redirect without end": ("fetch.redirects", {image: f"{url}/loop"}),
            "a URL that leads nowhere": ("fetch.status", {image: f"{url}/none"}),
            "a download that breaks off": ("fetch.truncated", {image: f"{url}/short"}),
            "base64 that is none": ("fetch.base64", {image: {"base64": "!!!!"}}),
            "a path outside of the volume": ("forbidden.path", {image: {"path": "../../../etc/passwd"}}),
            "a link out of the volume": ("forbidden.path", {image: {"path": "link"}}),
            "a path to nothing": ("fetch.not_found", {image: {"path": "none"}}),
            "another bucket": ("forbidden.bucket", {image: "s3://other/in/face"}),
            "another prefix": ("forbidden.bucket", {image: f"s3://{_BUCKET}/secret"}),
            "a key that is not there": ("storage.not_found", {image: f"s3://{_BUCKET}/in/none"}),
            "an image that is text": ("image.not_image", {image: _base64(b"<html>" * 100)}),
            "half an image": ("image.broken", {image: _base64(self.image[: len(self.image) // 2])}),
            "an image of 10 gigapixels": ("too_large.pixels", {image: _base64(_png_head(100_000, 100_000))}),
            "an image of too many bytes": ("too_large.bytes", {image: _base64(bytes(2_000_000))}),
            "sound that is text": ("audio.not_audio", {audio: {"person1": _base64(b"no sound" * 100)}}),
            "sound of a tenth of a second": ("audio.too_short", {audio: {"person1": _base64(_wav(0.1))}}),
            "sound of a minute": ("too_large.seconds", {audio: {"person1": _base64(_wav(60))}}),
            "no speaker": ("persons.all_silent", {audio: {"person1": None, "person2": "None"}}),
            "a box for one speaker": ("persons.bbox", {"bbox": {"person1": [0, 0, 9, 9]}}),
            "a result in another bucket": (
                "forbidden.bucket",
                {"output": {"format": "s3", "bucket": "other"}},
            ),
        }

    def expect_done(self, job: dict) -> None:
        """Raises Refused unless the job is done and what arrived is what was sent."""
        reply = self._reply(job)
        if reply["status"] != "completed":
            error = reply["error"]
            where = f" ({error['field']})" if error["field"] else ""
            msg = f"{error['code']}{where}: {error['message']}"
            raise Refused(msg)
        image, (tracks, samples) = self.looks.image, self.looks.tracks
        if image[0] != hashlib.sha256(self.image).hexdigest() or min(image[1]) < 64:
            msg = "the image that arrived is not the one that was sent"
            raise Refused(msg)
        if set(tracks) != {hashlib.sha256(self.audio).hexdigest()} or min(samples) < 8000:
            msg = "the sound that arrived is not the one that was sent"
            raise Refused(msg)
        if "video_url" in reply:
            self._same_video(urllib.request.urlopen(reply["video_url"], timeout=20).read())
        else:
            self._same_video(base64.b64decode(reply["video_base64"]))

    def expect_refused(self, code: str, job: object) -> None:
        """Raises Refused unless the job ends with this code, four fields, and nothing of the worker's."""
        reply = self._reply(job)
        error = reply.get("error", {"code": "nothing: the job was done"})
        if error["code"] != code:
            msg = f"is answered with {error['code']} instead of {code}: {error.get('message', '')}"
            raise Refused(msg)
        if set(error) != {"code", "field", "message", "hint"} or not error["message"] or not error["hint"]:
            msg = f"{code} does not say field, message and hint: {error}"
            raise Refused(msg)
        for secret in (str(self.jobs), str(self.volume), _SECRET, "Traceback", "/etc/passwd"):
            if secret in str(reply):
                msg = f"the reply to {code} tells {secret!r}"
                raise Refused(msg)

    def _reply(self, job: object) -> dict:
        from multitalk_runtime.core import run_job

        self.looks.image = self.looks.tracks = None
        self.log.seek(0)
        self.log.truncate()  # what is kept is that of the job that failed
        reply = run_job(job, worker=self.worker, job_id="suite")
        left = sorted(str(path.relative_to(self.jobs)) for path in self.jobs.rglob("*"))
        if left:
            msg = f"the job left files behind: {', '.join(left)[:300]}"
            raise Refused(msg)
        return reply

    def _same_video(self, data: bytes) -> None:
        if data != _VIDEO:
            msg = f"the video that came back has {len(data)} bytes, not the {len(_VIDEO)} made"
            raise Refused(msg)


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _base64(data: bytes) -> dict:
    return {"base64": base64.b64encode(data).decode()}


def _wav(seconds: float) -> bytes:
    """A tone."""
    target = io.BytesIO()
    with wave.open(target, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(b"".join(struct.pack("<h", (i % 40) * 500) for i in range(int(seconds * 8000))))
    return target.getvalue()


def _png_head(width: int, height: int) -> bytes:
    """The beginning of a PNG that says this size."""
    import zlib

    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + bytes(99)
    )
