"""The ffmpeg and ffprobe programs: found once, never through a shell, never over a network.

Files are opened by the `file:` protocol alone, and only as one of the formats listed, so that a playlist or
a concat script can't make ffmpeg read something else.
"""

from __future__ import annotations

import shutil

from multitalk_runtime.errors import InternalFault

__all__ = ["READ_ONLY_FILES", "program"]

FORMATS = "wav,w64,mp3,flac,ogg,aac,aiff,mov,mp4,m4a,3gp,matroska,webm,avi,mpeg,mpegts"
READ_ONLY_FILES = ("-protocol_whitelist", "file,pipe", "-format_whitelist", FORMATS)
"""Options before `-i file:PATH`."""


def program(name: str) -> str:
    """The path of `ffmpeg` or `ffprobe`. Raises InternalFault: a worker without it can do nothing."""
    found = shutil.which(name)
    if found is None:
        hint = "install the Debian package ffmpeg, or use one of this project's images"
        raise InternalFault("internal", f"{name} is not installed on this machine", hint=hint)
    return found
