"""Waveform helpers shared by the judges and the quality measures.

Shapes: S samples of one mono waveform.
"""

from __future__ import annotations

import numpy as np
import soxr

__all__ = ["resample", "split_at_quiet"]


def resample(audio: np.ndarray, source_hz: int, target_hz: int) -> np.ndarray:
    """Resample a waveform (S,) with soxr's high quality setting; float32 out."""
    if source_hz == target_hz:
        return np.asarray(audio, dtype=np.float32)
    return soxr.resample(np.asarray(audio, dtype=np.float32), source_hz, target_hz).astype(np.float32)


def split_at_quiet(audio: np.ndarray, sampling_rate: int, window_s: float) -> list[np.ndarray]:
    """Cut a waveform (S,) into pieces of at most ``window_s`` seconds, in silences rather than in words.

    A piece ends at the quietest 60 ms of the last third of its window. The pieces put together are the input.
    """
    window = int(window_s * sampling_rate)
    if window < 1:
        raise ValueError(f"window_s = {window_s} is shorter than one sample at {sampling_rate} Hz")
    smooth = max(1, int(0.06 * sampling_rate))
    pieces: list[np.ndarray] = []
    while len(audio) > window:
        first = max(1, min(window - smooth, 2 * window // 3))
        power = np.square(audio[first:window], dtype=np.float64)
        width = min(smooth, len(power))
        sums = np.cumsum(np.concatenate([[0.0], power]))
        quietest = int(np.argmin(sums[width:] - sums[:-width]))
        cut = first + quietest + width // 2
        pieces.append(audio[:cut])
        audio = audio[cut:]
    return [*pieces, audio]
