"""Frames → one H.264 file with sound, by one ffmpeg that gets the frames as they come.

The same frames, sound and metadata give the same bytes: threads are fixed and nothing of the machine or the
day is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import queue
import subprocess
import tempfile
import threading
from typing import TYPE_CHECKING, Any, Self

from multitalk_runtime.errors import InternalFault, OutputFault
from multitalk_runtime.ffmpeg import program

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType

    import numpy as np
    from torch import Tensor

__all__ = ["FPS", "VideoWriter"]

FPS = 25
CRF = 18
_WAITING = 32  # pieces of frames that may wait for the encoder while the model goes on
_CLOSE_S = 600.0
# The same everywhere, for x264's bytes depend on it. On 16 cores 81 frames of noise, 640 wide and coming as
# the VAE decodes them, end 1.8 s after the last with 4 threads, 0.9 with 8, 0.6 with 16. But the more
# threads, the shorter the vertical motion that x264 looks for: of a picture that shakes by 24 pixels a
# frame 8 make as many bytes as 4, 16 a tenth or a fifth more.
_THREADS = 8


class VideoWriter:
    """Writes `path` while it is open: `write` takes frames, leaving the `with` block ends the file.

    The file has its name only when it is complete; after an error, or if nothing was written, there is none.
    `sha256` is that of the raw frames, which tells two runs apart without the codec. Raises OutputFault if
    ffmpeg fails.
    """

    def __init__(
        self,
        path: Path,
        *,
        audio: Path | None = None,
        metadata: Mapping[str, Any] | None = None,
        fps: int = FPS,
        crf: int = CRF,
    ) -> None:
        self.path = path
        self.fps = fps
        self.frames = 0
        self.size: tuple[int, int] | None = None  # height, width
        self._audio, self._metadata, self._crf = audio, dict(metadata or {}), crf
        self._digest = hashlib.sha256()
        self._part = path.with_name(f".{path.stem}.part.mp4")
        self._process: subprocess.Popen[bytes] | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the writer
        self._queue: queue.Queue[np.ndarray | None] = queue.Queue(maxsize=_WAITING)
        self._thread: threading.Thread | None = None
        self._broken = False

    @property
    def sha256(self) -> str:
        """Of all frames so far, as uint8 [F, H, W, 3]."""
        return self._digest.hexdigest()

    def write(self, frames: Tensor) -> None:
        """Frames [3, f, H, W] in [−1, 1]; values are cut to 8 bits as the original does.

        Raises InternalFault for frames that are not finite, ValueError if their size changes.
        """
        import torch

        if not torch.isfinite(frames).all():
            raise InternalFault("internal", "the model made frames that are not finite")
        if not frames.shape[1]:
            return
        size = (frames.shape[2], frames.shape[3])
        if self.size is None:
            self.size = size
            self._start(*size)
        if size != self.size:
            msg = f"frames of {size[0]}×{size[1]} in a video of {self.size[0]}×{self.size[1]}"
            raise ValueError(msg)
        pixels = ((frames + 1) / 2 * 255).clamp(0, 255).to(torch.uint8)
        raw = pixels.permute(1, 2, 3, 0).contiguous().cpu().numpy()
        self._digest.update(raw.data)
        self.frames += raw.shape[0]
        self._put(raw)

    def _start(self, height: int, width: int) -> None:
        sound = [] if self._audio is None else ["-protocol_whitelist", "file", "-i", f"file:{self._audio}"]
        mapped = ["-map", "0:v:0"] + ([] if self._audio is None else ["-map", "1:a:0"])
        command = [program("ffmpeg"), "-nostdin", "-y", "-v", "error"]
        command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(self.fps)]
        command += ["-protocol_whitelist", "pipe", "-i", "pipe:0", *sound, *mapped, "-map_metadata", "-1"]
        command += ["-c:v", "libx264", "-preset", "medium", "-crf", str(self._crf), "-pix_fmt", "yuv420p"]
        command += ["-threads", str(_THREADS), "-c:a", "aac", "-b:a", "128k"]
        command += ["-fflags", "+bitexact", "-flags:v", "+bitexact", "-flags:a", "+bitexact"]
        if self._metadata:
            command += ["-metadata", f"comment={json.dumps(self._metadata, sort_keys=True)}"]
        command += ["-movflags", "+faststart", "-f", "mp4", f"file:{self._part}"]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._log
        )
        self._thread = threading.Thread(target=self._feed, name="video-writer", daemon=True)
        self._thread.start()

    def _feed(self) -> None:
        """The writer's thread: frames from the queue into ffmpeg, until there is None."""
        stream = self._process.stdin if self._process else None
        while (raw := self._queue.get()) is not None:
            if self._broken or stream is None:
                continue
            try:
                stream.write(raw.data)
            except OSError:  # ffmpeg is gone; its message is in the log
                self._broken = True

    def _put(self, raw: np.ndarray) -> None:
        if self._broken:
            raise self._failure()
        self._queue.put(raw)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is not None:
                self._abort()
            elif self._process is not None:
                self._finish()
        finally:
            if self._process is not None:  # another process of the group may be writing under that name
                self._part.unlink(missing_ok=True)
            self._log.close()

    def _finish(self) -> None:
        process, thread = self._process, self._thread
        if process is None or thread is None or process.stdin is None:
            return
        self._queue.put(None)
        thread.join()
        try:
            process.stdin.close()
        except OSError:
            self._broken = True
        try:
            code = process.wait(timeout=_CLOSE_S)
        except subprocess.TimeoutExpired as error:
            self._abort()
            raise OutputFault("output.encode", "the encoder did not end in time") from error
        if code or self._broken:
            raise self._failure()
        try:
            self._part.replace(self.path)
        except (
            OSError
        ) as error:  # of the output, whatever its kind: FileNotFoundError would look like the job's
            raise OutputFault("output.encode", "the finished file could not take its name") from error

    def _abort(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._broken = True
        if self._thread is not None and self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        self._process.wait()

    def _failure(self) -> OutputFault:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        # ffmpeg's line goes into the exception chain for the log, not to the caller: it names paths.
        fault = OutputFault("output.encode", "the encoder failed")
        fault.__cause__ = RuntimeError(lines[-1] if lines else "ffmpeg ended without a message")
        return fault
