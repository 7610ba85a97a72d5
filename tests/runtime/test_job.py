"""The job's one model, its published schema, and the contract of the V7x images' keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runtime_helpers import as_base64, image_bytes, wav_bytes

from multitalk_runtime.errors import Fault
from multitalk_runtime.job import Job, json_schema, parse_job

ROOT = Path(__file__).parents[2]


def test_the_published_schema_is_up_to_date() -> None:
    kept = json.loads((ROOT / "docs/job.schema.json").read_text())
    assert kept == json_schema(), "run: python -m multitalk_runtime.job > docs/job.schema.json"


def test_an_empty_job_is_the_built_in_one() -> None:
    job, notes = parse_job({})
    assert job == Job()
    assert (job.image, job.audio, job.frame_num, job.output.format) == (None, None, 81, "base64")
    assert notes == ()


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("https://example.com/a.png", "url"),
        ("s3://bucket/a.png", "s3"),
        ("data:image/png;base64,AAAA", "base64"),
        ("in/a.png", "path"),
        ("ftp://example.com/a.png", "url"),  # refused when it is fetched, with a better reason
        ("image", "path"),  # four letters of base64, but a name
    ],
)
def test_a_text_says_where_a_file_is(text: str, kind: str) -> None:
    source = parse_job({"image": text})[0].image
    assert source is not None
    assert getattr(source, kind) is not None


# One contract a key of the V7x images: what was sent, what it means now, what the reply says.
V7X: list[tuple[dict[str, Any], str, Any, tuple[str, str] | None]] = [
    ({"audio_s3_key": "in/a.wav"}, "audio.person1.s3.key", "in/a.wav", ("audio_s3_key", "audio.person1")),
    ({"audio_file": "a.wav"}, "audio.person1.path", "a.wav", ("audio_file", "audio.person1")),
    ({"audio_file": "https://e.x/a"}, "audio.person1.url", "https://e.x/a", ("audio_file", "audio.person1")),
    ({"audio_1": "a.wav"}, "audio.person1.path", "a.wav", ("audio_1", "audio.person1")),
    (
        {"audio_1": as_base64(wav_bytes())["base64"]},
        "audio.person1.base64",
        as_base64(wav_bytes())["base64"],
        ("audio_1", "audio.person1"),
    ),
    ({"image_s3_key": "in/a.png"}, "image.s3.key", "in/a.png", ("image_s3_key", "image")),
    ({"image_file": "a.png"}, "image.path", "a.png", ("image_file", "image")),
    ({"condition_image": "image"}, "image.path", "image", ("condition_image", "image")),
    (
        {"condition_image": as_base64(image_bytes())["base64"]},
        "image.base64",
        as_base64(image_bytes())["base64"],
        ("condition_image", "image"),
    ),
    ({"prompt": "A man speaks."}, "prompt", "A man speaks.", None),
    ({"output_format": "s3"}, "output.format", "s3", ("output_format", "output.format")),
    ({"output_format": "base64"}, "output.format", "base64", ("output_format", "output.format")),
    ({"sampling_steps": 12}, "sample_steps", 12, ("sampling_steps", "sample_steps")),
    ({"turbo": True}, "quality", "turbo", ("turbo", "quality")),
    ({"turbo": "true"}, "quality", "turbo", ("turbo", "quality")),
    ({"turbo": False}, "quality", None, ("turbo", "quality")),
]


@pytest.mark.parametrize(("raw", "where", "value", "note"), V7X)
def test_a_key_of_the_old_images_keeps_its_meaning(
    raw: dict[str, Any], where: str, value: Any, note: tuple[str, str] | None
) -> None:
    job, notes = parse_job(raw)
    found: Any = job
    for step in where.split("."):
        found = getattr(found, step)
    assert found == value
    assert [(n.key, n.use) for n in notes] == ([note] if note else [])


def test_a_whole_job_of_the_old_images() -> None:
    job, notes = parse_job(
        {
            "audio_1": "a.wav",
            "audio_2": "b.wav",
            "condition_image": "a.png",
            "prompt": "Two people talk.",
            "output_format": "s3",
            "sampling_steps": 8,
        }
    )
    assert job.audio is not None
    assert job.audio.persons == 2
    assert {note.key for note in notes} == {
        "audio_1", "audio_2", "condition_image", "output_format", "sampling_steps",
    }  # fmt: skip


@pytest.mark.parametrize(
    "raw",
    [
        {"audio_1": "a", "audio_file": "b"},
        {"audio_1": "a", "audio": "b"},
        {"image_file": "a", "image": "b"},
        {"sampling_steps": 4, "sample_steps": 8},
        {"output_format": "s3", "output": {"format": "base64"}},
    ],
)
def test_old_and_new_together_is_a_conflict(raw: dict[str, Any]) -> None:
    with pytest.raises(Fault) as raised:
        parse_job(raw)
    assert raised.value.code == "job.conflict"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(
    [*Job.model_fields, "audio_1", "audio_2", "image_file", "output_format", "sampling_steps"]
)


@given(st.dictionaries(KEYS, JSON, max_size=4) | JSON)
def test_whatever_is_sent_is_a_job_or_a_fault_that_repeats_no_value(raw: Any) -> None:
    try:
        job, _ = parse_job(raw)
    except Fault as fault:
        assert fault.code.startswith(("job.", "persons."))
        assert fault.hint
    else:
        assert (job.frame_num - 1) % 4 == 0
