"""What the generator is asked for: one video, by files that are here already."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from multitalk_runtime.errors import JobFault, PersonsFault
from wan.quality import TIERS, QualityError, Setting, expand, tier

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    from torch import Tensor

    from multitalk_runtime.job import Job

__all__ = ["Request"]

SHIFT = {"multitalk-480": 7.0, "multitalk-720": 11.0}
MAX_FRAMES = 1000


@dataclass(frozen=True, kw_only=True)
class Request:
    """One video. The numbers have the meaning and the defaults of the command line (`generate_multitalk`).

    tracks: one or two audio files (or decoded samples, 16 kHz float32); None is a silent speaker. `speech`
    replaces them as the model's input by embeddings [frames, 12, 768], one a speaker; the tracks are still
    the video's sound. `max_frames` bounds a streaming video. `seed` −1 draws one. `quality`: see
    `wan.quality`; steps, shift and guidance scales that are left open (None) are what it stands for.
    """

    prompt: str
    image: Path
    tracks: tuple[Path | np.ndarray | None, ...]
    output: Path
    audio_type: str = "para"
    bbox: Mapping[str, tuple[int, int, int, int]] | None = None
    size: str = "multitalk-480"
    mode: str = "clip"
    frame_num: int = 81
    motion_frame: int = 25
    sample_steps: int | None = None
    sample_shift: float | None = None
    text_guide_scale: float | None = None  # a number once the request is made
    audio_guide_scale: float | None = None
    seed: int = 42
    quality: str = "exact"
    use_teacache: bool = False
    teacache_thresh: float = 0.2
    use_apg: bool = False
    apg_momentum: float = -0.75
    apg_norm_threshold: float = 55.0
    color_correction_strength: float = 1.0
    max_frames: int = MAX_FRAMES
    max_audio_s: float = 600.0
    normalise: bool = True
    speech: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        try:
            base = tier(self.quality)
        except QualityError as error:
            raise JobFault("job.invalid", str(error), field="quality") from error
        for name in ("text_guide_scale", "audio_guide_scale"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(base, name))
        if self.size not in SHIFT:
            msg = f"size {self.size!r} is not one that the model has"
            raise JobFault("job.size", msg, field="size")
        for name, value in (("frame_num", self.frame_num), ("motion_frame", self.motion_frame)):
            if value % 4 != 1 or value < 1 or (name == "frame_num" and value < 5):
                near = max(5 if name == "frame_num" else 1, (value - 1) // 4 * 4 + 1)
                msg = f"{name} {value} is not of the form 4n+1"
                raise JobFault("job.frame_num", msg, field=name, hint=f"use {near} or {near + 4}")
        if self.mode not in ("clip", "streaming"):
            raise JobFault("job.invalid", f"mode {self.mode!r} is neither clip nor streaming", field="mode")
        if self.mode == "streaming" and self.motion_frame >= self.frame_num:
            msg = f"motion_frame {self.motion_frame} leaves nothing new in a clip of {self.frame_num} frames"
            raise JobFault("job.conflict", msg, field="motion_frame", hint="use 25")
        if len(self.tracks) not in (1, 2):
            msg = f"{len(self.tracks)} tracks; the model knows one or two speakers"
            raise PersonsFault("persons.count", msg, field="audio")

    @classmethod
    def from_job(
        cls,
        job: Job,
        *,
        image: Path,
        tracks: tuple[Path | None, ...],
        output: Path,
        max_audio_s: float = 600.0,
        default_quality: str = "exact",
    ) -> Request:
        """A job whose files have been brought here; `default_quality` is that of a job which names none."""
        same = (
            "prompt", "audio_type", "bbox", "size", "mode", "frame_num", "motion_frame", "sample_steps",
            "sample_shift", "text_guide_scale", "audio_guide_scale", "seed", "use_teacache",
            "teacache_thresh", "use_apg", "apg_momentum", "apg_norm_threshold", "color_correction_strength",
        )  # fmt: skip
        values: dict[str, Any] = {name: getattr(job, name) for name in same}
        values["quality"] = job.quality or default_quality
        return cls(image=image, tracks=tracks, output=output, max_audio_s=max_audio_s, **values)

    def setting(self, **given: Any) -> Setting:
        """All switches: what this request says, what else was `given` explicitly (None: nothing), and the
        quality for the rest. Raises wan.quality.QualityError for switches that exclude each other.
        """
        found = expand(
            self.quality,
            step_cache=self.teacache_thresh if self.use_teacache else None,
            steps=self.sample_steps,
            shift=self.sample_shift,
            text_guide_scale=self.text_guide_scale,
            audio_guide_scale=self.audio_guide_scale,
            **given,
        )
        return replace(found, switches=replace(found.switches, shift=self.shift))

    @property
    def steps(self) -> int:
        return TIERS[self.quality].steps if self.sample_steps is None else self.sample_steps

    @property
    def shift(self) -> float:
        given = TIERS[self.quality].shift if self.sample_shift is None else self.sample_shift
        return SHIFT[self.size] if given is None else given

    @property
    def frames_at_most(self) -> int:
        """Of the whole video: one clip, or what streaming allows."""
        return self.frame_num if self.mode == "clip" else max(self.max_frames, self.frame_num + 1)

    @property
    def overlap(self) -> int:
        """Frames that clips share; a single clip shares none, and 1 fits every length."""
        return self.motion_frame if self.mode == "streaming" else 1

    @property
    def passes(self) -> int:
        """Runs of the network a step."""
        return 2 if abs(self.text_guide_scale - 1.0) < 1e-9 else 3
