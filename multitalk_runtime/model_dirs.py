"""Where the three models lie: the folders of Wan2.1, MultiTalk and wav2vec2, named as they are published."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multitalk_runtime.settings import Settings

__all__ = ["MULTITALK", "WAN", "WAV2VEC", "ModelDirs"]

WAN = "Wan2.1-I2V-14B-480P"
MULTITALK = "MeiGen-MultiTalk"
WAV2VEC = "chinese-wav2vec2-base"
AUDIO_WEIGHTS = "multitalk.safetensors"


@dataclass(frozen=True, kw_only=True)
class ModelDirs:
    """The folders of the three models. They are only read, so they may lie on a read-only volume."""

    wan: Path
    multitalk: Path
    wav2vec: Path

    @classmethod
    def under(cls, root: Path) -> ModelDirs:
        """The published folders under `root`, or `root` itself if `mtmodels convert` wrote it."""
        if (root / "config.json").is_file() and not (root / WAN).exists():
            return cls(wan=root, multitalk=root, wav2vec=root / WAV2VEC)
        return cls(wan=root / WAN, multitalk=root / MULTITALK, wav2vec=root / WAV2VEC)

    @classmethod
    def from_settings(cls, settings: Settings) -> ModelDirs:
        """`MODEL_PATH`, with the folders that are set one by one."""
        found = cls.under(settings.model_path)
        return cls(
            wan=settings.wan_dir or found.wan,
            multitalk=settings.multitalk_dir or found.multitalk,
            wav2vec=settings.wav2vec_dir or found.wav2vec,
        )

    @property
    def merged(self) -> bool:
        """Whether Wan's folder holds the audio weights too: copied or linked there, or converted."""
        if self.wan == self.multitalk or (self.wan / AUDIO_WEIGHTS).exists():
            return True
        return (self.wan / "wan-convert.json").is_file()

    @property
    def audio(self) -> Path | None:
        """The folder of the audio weights, if the pipeline has to be told of it."""
        return None if self.merged else self.multitalk
