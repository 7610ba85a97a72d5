"""What a file is, by its content: images measured before anything is decoded, audio by ffprobe and ffmpeg.

Names and announced types are never looked at. An image's width and height are read from its header here, so
that no decoder sees a file of more pixels than allowed. ffprobe and ffmpeg are told the container that was
recognised and may open nothing but that one file; a playlist or a script among the "audio" never starts.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

from multitalk_runtime.errors import AudioFault, ImageFault, TooLargeFault
from multitalk_runtime.ffmpeg import READ_ONLY_FILES, program

if TYPE_CHECKING:
    from pathlib import Path

    from multitalk_runtime.settings import Settings

__all__ = ["AudioInfo", "ImageInfo", "audio_kind", "check_audio", "check_image", "image_kind", "media_kind"]

MIN_SIDE = 32  # pixels; the model's latents are 8 times smaller, in patches of 2
MIN_SECONDS = 0.4  # below, no loudness is defined
_PROGRAM_S = 120.0

# JPEG's start-of-frame markers, which carry the size (not DHT C4, JPG C8, DAC CC).
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


@dataclass(frozen=True, kw_only=True)
class ImageInfo:
    """An image that may be decoded. Sizes in pixels."""

    kind: str
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class AudioInfo:
    """A track that can be decoded: ffmpeg's name of its container, and its length in seconds."""

    kind: str
    seconds: float


def image_kind(head: bytes) -> str | None:
    """PNG, JPEG or WEBP by the first 16 bytes; None for everything else."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    return None


def audio_kind(head: bytes) -> str | None:
    """ffmpeg's demuxer by the first 16 bytes: wav, mp3, aac, flac, ogg, mov, matroska, avi; or None."""
    if head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE":
        return "wav"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    for magic, kind in (
        (b"fLaC", "flac"),
        (b"OggS", "ogg"),
        (b"ID3", "mp3"),
        (b"\x1a\x45\xdf\xa3", "matroska"),
    ):
        if head.startswith(magic):
            return kind
    if head[4:8] == b"ftyp":
        return "mov"
    if len(head) > 2 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[1] != 0xFF:
        # An MPEG frame's sync: layer bits 00 are ADTS's AAC, the rest MPEG audio.
        return "aac" if head[1] & 0x06 == 0 else "mp3"
    return None


def media_kind(head: bytes) -> str | None:
    """Whichever of the two knows the bytes."""
    return image_kind(head) or audio_kind(head)


def check_image(path: Path, *, settings: Settings, field: str) -> ImageInfo:
    """An image within the limits that decodes. Raises ImageFault or TooLargeFault."""
    with path.open("rb") as file:
        kind = image_kind(file.read(16))
        if kind is None:
            msg = "the content is not PNG, JPEG or WebP"
            raise ImageFault("image.not_image", msg, field=field)
        file.seek(0)
        size = _SIZES[kind](file.read(4 << 20))
    if size is None or min(size) < 1:
        msg = f"the {kind} header can't be read"
        raise ImageFault("image.broken", msg, field=field)
    width, height = size
    if width * height > settings.max_pixels:
        msg = f"{width} × {height} pixels; at most {settings.max_pixels} are taken"
        raise TooLargeFault("too_large.pixels", msg, field=field)
    if min(size) < MIN_SIDE:
        msg = f"{width} × {height} pixels; each side needs at least {MIN_SIDE}"
        raise ImageFault("image.too_small", msg, field=field)
    _decode_image(path, kind, size, field)
    return ImageInfo(kind=kind, width=width, height=height)


def _decode_image(path: Path, kind: str, size: tuple[int, int], field: str) -> None:
    from PIL import Image

    try:
        with Image.open(path, formats=(kind,)) as image:
            same = image.size == size
            image.load()
    except Exception as error:
        msg = f"the {kind} can't be decoded"
        raise ImageFault("image.broken", msg, field=field) from error
    if not same:
        msg = f"the {kind} header contradicts itself"
        raise ImageFault("image.broken", msg, field=field)


