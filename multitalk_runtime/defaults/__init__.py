"""An image and an audio file that this project made itself (`tools/make_defaults.py`), for jobs without."""

from pathlib import Path

__all__ = ["AUDIO", "IMAGE"]

IMAGE = Path(__file__).with_name("face.png")
AUDIO = Path(__file__).with_name("speech.flac")
