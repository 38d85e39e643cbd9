"""Waveform helpers shared by the judges and the quality measures.

Shapes: S samples of one mono waveform.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import soxr

__all__ = ["cut_blocks", "length_batches", "level_db", "levelled", "resample", "split_at_quiet"]

_SILENT_RMS = 1e-5  # -100 dB: below the rounding of 16-bit audio


def resample(audio: np.ndarray, source_hz: int, target_hz: int) -> np.ndarray:
    """Resample a waveform (S,) with soxr's high quality setting; float32 out."""
    if source_hz == target_hz:
        return np.asarray(audio, dtype=np.float32)
    return soxr.resample(np.asarray(audio, dtype=np.float32), source_hz, target_hz).astype(np.float32)


def level_db(audio: np.ndarray) -> float | None:
    """RMS level of a waveform (S,) in dB, a full-scale square wave being 0; None where it is silent."""
    rms = float(np.sqrt(np.mean(np.square(audio, dtype=np.float64))))
    return 20 * np.log10(rms) if rms > _SILENT_RMS else None


def levelled(audio: np.ndarray, target_db: float, quiet_db: float = 60.0) -> np.ndarray:
    """A waveform (S,) at a level, without its quiet ends: models that judge a voice must judge neither of the two.

    Args:
        audio: not silent.
        target_db: RMS level of what is returned, in dB.
        quiet_db: both ends are cut as far as they lie so far below the peak, in dB.

    Returns:
        The waveform (S',) in float32.
    """
    audio = np.asarray(audio, dtype=np.float32)
    loud = np.flatnonzero(np.abs(audio) > np.abs(audio).max() * 10 ** (-quiet_db / 20))
    audio = audio[loud[0] : loud[-1] + 1]
    rms = np.sqrt(np.mean(np.square(audio, dtype=np.float64)))
    return (audio * (10 ** (target_db / 20) / rms)).astype(np.float32)


def split_at_quiet(audio: np.ndarray, sampling_rate: int, window_s: float) -> list[np.ndarray]:
    """Cut a waveform (S,) into pieces of at most ``window_s`` seconds, in silences rather than in words.

    A piece ends at the quietest 60 ms of the last third of its window. The pieces put together are the input.
    """
    return list(cut_blocks([audio], sampling_rate, window_s))


def cut_blocks(
    blocks: Iterable[np.ndarray],
    sampling_rate: int,
    window_s: float,
    share: int = 3,
    quiet_s: float = 0.06,
) -> Iterator[np.ndarray]:
    """Cut what comes in blocks as ``split_at_quiet`` cuts the whole, holding no more than a window and a block.

    Args:
        blocks: waveforms (s,) that follow each other, of any sizes.
        sampling_rate: Hz.
        window_s: no piece is longer, in seconds.
        share: the cut lies in the last 1 / ``share`` of the window, 2 or more; what is left at the end may be short.
        quiet_s: a piece ends in the middle of the quietest stretch of so many seconds.

    Yields:
        Pieces (s',), none empty; put together they are the input.

    Raises:
        ValueError: ``window_s`` is shorter than one sample.
    """
    window = int(window_s * sampling_rate)
    if window < 1:
        raise ValueError(f"window_s = {window_s} is shorter than one sample at {sampling_rate} Hz")
    smooth = max(1, int(quiet_s * sampling_rate))
    first = max(1, min(window - smooth, (share - 1) * window // share))
    held = np.zeros(0, dtype=np.float32)
    for block in blocks:
        held = np.concatenate([held, block]) if len(held) else block
        while len(held) > window:
            power = np.square(held[first:window], dtype=np.float64)
            width = min(smooth, len(power))
            sums = np.cumsum(np.concatenate([[0.0], power]))
            quietest = int(np.argmin(sums[width:] - sums[:-width]))
            cut = first + quietest + width // 2
            yield held[:cut]
            held = held[cut:]
    if len(held):
        yield held


def length_batches(lengths: Sequence[float], most: float, count: int | None = None) -> list[list[int]]:
    """Deal clips out to batches by length, so that a long one does not pad all the others.

    Args:
        lengths: of each clip, in any unit.
        most: length of a batch with its padding; a clip longer than that is alone in its batch.
        count: clips in a batch at most; None: any number.

    Returns:
        Positions in ``lengths``, shortest clips first; no clip of a batch is longer than twice another.
    """
    batches: list[list[int]] = []
    for position in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        length, last = lengths[position], batches[-1] if batches else []
        fits = last and (len(last) + 1) * length <= most and length <= 2 * lengths[last[0]]
        if fits and (count is None or len(last) < count):
            last.append(position)
        else:
            batches.append([position])
    return batches
