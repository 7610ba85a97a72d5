"""Loudness, mixing and windows against the reference."""

from __future__ import annotations

import goldens
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wan.audio import audio_windows, extend_reversed, loudness_norm, mix, video_frames

GATE = 1e-5
NAME = "audio_prep"


def tone(seconds: float, hertz: float, amplitude: float) -> np.ndarray:
    t = np.arange(int(16_000 * seconds)) / 16_000
    return (amplitude * np.sin(2 * np.pi * hertz * t)).astype(np.float32)


A, B = tone(1.5, 300, 0.1), tone(0.9, 500, 0.5)


def test_loudness(measured) -> None:
    z, entry = goldens.load(NAME), goldens.index(NAME)
    assert goldens.error(torch.from_numpy(A[:8000]), z["a"]) < 1e-6
    a, b = loudness_norm(A), loudness_norm(B)
    measured(NAME, "a", goldens.error(torch.from_numpy(a[:8000]), z["norm_a_first8000"]), GATE)
    measured(NAME, "b", goldens.error(torch.from_numpy(b[:8000]), z["norm_b"]), GATE)
    for samples, normed, key in ((A, a, "gain_a"), (B, b, "gain_b")):
        gain = np.abs(normed).max() / np.abs(samples).max()
        measured(NAME, key, abs(gain / entry[key] - 1), GATE)
    assert np.array_equal(loudness_norm(np.zeros(8000, np.float32)), np.zeros(8000))


@pytest.mark.parametrize(
    ("what", "first", "second", "kind"),
    [
        ("add_a_b", "a", "b", "add"),
        ("para_a_a", "a", "a", "para"),
        ("para_None_b", None, "b", "para"),
        ("add_a_None", "a", None, "add"),
    ],
)
def test_mix(what: str, first: str | None, second: str | None, kind: str, measured) -> None:
    z = goldens.load(NAME)
    sounds = {"a": loudness_norm(A), "b": loudness_norm(B), None: None}
    tracks = mix(sounds[first], sounds[second], kind)
    got = (tracks.person1, tracks.person2, tracks.mixed)
    assert [len(t) for t in got] == z[f"{what}_lens"].tolist()
    sums = torch.tensor([float(np.abs(t.astype(np.float64)).sum()) for t in got])
    measured(NAME, f"{what} sums", goldens.error(sums, z[f"{what}_sums"]), GATE)


def test_unequal_parallel_tracks_are_padded_with_silence() -> None:
    tracks = mix(np.ones(3), np.ones(5), "para")
    assert tracks.person1.tolist() == [1, 1, 1, 0, 0]
    assert tracks.mixed.tolist() == [2, 2, 2, 1, 1]


def test_wrong_input_says_what() -> None:
    with pytest.raises(ValueError, match="both speakers are silent"):
        mix(None, None, "para")
    with pytest.raises(ValueError, match="neither 'para'"):
        mix(A, B, "both")
    with pytest.raises(ValueError, match=r"0\.4 s"):
        loudness_norm(A[:100])
    with pytest.raises(ValueError, match="not finite"):
        loudness_norm(np.full(16_000, np.nan))


@given(st.integers(1, 30), st.integers(0, 40), st.integers(1, 12))
def test_windows(rows: int, start: int, frames: int) -> None:
    embedding = torch.arange(rows).float()[:, None, None]
    got = audio_windows([embedding], start, frames)
    assert got.shape == (1, frames, 5, 1, 1)
    for i in range(frames):
        want = [min(max(start + i + o, 0), rows - 1) for o in (-2, -1, 0, 1, 2)]
        assert got[0, i].flatten().tolist() == want


def test_speech_embedding(measured) -> None:
    """Through the network, one row a video frame; the level of the samples is left as it is."""
    from wan.audio import speech_embedding
    from wan.modules.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model

    z, entry = goldens.load("wav2vec2"), goldens.index("wav2vec2")
    model = goldens.fill(Wav2Vec2Model(Wav2Vec2Config.from_dict(goldens.config("wav2vec2"))), "wav2vec2")
    assert video_frames(len(z["wav"])) == entry["seq_len"]
    got = speech_embedding(model, z["wav"].numpy())
    measured("wav2vec2", "speech_embedding", goldens.error(got, z["audio_embedding"]), GATE)


def test_reversed_extension_and_frames() -> None:
    assert extend_reversed(torch.tensor([1, 2, 3, 4]), 2).tolist() == [1, 2, 3, 4, 4, 3]
    assert extend_reversed(torch.tensor([1, 2]), 0).tolist() == [1, 2]
    assert video_frames(16_000) == 25
    assert video_frames(15_999) == 24
