"""Short runs of a tiny model that differ in one thing each: what must show in the frames, what must not."""

from __future__ import annotations

from generation import FPS, Size, Studio, Wrong, look_at_frames

# Largest mean difference of equal frames, in [-1, 1]. A GPU may add up in another order from run to run: a
# tenth of what another attention kernel makes of the same numbers in bf16 (0.004 on the CPU's tier).
SAME = {"cpu": 1e-4, "cuda": 4e-4}


def difference(first, second) -> float:
    """Mean absolute difference of two videos' frames; infinite if they have different shapes."""
    if first.shape != second.shape:
        return float("inf")
    return (first - second).abs().mean().item()


class Comparison:
    """Runs of one studio, each against the first. `measured` has every difference by name."""

    def __init__(self, studio: Studio, size: Size) -> None:
        import numpy
        import torch

        self.studio, self.size, self.torch, self.numpy = studio, size, torch, numpy
        self.measured: dict = {}
        self.notes: list = []

    def all(self, must: tuple[str, ...]) -> None:
        """Raises Wrong at the first that is not as it must be. `must`: attention backends that must run."""
        from multitalk_runtime.audio import decode_audio

        generator, numpy = self.studio.generator, self.numpy
        # one clip's worth of sound and a little more: what is heard later would not show in the frames
        need = (self.size.frames + 8) * 16_000 // FPS
        start = 16_000 // 2  # the built-in voice begins softly
        voice = decode_audio(self.studio.audio)[start : start + max(need, 8000)]
        time_axis = numpy.arange(len(voice), dtype=numpy.float32) / 16_000
        chirp = (0.4 * numpy.sin(2 * numpy.pi * (150 + 900 * time_axis) * time_axis)).astype(numpy.float32)
        heard, other, silence = (generator.embed(t) for t in (voice, chirp, numpy.zeros_like(voice)))
        self.again = lambda **changes: self.run(voice, (heard,), **changes)
        self.first = self.again()
        look_at_frames(self.first, self.size.frames)
        self.same("same_seed", self.again(), "runs are not repeatable: something is not seeded")
        self.other("other_seed", self.again(seed=8), "the seed does not reach the noise")
        self.other("other_audio", self.run(chirp, (other,)), "the sound does not reach the frames")
        self.audio_free(voice, heard, silence)
        self.two_speakers(voice, chirp, heard, other)
        self.backends(voice, heard, must)
        self.streaming(voice, heard)

    def run(self, samples, speech, **changes: object):
        """One run of the comparisons' size."""
        changes = {"frame_num": self.size.frames, "sample_steps": self.size.steps, **changes}
        tracks = changes.pop("tracks", (samples,))
        return self.studio.run(tracks=tracks, speech=speech, normalise=False, **changes)

    def audio_free(self, voice, heard, silence) -> None:
        """Zeroed embeddings are the pass without audio; a silent track is a sound like others."""
        zeroed = self.run(voice, (self.torch.zeros_like(heard),))
        without = self.run(voice, (heard,), audio_guide_scale=0.0)  # follows the pass without audio alone
        self.same(
            "zeroed_audio_to_audio_free", zeroed, "zeros are not what the pass without audio sees", without
        )
        self.other("zeroed_audio", zeroed, "the frames don't depend on the sound")
        silent = self.run(voice, (silence,))
        self.other("silent_track", silent, "silence looks like speech")
        self.other(
            "silent_track_to_audio_free", silent, "a silent track is taken for no track at all", zeroed
        )

    def two_speakers(self, voice, chirp, heard, other) -> None:
        """Each speaker has a half of the picture; who speaks where shows."""
        from PIL import Image

        with Image.open(self.studio.image) as image:
            width, height = image.size
        left, right = (0, 0, height, width // 2), (0, width // 2, height, width)
        pair = {"tracks": (voice, chirp)}
        box = {"person1": left, "person2": right}
        two = self.run(None, (heard, other), bbox=box, **pair)
        look_at_frames(two, self.size.frames)
        swapped = self.run(None, (heard, other), bbox={"person1": right, "person2": left}, **pair)
        self.other("swapped_speakers", swapped, "the speakers' masks have no effect", two)

    def backends(self, voice, heard, must: tuple[str, ...]) -> None:
        """Every attention backend that is here gives the same frames, up to the order of its sums."""
        from wan.attention_backends import LOSSY, NAMES, AttentionBackendError

        allowed = 0.25 * min(self.measured["other_seed"], self.measured["other_audio"])
        ran = []
        for name in NAMES:
            if name in LOSSY or name == "auto" or (name == "sdpa" and self.studio.device == "cpu"):
                continue  # the default, which is `sdpa` on a CPU, made the frames to compare with
            if self.studio.device == "cpu" and name in ("xformers", "flash_attn"):
                self.notes.append(f"{name}: for GPUs alone")
                continue
            try:
                frames = self.run(voice, (heard,), attention=name)
            except Exception as error:
                if name in must or not _unavailable(error, AttentionBackendError):
                    raise Wrong(
                        f"attention backend {name} does not run: {type(error).__name__}: {error}"[:300],
                        "the backend is installed and broken, or the image lacks it",
                    ) from error
                self.notes.append(f"{name}: {error}"[:200])
                continue
            ran.append(name)
            self.same(
                f"attention_{name}",
                frames,
                f"the attention backend {name} computes something else",
                at_most=allowed,
            )
        self.measured["attention_allowed"] = allowed
        self.ran = ran

    def streaming(self, voice, heard) -> None:
        """Clips joined: more frames than a clip has, and the seam is like the rest."""
        frames = self.size.frames
        overlap = 1 if frames < 9 else 5
        made = self.studio.run(
            tracks=(self.numpy.concatenate([voice, voice]),),
            speech=(self.torch.cat([heard, heard]),),
            normalise=False,
            mode="streaming",
            frame_num=frames,
            motion_frame=overlap,
            sample_steps=self.size.steps,
            max_frames=2 * frames - overlap,
        )
        if self.studio.result.clips < 2:
            msg = f"streaming made {self.studio.result.clips} clip"
            raise Wrong(msg, "streaming does not stream")
        look_at_frames(made, self.studio.result.frames)
        if made.shape[1] <= frames:
            msg = f"two clips of {frames} frames became {made.shape[1]}"
            raise Wrong(msg, "clips replace each other")
        self.measured["streaming_frames"] = int(made.shape[1])
        self.measured["streaming_clips"] = self.studio.result.clips

    def same(self, name: str, frames, diagnosis: str, to=None, *, at_most: float | None = None) -> None:
        """Raises Wrong unless they differ by no more than rounding."""
        at_most = SAME[self.studio.device] if at_most is None else at_most
        self.measured[name] = found = difference(frames, self.first if to is None else to)
        if not found <= at_most:
            msg = f"{_words(name)}: frames differ by {found:.3g} on average, {at_most:.2g} is allowed"
            raise Wrong(
                msg,
                diagnosis,
            )

    def other(self, name: str, frames, diagnosis: str, to=None) -> None:
        """Raises Wrong unless they differ visibly."""
        self.measured[name] = found = difference(frames, self.first if to is None else to)
        if not 10 * SAME[self.studio.device] < found < float("inf"):
            msg = f"{_words(name)}: frames differ by only {found:.3g} on average"
            raise Wrong(msg, diagnosis)


def _unavailable(error: BaseException, kind: type) -> bool:
    """Whether a backend says that it is not for this place: in its own words, or wrapped in a fault."""
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__cause__
    return False


def _words(name: str) -> str:
    return name.replace("_", " ")
