"""Every way in which a file comes to a job, and what keeps the worker's own files out of it."""

from __future__ import annotations

import http.server
import ipaddress
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest
from runtime_helpers import as_base64, image_bytes, wav_bytes

from multitalk_runtime.defaults import AUDIO, IMAGE
from multitalk_runtime.errors import Fault
from multitalk_runtime.inputs import Inputs, resolve
from multitalk_runtime.job import parse_job
from multitalk_runtime.settings import Settings
from multitalk_runtime.storage import Storage
from multitalk_runtime.workspace import Workspace

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def bring(raw: dict[str, Any], settings: Settings, check: Any = None) -> Inputs:
    with Workspace() as workspace:
        inputs = resolve(parse_job(raw)[0], settings=settings, workspace=workspace, storage=Storage(settings))
        if check:
            check(inputs, workspace)
        return inputs


def code(raw: dict[str, Any], settings: Settings) -> tuple[str, str]:
    with pytest.raises(Fault) as raised:
        bring(raw, settings)
    return raised.value.code, raised.value.field


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    folder = tmp_path / "volume"
    (folder / "in").mkdir(parents=True)
    (folder / "in" / "face.png").write_bytes(image_bytes())
    (folder / "in" / "voice.wav").write_bytes(wav_bytes())
    (tmp_path / "secret.png").write_bytes(image_bytes())
    return folder


@pytest.fixture
def web(volume: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(volume))

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_without_inputs_the_built_in_ones_are_used() -> None:
    inputs = bring({}, Settings())
    assert inputs.image == IMAGE
    assert inputs.tracks == (AUDIO,)
    assert inputs.seconds[0] > 1


def test_every_source_brings_the_same_files(volume: Path, web: str, s3: Any, s3_server: str) -> None:
    s3.put_object(Bucket="media", Key="in/face.png", Body=image_bytes())
    s3.put_object(Bucket="media", Key="in/voice.wav", Body=wav_bytes())
    settings = Settings(
        volumes=(volume,),
        allow_addresses=(ipaddress.ip_network("127.0.0.0/8"),),
        s3_endpoint=s3_server,
        s3_bucket="media",
        s3_allowed=("media/in",),
    )

    def same(inputs: Inputs, workspace: Workspace) -> None:
        assert inputs.image.read_bytes() == image_bytes()
        assert [track and track.read_bytes() for track in inputs.tracks] == [wav_bytes()]
        assert all(path and path.parent == workspace.folder for path in (inputs.image, *inputs.tracks))

    for image, audio in (
        (f"{web}/in/face.png", f"{web}/in/voice.wav"),
        ("s3://media/in/face.png", {"s3": {"key": "in/voice.wav"}}),
        (as_base64(image_bytes()), f"data:audio/wav;base64,{as_base64(wav_bytes())['base64']}"),
        ("in/face.png", str(volume / "in" / "voice.wav")),
        ("./in/../in/face.png", {"path": "in/voice.wav"}),
    ):
        bring({"image": image, "audio": {"person1": audio}}, settings, same)


def test_two_speakers_one_of_them_silent() -> None:
    inputs = bring({"audio": {"person1": "None", "person2": as_base64(wav_bytes(0.8))}}, Settings())
    assert inputs.tracks[0] is None
    assert inputs.seconds == (0.0, pytest.approx(0.8, abs=0.01))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("../secret.png", "forbidden.path"),
        ("in/../../secret.png", "forbidden.path"),
        ("/etc/passwd", "forbidden.path"),
        ("/etc/does-not-exist", "forbidden.path"),
        ("/proc/self/environ", "forbidden.path"),
        ("link-out.png", "forbidden.path"),
        ("folder-out/secret.png", "forbidden.path"),
        ("a\0b", "forbidden.path"),
        ("loop", "fetch.not_found"),
        ("in", "fetch.not_found"),
        ("pipe", "fetch.not_found"),
        ("in/missing.png", "fetch.not_found"),
        ("a" * 300, "fetch.not_found"),
    ],
)
def test_paths_stay_on_the_volume(volume: Path, path: str, expected: str) -> None:
    (volume / "link-out.png").symlink_to(volume.parent / "secret.png")
    (volume / "folder-out").symlink_to(volume.parent)
    (volume / "loop").symlink_to("loop")
    os.mkfifo(volume / "pipe")
    found = code({"image": {"path": path}}, Settings(volumes=(volume,)))
    # A loop of links is no path at all before Python 3.13.
    assert found == (expected, "image") or (path == "loop" and found[0] == "forbidden.path")


def test_a_link_within_the_volume_and_a_volume_behind_a_link_are_fine(volume: Path) -> None:
    (volume / "link.png").symlink_to("in/face.png")
    (volume.parent / "mount").symlink_to(volume)
    bring({"image": "link.png"}, Settings(volumes=(volume.parent / "mount",)))


def test_without_a_volume_there_are_no_paths(volume: Path) -> None:
    assert code({"image": str(volume / "in" / "face.png")}, Settings()) == ("forbidden.path", "image")


def test_a_file_that_is_swapped_for_a_link_is_not_followed(
    volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the check of a path and its opening, somebody with write access replaces it."""
    real = os.open

    def swap(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path).endswith("face.png"):
            (volume / "in" / "face.png").unlink()
            (volume / "in").joinpath("face.png").symlink_to(volume.parent / "secret.png")
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", swap)
    assert code({"image": "in/face.png"}, Settings(volumes=(volume,))) == ("forbidden.path", "image")


def test_sizes_are_bounded_for_every_source(volume: Path, web: str, s3: Any, s3_server: str) -> None:
    s3.put_object(Bucket="media", Key="face.png", Body=image_bytes())
    settings = Settings(
        volumes=(volume,),
        allow_addresses=(ipaddress.ip_network("127.0.0.0/8"),),
        s3_endpoint=s3_server,
        s3_allowed=("media",),
        max_image_bytes=50,
    )
    for image in (f"{web}/in/face.png", "s3://media/face.png", as_base64(image_bytes()), "in/face.png"):
        assert code({"image": image}, settings) == ("too_large.bytes", "image")


def test_base64_is_strict_and_nothing_is_empty() -> None:
    assert code({"image": {"base64": "not base64!"}}, Settings()) == ("fetch.base64", "image")
    assert code({"image": {"base64": "aGVsbG8"}}, Settings()) == ("fetch.base64", "image")
    assert code({"image": {"base64": ""}}, Settings()) == ("fetch.truncated", "image")
    wrapped = as_base64(image_bytes())["base64"]
    folded = "\n".join(wrapped[i : i + 76] for i in range(0, len(wrapped), 76))
    bring({"image": {"base64": folded}}, Settings())


def test_tracks_one_after_the_other_count_together() -> None:
    tracks = {"person1": as_base64(wav_bytes(2.0)), "person2": as_base64(wav_bytes(2.0))}
    bring({"audio": tracks}, Settings(max_audio_s=3))
    added = {"audio": tracks, "audio_type": "add"}
    assert code(added, Settings(max_audio_s=3)) == ("too_large.seconds", "audio")
