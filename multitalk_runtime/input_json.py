"""The command line's input JSON: one or two speakers, boxes, silent tracks, video files as audio, TTS.

| key | meaning |
|---|---|
| `prompt` | text |
| `cond_image` | path of an image |
| `cond_audio` | `{"person1": path[, "person2": path]}`; "None" is a silent speaker; `{}` with TTS |
| `audio_type` | "para" (at once) or "add" (person 1, then person 2); needed with two tracks |
| `bbox` | `{"person1": [row_min, col_min, row_max, col_max], "person2": […]}`, pixels of the image |
| `tts_audio` | `{"text": …, "human1_voice": path[, "human2_voice": path]}`, with `--audio_mode tts` |

Paths are relative to the working folder, as they always were.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multitalk_runtime.errors import FetchFault, JobFault, PersonsFault

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Tts", "Wanted", "read_input"]

KEYS = ("prompt", "cond_image", "cond_audio", "audio_type", "bbox", "tts_audio", "video_path")
SILENT = "None"


@dataclass(frozen=True, kw_only=True)
class Tts:
    """What is to be spoken, and the voice file of each speaker."""

    text: str
    voices: tuple[Path, ...]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The file's content, checked. With `tts` there are no tracks."""

    prompt: str
    image: Path
    tracks: tuple[Path | None, ...]
    audio_type: str
    bbox: dict[str, tuple[int, int, int, int]] | None
    tts: Tts | None


def read_input(path: Path, *, audio_mode: str = "localfile") -> Wanted:
    """Read and check the JSON; every file that it names must be there.

    Raises JobFault, PersonsFault or FetchFault with the key; nothing is loaded or decoded.
    """
    content = _load(path)
    unknown = sorted(set(content) - set(KEYS))
    if unknown:
        msg = f"{path}: there is no key {unknown[0]!r}; the keys are {', '.join(KEYS[:-1])}"
        raise JobFault("job.unknown_key", msg, field=unknown[0])
    prompt = _needed(content, "prompt", str, path)
    if not prompt.strip():
        raise JobFault("job.invalid", "the prompt is empty", field="prompt")
    image = _file(_needed(content, "cond_image", str, path), "cond_image")
    tts = _tts(content, path) if audio_mode == "tts" else None
    tracks = () if tts else _tracks(content, path)
    people = len(tts.voices) if tts else len(tracks)
    audio_type = content.get("audio_type", "para" if people == 1 or tts else None)
    if audio_type not in ("para", "add"):
        code = "job.missing" if audio_type is None else "job.invalid"
        msg = "two speakers need audio_type" if audio_type is None else f"{audio_type!r} is not a type"
        raise JobFault(code, msg, field="audio_type", hint="use para (at once) or add (in turn)")
    bbox = _boxes(content, people)
    return Wanted(prompt=prompt, image=image, tracks=tracks, audio_type=audio_type, bbox=bbox, tts=tts)


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FetchFault("fetch.not_found", f"no file {str(path)!r}", field="--input_json") from error
    except (OSError, ValueError) as error:
        msg = f"{path} can't be read: {error}"
        raise JobFault("job.invalid", msg, field="--input_json", hint="correct the JSON") from error
    if not isinstance(content, dict):
        msg = f"{path} is not a JSON object"
        raise JobFault("job.invalid", msg, field="--input_json")
    return content


def _needed(content: Mapping[str, Any], key: str, kind: type, path: Path) -> Any:
    if key not in content:
        raise JobFault("job.missing", f"{path} has no {key!r}", field=key, hint="add it")
    value = content[key]
    if not isinstance(value, kind):
        msg = f"expected {'text' if kind is str else 'an object'}, got {type(value).__name__}"
        raise JobFault("job.invalid", msg, field=key)
    return value


def _file(value: object, key: str) -> Path:
    if not isinstance(value, str) or not value:
        raise JobFault("job.invalid", "expected a path", field=key)
    path = Path(value)
    if not path.is_file():
        raise FetchFault("fetch.not_found", f"no file {value!r}", field=key)
    return path


def _tracks(content: Mapping[str, Any], path: Path) -> tuple[Path | None, ...]:
    given = _needed(content, "cond_audio", dict, path)
    if set(given) not in ({"person1"}, {"person1", "person2"}):
        msg = f"it names {', '.join(sorted(given)) or 'nobody'}"
        hint = "name person1, or person1 and person2; with --audio_mode tts leave it empty"
        raise PersonsFault("persons.count", msg, field="cond_audio", hint=hint)
    tracks = tuple(
        None if given[person] in (SILENT, None) else _file(given[person], f"cond_audio.{person}")
        for person in sorted(given)
    )
    if not any(tracks):
        raise PersonsFault("persons.all_silent", "every track is silent", field="cond_audio")
    return tracks


def _boxes(content: Mapping[str, Any], people: int) -> dict[str, tuple[int, int, int, int]] | None:
    given = content.get("bbox")
    if given is None:
        return None
    hint = "give person1 and person2 each [row_min, col_min, row_max, col_max] in pixels of the image"
    if people == 1:
        msg = "boxes are for two speakers; there is one"
        raise PersonsFault("persons.bbox", msg, field="bbox", hint="leave bbox out")
    if not isinstance(given, dict) or set(given) != {"person1", "person2"}:
        raise PersonsFault("persons.bbox", "it must name person1 and person2", field="bbox", hint=hint)
    boxes = {}
    for person, box in given.items():
        numbers = isinstance(box, list) and all(
            isinstance(v, int | float) and not isinstance(v, bool) and v == int(v) for v in box
        )
        if not numbers or len(box) != 4:
            msg = f"{box!r} is not four whole numbers"
            raise PersonsFault("persons.bbox", msg, field=f"bbox.{person}", hint=hint)
        top, left, bottom, right = (int(v) for v in box)
        if not (0 <= top < bottom and 0 <= left < right):
            msg = f"{box} is empty or negative, read as rows {top}…{bottom} and columns {left}…{right}"
            raise PersonsFault("persons.bbox", msg, field=f"bbox.{person}", hint=hint)
        boxes[person] = (top, left, bottom, right)
    return boxes


def _tts(content: Mapping[str, Any], path: Path) -> Tts:
    given = _needed(content, "tts_audio", dict, path)
    text = given.get("text")
    if not isinstance(text, str) or not text.strip():
        raise JobFault("job.missing", "there is no text to speak", field="tts_audio.text")
    voices = [
        _file(given[key], f"tts_audio.{key}") for key in ("human1_voice", "human2_voice") if key in given
    ]
    if not voices or "human1_voice" not in given:
        raise JobFault("job.missing", "there is no human1_voice", field="tts_audio.human1_voice")
    return Tts(text=text, voices=tuple(voices))
