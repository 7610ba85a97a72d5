"""Contents, not names: what is recognised, measured before decoding, and turned away."""

from __future__ import annotations

import struct
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from runtime_helpers import image_bytes, png_header, wav_bytes

from multitalk_runtime import sniff
from multitalk_runtime.errors import Fault
from multitalk_runtime.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SETTINGS = Settings(max_audio_s=3, max_pixels=10_000)


def code(check: Callable[..., Any], data: bytes, folder: Path, settings: Settings = SETTINGS) -> str:
    path = folder / "file.png"
    path.write_bytes(data)
    with pytest.raises(Fault) as raised:
        check(path, settings=settings, field="image")
    assert str(folder) not in str(raised.value.to_json())
    return raised.value.code


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        (
            "JPEG",
            {"exif": b"Exif\x00\x00" + b"MM\x00*\x00\x00\x00\x08\x00\x00\x00\x00\x00\x00" + b"\xff\xc0" * 50},
        ),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"exif": b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x00\x00\x00\x00\x00"}),
    ],
)
def test_images_are_measured_by_their_header(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    (tmp_path / "x.wav").write_bytes(image_bytes(100, 70, kind, **options))  # the name says nothing
    info = sniff.check_image(tmp_path / "x.wav", settings=SETTINGS, field="image")
    assert (info.kind, info.width, info.height) == (kind, 100, 70)


def test_too_many_pixels_are_refused_before_a_decoder_sees_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        pytest.fail("a decoder was asked")

    monkeypatch.setattr("PIL.Image.open", never)
    assert code(sniff.check_image, png_header(60_000, 60_000), tmp_path) == "too_large.pixels"
    assert code(sniff.check_image, image_bytes(200, 200, "JPEG"), tmp_path) == "too_large.pixels"
    canvas = struct.pack("<I", 16382)[:3] * 2
    webp = b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + canvas
    assert code(sniff.check_image, webp, tmp_path) == "too_large.pixels"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "image.not_image"),
        (b"GIF89a" + b"\0" * 100, "image.not_image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image.not_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "image.not_image"),
        (wav_bytes(), "image.not_image"),
        (image_bytes()[:16], "image.broken"),
        (image_bytes()[:60], "image.broken"),
        (png_header(80, 80), "image.broken"),
        (png_header(0, 80), "image.broken"),
        (image_bytes(kind="JPEG")[:30], "image.broken"),
        (b"\xff\xd8\xff\xda" + b"\0" * 100, "image.broken"),
        (b"\xff\xd8\xff\xe0\x00\x00" + b"\0" * 100, "image.broken"),
        (b"RIFF\0\0\0\0WEBPVP9 " + b"\0" * 50, "image.broken"),
        (image_bytes(16, 90), "image.too_small"),
    ],
)
def test_what_is_not_a_usable_image(tmp_path: Path, data: bytes, expected: str) -> None:
    assert code(sniff.check_image, data, tmp_path) == expected


@pytest.mark.parametrize(
    "suffix", ["wav", "mp3", "m4a", "flac", "ogg", "aac", "webm", "mkv", "mp4", "mov", "avi"]
)
def test_audio_is_measured_by_decoding(tmp_path: Path, ffmpeg: Any, suffix: str) -> None:
    made = tmp_path / f"a.{suffix}"
    picture = ["-f", "lavfi", "-i", "color=s=64x64:d=1"] if suffix in ("mp4", "mov", "avi", "mkv") else []
    ffmpeg(*picture, "-f", "lavfi", "-i", "sine=d=1", str(made))
    path = made.rename(tmp_path / "a.png")
    info = sniff.check_audio(path, settings=SETTINGS, field="audio")
    assert info.seconds == pytest.approx(1.0, abs=0.1)


def test_a_header_that_lies_about_the_length_is_found_out(tmp_path: Path) -> None:
    data = bytearray(wav_bytes(5.0))
    data[4:8] = struct.pack("<I", 36 + 3200)
    data[40:44] = struct.pack("<I", 0xFFFFFFFF)  # "until the end", as streams write it
    assert code(sniff.check_audio, bytes(data), tmp_path) == "too_large.seconds"
    assert code(sniff.check_audio, wav_bytes(5.0), tmp_path) == "too_large.seconds"


def test_a_playlist_never_opens_what_it_names(tmp_path: Path) -> None:
    (tmp_path / "secret.wav").write_bytes(wav_bytes())
    for text in (
        f"ffconcat version 1.0\nfile {tmp_path}/secret.wav\n",
        f"#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:1,\n{tmp_path}/secret.wav\n",
        "v=0\r\nm=audio 5004 RTP/AVP 0\r\nc=IN IP4 127.0.0.1\r\n",
    ):
        assert code(sniff.check_audio, text.encode(), tmp_path) == "audio.not_audio"
        # Bytes that look like sound in front do not help: the container is forced.
        assert code(sniff.check_audio, b"ID3\x04\0\0\0\0\0\0" + text.encode(), tmp_path) in (
            "audio.broken",
            "audio.no_stream",
        )


def test_what_is_not_usable_audio(tmp_path: Path, ffmpeg: Any) -> None:
    silent = tmp_path / "silent.mp4"
    ffmpeg("-f", "lavfi", "-i", "color=s=64x64:d=1", str(silent))
    assert code(sniff.check_audio, silent.read_bytes(), tmp_path) == "audio.no_stream"
    assert code(sniff.check_audio, b"", tmp_path) == "audio.not_audio"
    assert code(sniff.check_audio, image_bytes(), tmp_path) == "audio.not_audio"
    assert code(sniff.check_audio, wav_bytes()[:30], tmp_path) in ("audio.broken", "audio.no_stream")
    assert code(sniff.check_audio, b"fLaC" + b"\0" * 200, tmp_path) in ("audio.broken", "audio.no_stream")
    assert code(sniff.check_audio, wav_bytes(0.1), tmp_path) == "audio.too_short"


def test_no_shell_and_a_protocol_whitelist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, dict[str, Any]]] = []
    real = subprocess.run

    def spy(command: Any, **options: Any) -> Any:
        calls.append((command, options))
        return real(command, **options)

    monkeypatch.setattr(subprocess, "run", spy)
    path = tmp_path / "; touch owned"
    path.write_bytes(wav_bytes())
    sniff.check_audio(path, settings=SETTINGS, field="audio")
    assert len(calls) == 2
    for command, options in calls:
        assert isinstance(command, list)
        assert not options.get("shell")
        assert options["timeout"]
        where = command.index("-protocol_whitelist")
        assert command[where + 1] == "file,pipe"
        assert where < command.index("-i")
        assert command[command.index("-f") + 1] == "wav"
