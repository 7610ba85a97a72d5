"""Everything that callers send by mistake or by malice: each has its code, and the worker lives on.

The worker is the real one, with the tiny model; a good job is done before, between and after.
"""

from __future__ import annotations

import json
import struct
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from runtime_helpers import QUICK, as_base64, image_bytes, png_header, wav_bytes

from multitalk_runtime.core import Worker, run_job
from multitalk_runtime.errors import CODES
from multitalk_runtime.settings import Settings
from multitalk_runtime.storage import Storage

if TYPE_CHECKING:
    from multitalk_runtime.generator import Generator

SECRET = "wJalr-TEST-SECRET"
WAV, LONG, PNG = as_base64(wav_bytes()), as_base64(wav_bytes(7.0)), as_base64(image_bytes())
GOOD = {**QUICK, "prompt": "A person talks.", "image": PNG, "audio": {"person1": WAV}}
TWO = {"person1": WAV, "person2": as_base64(wav_bytes(frequency=330))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("worker")
    (root / "jobs").mkdir()
    (root / "volume").mkdir()
    (root / "volume" / "notes.txt").write_text("not a picture")
    (root / "volume" / "out.png").symlink_to("/etc/hostname")
    (root / "volume" / "empty.png").touch()
    return root


@pytest.fixture(scope="module")
def worker(folder: Path, tiny_generator: Generator) -> Worker:
    settings = Settings(
        volumes=(folder / "volume",),
        s3_bucket="media",
        s3_allowed=("media/in",),
        s3_endpoint="http://127.0.0.1:9",  # nothing listens there
        max_image_bytes=200_000,
        max_audio_bytes=400_000,
        max_pixels=1_000_000,
        max_audio_s=5,
        max_result_bytes=1 << 20,
        fetch_s=2,
    )
    return Worker(
        settings=settings, generator=tiny_generator, storage=Storage(settings), folder=folder / "jobs"
    )


@dataclass(frozen=True, kw_only=True)
class Bad:
    """A job, and how it is refused."""

    name: str
    raw: Any
    code: str
    field: str | None = None


def bad(name: str, code: str, field: str | None = None, /, raw: Any = None, **keys: Any) -> Bad:
    return Bad(name=name, raw={**GOOD, **keys} if raw is None else raw, code=code, field=field)


def text_file(text: str) -> dict[str, str]:
    return as_base64(text.encode())


LYING_WAV = bytearray(wav_bytes(7.0))
LYING_WAV[40:44] = struct.pack("<I", 0xFFFFFFFF)

TABLE = [
    # not a job
    bad("a list", "job.invalid", "", raw=[1, 2]),
    bad("a text", "job.invalid", "", raw="talk"),
    bad("nothing", "job.invalid", "", raw=()),
    bad("another test", "job.invalid", "test", raw={"test": "self_destruct"}),
    bad("an unknown key", "job.unknown_key", "promt", promt="typo"),
    bad("a key that only looks harmless", "job.unknown_key", "__class__", __class__="x"),
    bad("an endpoint of the caller's", "job.unknown_key", "output.endpoint", output={"endpoint": "http://x"}),
    bad("a key that no reply can carry", "job.invalid", "", **{"\ud800\udfff": 1}),
    bad("a key without end", "job.unknown_key", "k" * 120, **{"k" * 10**6: 1}),
    # values
    bad("a prompt that is no text", "job.invalid", "prompt", prompt="\ud800"),
    bad("an empty prompt", "job.invalid", "prompt", prompt=""),
    bad("a prompt that is a number", "job.invalid", "prompt", prompt=5),
    bad("a prompt without end", "job.prompt_too_long", "prompt", prompt="a" * 4001),
    bad("frame_num not 4n+1", "job.frame_num", "frame_num", frame_num=80),
    bad("motion_frame not 4n+1", "job.frame_num", "motion_frame", motion_frame=24),
    bad("frame_num too large", "job.invalid", "frame_num", frame_num=100_001),
    bad("frame_num negative", "job.invalid", "frame_num", frame_num=-3),
    bad("frame_num a text", "job.invalid", "frame_num", frame_num="many"),
    bad("no steps", "job.invalid", "sample_steps", sample_steps=0),
    bad("too many steps", "job.invalid", "sample_steps", sample_steps=10**9),
    bad("a size the model has not", "job.invalid", "size", size="multitalk-1080"),
    bad("a mode that is none", "job.invalid", "mode", mode="live"),
    bad("nan", "job.invalid", "text_guide_scale", text_guide_scale=float("nan")),
    bad("infinity", "job.invalid", "apg_norm_threshold", apg_norm_threshold=float("inf")),
    bad("a seed too large", "job.invalid", "seed", seed=2**31),
    bad("motion as long as the clip", "job.conflict", "motion_frame", mode="streaming", motion_frame=5),
    bad("turbo by its new name", "job.quality", "quality", quality="turbo"),
    bad("turbo twice", "job.conflict", "turbo", turbo=True, quality="turbo"),
    bad("turbo that is no switch", "job.invalid", "turbo", turbo="very"),
    bad("a quality that is none", "job.invalid", "quality", quality="best"),
    bad("a quality this worker has not", "forbidden.option", "quality", quality="fast"),
    bad("old and new key", "job.conflict", "sampling_steps", sampling_steps=4),
    bad("two old keys", "job.conflict", "audio_1", raw={"audio_1": "a", "audio_file": "b"}),
    # sources
    bad("two sources at once", "job.invalid", "image", image={"path": "a", "url": "https://e.x"}),
    bad("no source", "job.invalid", "image", image={}),
    bad("a source that is a number", "job.invalid", "image", image=7),
    bad("a data URL that is not base64", "job.invalid", "image", image="data:image/png,abc"),
    bad("not base64", "fetch.base64", "image", image={"base64": "%%%"}),
    bad("an empty file", "fetch.truncated", "image", image={"base64": ""}),
    bad("an empty file on the volume", "fetch.truncated", "image", image="empty.png"),
    bad("file:", "forbidden.scheme", "image", image="file:///etc/passwd"),
    bad("ftp:", "forbidden.scheme", "image", image="ftp://example.com/a.png"),
    bad("gopher:", "forbidden.scheme", "audio.person1", audio="gopher://127.0.0.1:6379/_FLUSHALL"),
    bad("loopback", "forbidden.address", "image", image="http://127.0.0.1:8000/a.png"),
    bad("localhost", "forbidden.address", "image", image="http://localhost/a.png"),
    bad("the cloud's metadata", "forbidden.address", "image", image="http://169.254.169.254/latest/"),
    bad("a private network", "forbidden.address", "audio.person1", audio="https://10.0.0.8/a.wav"),
    bad("IPv6 loopback", "forbidden.address", "image", image="http://[::1]/"),
    bad("IPv4 in IPv6", "forbidden.address", "image", image="http://[::ffff:127.0.0.1]/"),
    bad("an address as a number", "forbidden.address", "image", image="http://2130706433/"),
    bad("credentials in a URL", "forbidden.option", "image", image=f"https://u:{SECRET}@127.0.0.1/"),
    bad("a URL without a host", "fetch.unreachable", "image", image="https:///a.png"),
    bad("a URL with a line break", "fetch.unreachable", "image", image="https://127.0.0.1/\r\nHost: x"),
    bad("a name that is none", "fetch.unreachable", "image", image="https://no-such-name.invalid/a.png"),
    bad("a path out of the volume", "forbidden.path", "image", image="../../etc/passwd"),
    bad("an absolute path", "forbidden.path", "image", image="/etc/passwd"),
    bad("the process's environment", "forbidden.path", "audio.person1", audio="/proc/self/environ"),
    bad("a link out of the volume", "forbidden.path", "image", image="out.png"),
    bad("a path with a zero", "forbidden.path", "image", image={"path": "a\0.png"}),
    bad("a file that is not there", "fetch.not_found", "image", image="missing.png"),
    bad("a folder", "fetch.not_found", "image", image="."),
    bad("a bucket not allowed", "forbidden.bucket", "image", image="s3://secrets/a.png"),
    bad("a prefix not allowed", "forbidden.bucket", "image", image="s3://media/private/a.png"),
    bad("a way out of the prefix", "forbidden.bucket", "image", image="s3://media/in/../private/a.png"),
    bad("an empty key", "job.invalid", "image.s3.key", image="s3://media"),
    bad("storage that is away", "storage.unavailable", "image", image="s3://media/in/a.png"),
    # contents
    bad("a text as image", "image.not_image", "image", image=text_file("hello")),
    bad("a text with an image's name", "image.not_image", "image", image="notes.txt"),
    bad("a sound as image", "image.not_image", "image", image=WAV),
    bad("an SVG", "image.not_image", "image", image=text_file("<svg/>")),
    bad("half an image", "image.broken", "image", image=as_base64(image_bytes()[:90])),
    bad("an image without pixels", "image.broken", "image", image=as_base64(png_header(80, 80))),
    bad("a tiny image", "image.too_small", "image", image=as_base64(image_bytes(8, 8))),
    bad("a bomb", "too_large.pixels", "image", image=as_base64(png_header(65_000, 65_000))),
    bad("too many pixels", "too_large.pixels", "image", image=as_base64(image_bytes(1100, 1000, "JPEG"))),
    bad("too many bytes", "too_large.bytes", "image", image=as_base64(b"\x89PNG" + b"\0" * 300_000)),
    bad("a text as audio", "audio.not_audio", "audio.person1", audio={"person1": text_file("hello")}),
    bad("an image as audio", "audio.not_audio", "audio.person1", audio={"person1": PNG}),
    bad(
        "a playlist", "audio.not_audio", "audio.person1", audio={"person1": text_file("#EXTM3U\n/etc/passwd")}
    ),
    bad("a broken FLAC", "audio.broken", "audio.person1", audio={"person1": as_base64(b"fLaC" + b"\1" * 99)}),
    bad("too short", "audio.too_short", "audio.person1", audio={"person1": as_base64(wav_bytes(0.1))}),
    bad("too long", "too_large.seconds", "audio.person1", audio={"person1": LONG}),
    bad(
        "a header that lies",
        "too_large.seconds",
        "audio.person1",
        audio={"person1": as_base64(bytes(LYING_WAV))},
    ),
    bad("too large audio", "too_large.bytes", "audio.person1", audio={"person1": as_base64(wav_bytes(20))}),
    # speakers
    bad("three speakers", "job.unknown_key", "audio.person3", audio={**TWO, "person3": WAV}),
    bad("all silent", "persons.all_silent", "audio", audio={"person1": "None"}),
    bad("both silent", "persons.all_silent", "audio", audio={"person1": "None", "person2": "None"}),
    bad("a box for one", "persons.bbox", "bbox", bbox={"person1": [0, 0, 9, 9]}),
    bad("one box for two", "persons.bbox", "bbox", audio=TWO, bbox={"person1": [0, 0, 9, 9]}),
    bad(
        "a box of three",
        "job.missing",
        "bbox.person1.3",
        audio=TWO,
        bbox={"person1": [0, 0, 9], "person2": [0, 0, 9, 9]},
    ),
    bad(
        "a box inside out",
        "persons.bbox",
        "bbox.person1",
        audio=TWO,
        bbox={"person1": [50, 0, 10, 30], "person2": [0, 40, 80, 80]},
    ),
    bad(
        "a box outside of the image",
        "persons.bbox",
        "bbox",
        audio=TWO,
        bbox={"person1": [0, 0, 80, 40], "person2": [0, 40, 80, 4000]},
    ),
    bad(
        "boxes that overlap",
        "persons.overlap",
        "bbox",
        audio=TWO,
        bbox={"person1": [0, 0, 80, 50], "person2": [0, 40, 80, 80]},
    ),
    bad(
        "a box too small to see",
        "persons.empty_mask",
        "bbox",
        image=as_base64(image_bytes(800, 60)),  # its ends are cropped away
        audio=TWO,
        bbox={"person1": [0, 0, 60, 10], "person2": [0, 400, 60, 500]},
    ),
    # outputs
    bad("a format that is none", "job.invalid", "output.format", output={"format": "ftp"}),
    bad("a life too long", "job.invalid", "output.expires_s", output={"expires_s": 10**7}),
    bad(
        "a bucket of others",
        "forbidden.bucket",
        "output.bucket",
        output={"format": "s3", "bucket": "secrets"},
    ),
    bad("a key of others", "forbidden.bucket", "output.key", output={"format": "s3", "key": "results/x.mp4"}),
    bad("a key with a way out", "forbidden.bucket", "output.key", output={"format": "s3", "key": "in/../x"}),
]


def test_the_table_is_long_enough_and_every_line_is_another() -> None:
    assert len(TABLE) >= 60
    assert len({entry.name for entry in TABLE}) == len(TABLE)
    assert len({entry.code for entry in TABLE}) >= 28


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIA-TEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)


