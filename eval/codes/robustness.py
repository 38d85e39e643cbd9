"""Whether the codes of a recording stay the same when the recording changes a little: what is changed, what is counted.

Shapes: S samples of one mono waveform, K books, F frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

__all__ = ["Agreement", "Change", "agreement", "standard_changes"]


@dataclass(frozen=True)
class Change:
    """A small change of a waveform (S,) -> (S',), made from its own random numbers; `name` as tables have it."""

    name: str
    function: Callable[[np.ndarray, np.random.Generator], np.ndarray]

    def apply(self, audio: np.ndarray, seed: int = 0) -> np.ndarray:
        """The changed waveform in float32; the same for the same seed."""
        return self.function(audio, np.random.default_rng(seed)).astype(np.float32)


@dataclass(frozen=True)
class Agreement:
    """Share of frames whose code is the same, by book, over recordings that have `n_frames` together."""

    change: str
    by_book: list[float]
    n_frames: int
    n_scored: int


def with_noise(snr_db: float) -> Change:
    """White Gaussian noise, so many dB below the whole recording's power."""

    def noisy(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        power = np.mean(np.square(audio, dtype=np.float64))
        return audio + rng.normal(0.0, math.sqrt(power * 10 ** (-snr_db / 10)), len(audio))

    return Change(f"noise, {snr_db:g} dB SNR", noisy)


def with_gain(gain_db: float) -> Change:
    """Another level; samples beyond full scale are left so."""
    return Change(f"gain {gain_db:+g} dB", lambda audio, _: audio * 10 ** (gain_db / 20))


def delayed(n_samples: int, name: str) -> Change:
    """So many samples of silence in front: frame k is still compared with frame k."""
    return Change(name, lambda audio, _: np.concatenate([np.zeros(n_samples), audio]))


def standard_changes(hop_length: int) -> list[Change]:
    """Noise at 20 dB, gain of 6 dB up and down, delays of one sample to half a frame of `hop_length` samples."""
    delays = {"1 sample": 1, "1/8 frame": hop_length // 8, "1/4 frame": hop_length // 4, "1/2 frame": hop_length // 2}
    changes = [with_noise(20.0), with_gain(6.0), with_gain(-6.0)]
    return changes + [delayed(n, f"shift, {name}") for name, n in delays.items() if n]


def agreement(name: str, pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> Agreement:
    """In how many frames two encodings of the same recordings agree.

    Args:
        name: of what was changed.
        pairs: codes (K, F) and (K, F') of each recording; the frames that both have are compared.

    Raises:
        ValueError: the numbers of books differ, or no frame is in both.
    """
    same: np.ndarray | int = 0
    n_frames = n_scored = 0
    for before, after in pairs:
        if before.ndim != 2 or after.ndim != 2 or len(before) != len(after):
            raise ValueError(f"codes of shapes {before.shape} and {after.shape} do not have the same books")
        common = min(before.shape[1], after.shape[1])
        same = same + (before[:, :common] == after[:, :common]).sum(axis=1)
        n_frames, n_scored = n_frames + common, n_scored + 1
    if not n_frames:
        raise ValueError(f"{name}: no frame to compare")
    return Agreement(name, [float(share) for share in same / n_frames], n_frames, n_scored)
