"""How a video is cut into clips: the original's rule, step by step, against the closed form."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wan.clips import plan_clips

sizes = st.integers(1, 30).flatmap(
    lambda n: st.tuples(st.just(4 * n + 1), st.integers(0, n - 1).map(lambda m: 4 * m + 1))
)


def original(speech: int, frame_num: int, motion: int, cap: int) -> tuple[int, int]:
    """The original's stop rule (multitalk.md §3.11, §9 D6): clips, and the length of the result."""
    clips, end, last, miss = 0, frame_num, False, 0
    while True:
        clips += 1
        if last or cap <= frame_num:
            break
        end += frame_num - motion
        if end >= min(cap, speech):
            last = True
            miss = end - speech + 3 if end >= speech else 0
    total = frame_num + (clips - 1) * (frame_num - motion)
    return clips, total if cap <= frame_num else min(total, cap) - miss


@given(sizes, st.integers(1, 2000), st.integers(1, 1200))
def test_same_clips_as_the_original(size: tuple[int, int], more: int, cap: int) -> None:
    frame_num, motion = size
    speech = frame_num + more
    plan = plan_clips(speech, frame_num, motion, cap, official_length=True)
    assert (len(plan.clips), plan.frames) == original(speech, frame_num, motion, cap)
    ours = plan_clips(speech, frame_num, motion, cap)
    assert ours.clips == plan.clips
    assert ours.frames == (min(speech, cap) if cap > frame_num else frame_num)


@given(sizes, st.integers(1, 2000), st.integers(1, 1200))
def test_rules(size: tuple[int, int], speech: int, cap: int) -> None:
    frame_num, motion = size
    plan = plan_clips(speech, frame_num, motion, cap)
    assert 1 <= plan.frames <= speech
    assert plan.clips[0].start == 0
    for before, clip in zip(plan.clips, plan.clips[1:], strict=False):
        assert clip.start == before.stop - motion  # clips overlap by what is known already
    new = [clip.stop - clip.start - clip.motion for clip in plan.clips]
    assert sum(new) >= plan.frames > sum(new[:-1])  # enough, and no clip for nothing
    assert plan.clips[-1].stop + 2 < speech + plan.extend or plan.extend == 0


@pytest.mark.parametrize(("speech", "clips"), [(250, 5), (375, 7), (1000, 18), (5000, 18), (82, 2), (81, 1)])
def test_published_counts(speech: int, clips: int) -> None:
    assert len(plan_clips(speech, 81, 25, 1000).clips) == clips


def test_known_lengths() -> None:
    """Specification §9 D6: of 990 audio frames the original shows 954."""
    assert plan_clips(990, 81, 25, 1000, official_length=True).frames == 954
    assert plan_clips(990, 81, 25, 1000).frames == 990
    assert plan_clips(1500, 81, 25, 1000).frames == 1000


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((100, 80, 25, 1000), "frame_num is 80"),
        ((100, 81, 24, 1000), "motion_frame is 24"),
        ((100, 81, 81, 1000), "less than"),
        ((0, 81, 25, 1000), "nothing to make"),
        ((100, 1, 1, 1000), "at least 5|less than"),
    ],
)
def test_impossible_numbers_are_named(numbers: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_clips(*numbers)