def _png_size(data: bytes) -> tuple[int, int] | None:
    if data[12:16] != b"IHDR" or len(data) < 24:
        return None
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    at = 2
    while at + 9 <= len(data):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # fill bytes
            at += 1
        elif marker in _SOF:
            return int.from_bytes(data[at + 7 : at + 9], "big"), int.from_bytes(data[at + 5 : at + 7], "big")
        elif marker == 0x01 or 0xD0 <= marker <= 0xD7:  # markers without a body
            at += 2
        elif marker in (0xD9, 0xDA):  # the end, or pixels, before any size
            return None
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _webp_size(data: bytes) -> tuple[int, int] | None:
    chunk, body = data[12:16], data[20:]
    if chunk == b"VP8X" and len(body) >= 10:
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    if chunk == b"VP8L" and len(body) >= 5 and body[0] == 0x2F:
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8 " and len(body) >= 10 and body[3:6] == b"\x9d\x01\x2a":
        return (
            int.from_bytes(body[6:8], "little") & 0x3FFF,
            int.from_bytes(body[8:10], "little") & 0x3FFF,
        )
    return None


_SIZES = {"PNG": _png_size, "JPEG": _jpeg_size, "WEBP": _webp_size}


def check_audio(path: Path, *, settings: Settings, field: str) -> AudioInfo:
    """A track within the limits that decodes; its length is what the decoder finds, not what a header says.

    Raises AudioFault or TooLargeFault.
    """
    with path.open("rb") as file:
        kind = audio_kind(file.read(16))
    if kind is None:
        msg = "the content is not WAV, MP3, AAC, FLAC, OGG, MP4, WebM or AVI"
        raise AudioFault("audio.not_audio", msg, field=field)
    claimed = _probe(path, kind, field)
    if claimed > settings.max_audio_s:
        raise _too_long(claimed, settings, field)
    seconds = _decoded_seconds(path, kind, settings.max_audio_s + 1, field)
    if seconds > settings.max_audio_s:
        raise _too_long(seconds, settings, field)
    if seconds < MIN_SECONDS:
        msg = f"{seconds:.2f} s of sound; at least {MIN_SECONDS} s are needed"
        raise AudioFault("audio.too_short", msg, field=field)
    return AudioInfo(kind=kind, seconds=seconds)


def _too_long(seconds: float, settings: Settings, field: str) -> TooLargeFault:
    msg = f"more than {int(seconds)} s of sound; at most {settings.max_audio_s:g} s are taken"
    return TooLargeFault("too_large.seconds", msg, field=field)


def _probe(path: Path, kind: str, field: str) -> float:
    """The length that the container claims, in seconds (0 where it claims none)."""
    options = ["-select_streams", "a", "-show_entries", "stream=codec_type,channels,sample_rate,duration"]
    found = _run(["ffprobe", *_input(path, kind), *options, "-of", "json"], field)
    streams = json.loads(found or "{}").get("streams", [])
    if not streams:
        msg = "there is no audio stream in the file"
        raise AudioFault("audio.no_stream", msg, field=field)
    try:
        return float(streams[0].get("duration", 0))
    except (TypeError, ValueError):
        return 0.0


def _decoded_seconds(path: Path, kind: str, limit: float, field: str) -> float:
    """How much sound there is, decoded and thrown away, `limit` seconds at most."""
    output = ["-map", "0:a:0", "-vn", "-t", f"{limit:g}", "-ar", "16000", "-ac", "1"]
    found = _run(
        ["ffmpeg", "-nostdin", *_input(path, kind), *output, "-progress", "pipe:1", "-f", "null", "-"], field
    )
    times = [line.partition("=")[2] for line in found.splitlines() if line.startswith("out_time_us=")]
    return int(times[-1]) / 1e6 if times and times[-1].lstrip("-").isdigit() else 0.0


def _input(path: Path, kind: str) -> list[str]:
    # The whitelist holds for what the file itself may open; the format is forced, so nothing is guessed.
    return ["-v", "error", *READ_ONLY_FILES, "-f", kind, "-i", f"file:{path}"]


def _run(command: list[str], field: str) -> str:
    try:
        done = subprocess.run(
            [program(command[0]), *command[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PROGRAM_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        msg = "decoding takes too long"
        raise AudioFault("audio.broken", msg, field=field) from error
    if done.returncode != 0:
        msg = "the audio can't be decoded"
        raise AudioFault("audio.broken", msg, field=field)
    return done.stdout