@pytest.mark.usefixtures("secrets")
@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: entry.name.replace(" ", "-"))
def test_a_bad_job_gets_its_code(worker: Worker, folder: Path, entry: Bad) -> None:
    reply = run_job(entry.raw, worker=worker, job_id="bad")
    assert reply["status"] == "failed", reply
    error = reply["error"]
    assert error["code"] == entry.code, error
    assert entry.code in CODES
    if entry.field is not None:
        assert error["field"] == entry.field, error
    assert set(error) == {"code", "field", "message", "hint"}
    assert error["message"]
    assert error["hint"]
    text = json.dumps(reply, ensure_ascii=False)
    assert len(text.encode()) < 3000
    for leak in (
        SECRET,
        "AKIA-TEST",
        str(folder),
        str(Path.cwd()),
        "Traceback",
        "site-packages",
        "127.0.0.1:9",
    ):
        assert leak not in text
    assert "refresh_worker" not in reply
    assert list((folder / "jobs").iterdir()) == [], "the job left files"


def good(worker: Worker) -> str:
    reply = run_job(GOOD, worker=worker, job_id="good")
    assert reply["status"] == "completed", reply
    return str(reply["result"]["sha256"])


def test_good_jobs_before_and_after_bad_ones_are_the_same(worker: Worker, folder: Path) -> None:
    first = good(worker)
    for entry in TABLE[::9]:
        run_job(entry.raw, worker=worker, job_id="bad")
    assert good(worker) == first
    assert list((folder / "jobs").iterdir()) == []


