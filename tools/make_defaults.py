"""Make the built-in inputs anew: a drawn face, and a voice-like sound from formants.

    .venv/bin/python tools/make_defaults.py [FOLDER]

Both come from this script alone, so no one else has rights in them. The same script writes the same pixels
and samples. The default folder is multitalk_runtime/defaults.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image, ImageDraw, ImageFilter
from scipy.signal import lfilter

SIZE = 640
SCALE = 2  # drawn larger, then reduced: smooth edges
RATE = 16_000
# Vowels as the first three formants in Hz (rounded textbook values of an adult voice).
VOWELS = {"a": (750, 1200, 2500), "e": (480, 1900, 2550), "i": (300, 2250, 3000), "o": (480, 850, 2450),
          "u": (320, 750, 2300)}  # fmt: skip
SYLLABLES = list("aeiouaoeaiueoa")
SECONDS = 4.0


def face() -> Image.Image:
    """A person from the shoulders up, 640 × 640, in a few soft colours."""
    picture = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE), (176, 196, 210))
    draw = ImageDraw.Draw(picture)

    def ellipse(x: float, y: float, rx: float, ry: float, colour: tuple[int, int, int]) -> None:
        box = [v * SIZE * SCALE for v in (x - rx, y - ry, x + rx, y + ry)]
        draw.ellipse(box, fill=colour)

    skin, shade, hair, shirt = (224, 176, 148), (198, 148, 122), (72, 52, 44), (62, 92, 130)
    ellipse(0.5, 1.08, 0.42, 0.30, shirt)
    ellipse(0.5, 0.80, 0.10, 0.12, shade)
    ellipse(0.5, 0.36, 0.235, 0.27, hair)
    ellipse(0.5, 0.45, 0.19, 0.26, skin)
    for side in (-1, 1):
        ellipse(0.5 + side * 0.195, 0.46, 0.03, 0.05, skin)
        ellipse(0.5 + side * 0.08, 0.355, 0.045, 0.010, hair)
        ellipse(0.5 + side * 0.08, 0.41, 0.036, 0.020, (250, 250, 248))
        ellipse(0.5 + side * 0.08, 0.41, 0.017, 0.018, (86, 110, 96))
        ellipse(0.5 + side * 0.08, 0.41, 0.008, 0.009, (20, 20, 24))
        ellipse(0.5 + side * 0.10, 0.53, 0.035, 0.022, (228, 164, 142))
    ellipse(0.5, 0.50, 0.020, 0.040, shade)
    ellipse(0.5, 0.49, 0.014, 0.042, skin)
    ellipse(0.5, 0.60, 0.070, 0.022, (176, 92, 90))
    ellipse(0.5, 0.60, 0.052, 0.008, (96, 40, 44))
    soft = picture.filter(ImageFilter.GaussianBlur(SCALE))
    return soft.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def speech() -> np.ndarray:
    """Syllables of a pulse train through three resonances each, with pauses: [n] float, 16 kHz."""
    length = int(SECONDS * RATE / len(SYLLABLES))
    parts = [_syllable(VOWELS[name], length, 110 + 25 * np.sin(i)) for i, name in enumerate(SYLLABLES)]
    sound = np.concatenate(parts)
    return 0.5 * sound / np.abs(sound).max()


def _syllable(formants: tuple[int, ...], length: int, pitch: float) -> np.ndarray:
    t = np.arange(length) / RATE
    phase = np.cumsum(pitch * (1 + 0.08 * np.sin(2 * np.pi * 5 * t))) / RATE
    voice = np.diff(np.floor(phase), prepend=0.0)  # one pulse a period
    for frequency in formants:
        radius = np.exp(-np.pi * 90 / RATE)  # a bandwidth of 90 Hz
        voice = lfilter([1.0], [1.0, -2 * radius * np.cos(2 * np.pi * frequency / RATE), radius**2], voice)
    loudness = np.clip(np.minimum(t / 0.04, (t[-1] - t) / 0.06), 0, 1)
    return voice / np.abs(voice).max() * loudness


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("multitalk_runtime/defaults")
    folder.mkdir(parents=True, exist_ok=True)
    face().quantize(96).save(folder / "face.png", optimize=True)
    soundfile.write(folder / "speech.flac", speech(), RATE, subtype="PCM_16")


if __name__ == "__main__":
    main()
