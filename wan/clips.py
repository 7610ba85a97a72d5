"""How a video is cut into clips that overlap by motion frames. Pure arithmetic. Specification §3.11."""

from __future__ import annotations

from dataclasses import dataclass

LOOK_AHEAD = 3  # rows that the last window reads past its end, with one to spare


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One run of the model: frames start…stop−1 of the video, the first `motion` of them known already."""

    index: int
    start: int
    stop: int
    motion: int


@dataclass(frozen=True, kw_only=True)
class ClipPlan:
    """All clips, the length of the finished video, and how many rows the speech embedding must grow by."""

    clips: tuple[Clip, ...]
    frames: int
    extend: int


def plan_clips(
    speech_frames: int, frame_num: int, motion_frame: int, max_frames: int, *, official_length: bool = False
) -> ClipPlan:
    """Cover `speech_frames` (at most `max_frames`) with clips of `frame_num`; `max_frames` ≤ `frame_num`
    means one clip.

    The video is as long as the speech. `official_length` gives the original's lengths instead: three frames
    less when streaming (more near the cap, multitalk.md §9 D6), and speech must be longer than a clip (D7).
    Raises ValueError for impossible numbers.
    """
    _check(speech_frames, frame_num, motion_frame, max_frames)
    if official_length and speech_frames <= frame_num:
        msg = f"the speech has {speech_frames} frames; the original needs more than frame_num {frame_num}"
        raise ValueError(msg)
    wanted = min(speech_frames, max(max_frames, frame_num))
    stride = frame_num - motion_frame
    streaming = max_frames > frame_num
    more = -(-max(wanted - frame_num, 0) // stride) if streaming else 0
    clips = tuple(
        Clip(
            index=i,
            start=i * stride,
            stop=i * stride + frame_num,
            motion=motion_frame if i else 0,
        )
        for i in range(1 + more)
    )
    stop = clips[-1].stop
    short = stop >= speech_frames
    extend = stop - speech_frames + LOOK_AHEAD if short else 0
    frames = min(wanted, stop)
    if official_length and streaming:
        frames = min(stop, max_frames) - extend
    return ClipPlan(clips=clips, frames=frames, extend=extend)


def _check(speech_frames: int, frame_num: int, motion_frame: int, max_frames: int) -> None:
    for name, value in (("frame_num", frame_num), ("motion_frame", motion_frame)):
        if value < 1 or (value - 1) % 4:
            msg = f"{name} is {value}; it must be 4·n + 1, for example {max(1, value // 4 * 4 + 1)}"
            raise ValueError(msg)
    if frame_num < 5:
        msg = f"frame_num is {frame_num}; at least 5 frames are needed"
        raise ValueError(msg)
    if motion_frame >= frame_num:
        msg = f"motion_frame {motion_frame} must be less than frame_num {frame_num}"
        raise ValueError(msg)
    if speech_frames < 1 or max_frames < 1:
        msg = f"nothing to make: speech of {speech_frames} frames, video of at most {max_frames}"
        raise ValueError(msg)