def test_a_result_too_large_for_base64_is_refused(worker: Worker) -> None:
    from dataclasses import replace

    small = replace(worker, settings=replace(worker.settings, max_result_bytes=100))
    reply = run_job(GOOD, worker=small, job_id="x")
    assert (reply["status"], reply["error"]["code"]) == ("failed", "too_large.result")


def test_a_failing_generator_is_internal_and_tells_nothing(worker: Worker, folder: Path) -> None:
    from dataclasses import replace

    class Broken:
        def run(self, *_: Any, **__: Any) -> Any:
            msg = f"secret path {folder}/x and key {SECRET}"
            raise AttributeError(msg)

    reply = run_job(GOOD, worker=replace(worker, generator=Broken()), job_id="job-7")
    assert reply["error"]["code"] == "internal"
    assert "job-7" in reply["error"]["message"]
    assert SECRET not in json.dumps(reply)
    assert list((folder / "jobs").iterdir()) == []


def test_memory_stays_flat_over_fifty_jobs(worker: Worker) -> None:
    """The allocator's own tide is some 30 MB, so low water is compared with low water: 25 jobs with 25."""

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

    def handles() -> tuple[int, int]:
        return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))

    for _ in range(3):
        good(worker)
    before, seen = handles(), []
    for number in range(50):
        if number % 10 == 5:
            run_job(TABLE[number].raw, worker=worker, job_id="bad")
        good(worker)
        seen.append(resident())
    grown = min(seen[25:]) - min(seen[:25])
    assert grown < 10, f"{grown:.1f} MB more after 25 jobs"
    assert handles() == before, "threads or open files"
