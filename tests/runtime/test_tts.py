"""The adapter to Kokoro, against a stand-in with the signatures and manners of kokoro 0.9.4.

The package needs 400 MB beside its weights, which come from the Hub, so it is not installed for tests. The
adapter was run with the real package, with random weights of the published sizes (docs/generate.md).
"""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from multitalk_runtime.errors import Fault
from multitalk_runtime.input_json import Tts
from multitalk_runtime.tts import kokoro_voice, speak

if TYPE_CHECKING:
    from pathlib import Path


class KModel:
    """As kokoro's: without a repository's name it talks on stdout."""

    def __init__(
        self, repo_id: str | None = None, config: Any = None, model: str | None = None,
        disable_complex: bool = False,
    ) -> None:  # fmt: skip
        if repo_id is None:
            print("WARNING: Defaulting repo_id")
        assert config and model, "kokoro would download it"
        self.files = (config, model)

    def eval(self) -> KModel:
        return self


class Piece:
    def __init__(self, audio: torch.Tensor) -> None:
        self.audio = audio


class KPipeline:
    """As kokoro's: a voice that is a text is a path or a name on the Hub, split at its commas."""

    def __init__(
        self, lang_code: str, repo_id: str | None = None, model: Any = True, trf: bool = False,
        en_callable: Any = None, device: str | None = None,
    ) -> None:  # fmt: skip
        if repo_id is None:
            print("WARNING: Defaulting repo_id")
        assert lang_code == "a"
        assert isinstance(model, KModel), "kokoro would download one"

    def __call__(
        self, text: str, voice: Any = None, speed: float = 1, split_pattern: str | None = r"\n+",
        model: Any = None,
    ) -> Any:  # fmt: skip
        assert isinstance(voice, torch.FloatTensor), "kokoro would take it for a name"
        for line in text.split("\n"):
            if any(letter.isalpha() for letter in line):
                yield Piece(torch.full((2400 * len(line.split()),), float(voice.mean())))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    kokoro, spacy = types.ModuleType("kokoro"), types.ModuleType("spacy")
    kokoro.KModel, kokoro.KPipeline = KModel, KPipeline  # type: ignore[attr-defined]
    spacy.util = types.SimpleNamespace(  # type: ignore[attr-defined]
        is_package=lambda name: name == "en_core_web_sm" and not (tmp_path / "no-spacy-model").exists()
    )
    monkeypatch.setitem(sys.modules, "kokoro", kokoro)
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "kokoro-v1_0.pth").touch()
    torch.save(torch.full((510, 1, 256), 0.1), tmp_path / "anna, the first.pt")
    torch.save(torch.full((510, 1, 256), 0.2), tmp_path / "ben")
    return tmp_path


def test_a_conversation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    voices = (folder / "anna, the first.pt", folder / "ben")  # neither name is one that kokoro would read
    speech = speak(Tts(text="(s1) one two\nthree (s2) four", voices=voices), kokoro_voice(folder))
    first, second = speech.tracks
    assert len(first) == len(second) == 4 * 1600  # 24 kHz → 16 kHz
    assert np.allclose(first[200:4600], 0.1, atol=0.01)
    assert np.allclose(second[5000:6200], 0.2, atol=0.01)
    assert not first[4800:].any()
    assert not second[:4800].any()
    assert capsys.readouterr().out == "", "--json has its result there"


@pytest.mark.parametrize(
    ("text", "voice", "words"),
    [
        ("…", "ben", "can be pronounced"),
        ("one", "config.json", "not a voice"),
        ("one", "other.pt", "not a voice"),
    ],
)
def test_what_can_not_be_spoken(folder: Path, text: str, voice: str, words: str) -> None:
    torch.save({"weights": torch.zeros(3)}, folder / "other.pt")
    with pytest.raises(Fault, match=words) as caught:
        kokoro_voice(folder)(text, folder / voice)
    assert caught.value.code == "job.invalid"
    assert caught.value.field.startswith("tts_audio")


def test_nothing_is_downloaded(folder: Path) -> None:
    (folder / "no-spacy-model").touch()
    with pytest.raises(Fault, match="en_core_web_sm") as caught:
        kokoro_voice(folder)
    assert "spacy download" in caught.value.hint
    (folder / "config.json").unlink()
    with pytest.raises(Fault, match=r"config\.json"):
        kokoro_voice(folder)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kokoro", None)
    with pytest.raises(Fault) as caught:
        kokoro_voice(tmp_path)
    assert (caught.value.code, "tts" in caught.value.hint) == ("model.missing", True)
