"""A recording too long to hold: read from its file block by block, at the rate wanted.

Shapes: s samples of one block, mono, float32 in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import soxr

from tokenizer.data.audio import check_recording, opened_audio
from tokenizer.data.pieces import blocks_of
from tokenizer.data.truncation import refuse_short_read
from tokenizer.data.utterances import Utterance

BLOCK_S = 10.0


class LongAudio:
    """One recording, checked as `load_audio` checks it in a first pass over the file; `blocks` passes over it again.

    The blocks put together are what `load_audio` gives.

    Args:
        utterance: the recording.
        sampling_rate: the rate wanted, in Hz.
        max_duration_s: refuse what is longer, in seconds.

    Attributes:
        peak: the largest absolute value of the mono samples, at the file's own rate.
        duration_s: how long it lasts, in seconds.

    Raises:
        AudioError: as `load_audio`.
    """

    def __init__(self, utterance: Utterance, sampling_rate: int, max_duration_s: float | None = None) -> None:
        self.utterance, self.sampling_rate = utterance, sampling_rate
        n_samples, self.peak, finite, rate = 0, 0.0, True, 1
        for samples, rate in self._read():
            n_samples += len(samples)
            if max_duration_s is not None and n_samples > max_duration_s * rate:
                break
            finite = finite and bool(np.isfinite(samples).all())
            self.peak = max(self.peak, float(np.abs(samples).max()))
        self.duration_s = n_samples / rate
        check_recording(utterance.name, self.duration_s, finite, self.peak, max_duration_s)

    def blocks(self, speed: float = 1.0) -> Iterator[np.ndarray]:
        """Yields the samples (s,) that follow each other, played `speed` times as fast."""
        stream = None
        for mono, rate in self._read():
            if stream is None and rate * speed == self.sampling_rate:
                yield mono
                continue
            stream = stream or soxr.ResampleStream(rate * speed, self.sampling_rate, 1, dtype="float32")
            yield stream.resample_chunk(mono)
        if stream is not None:
            yield stream.resample_chunk(np.zeros(0, np.float32), last=True)

    def _read(self) -> Iterator[tuple[np.ndarray, int]]:
        """Blocks of mono samples (s,) and the file's rate."""
        n_read = 0
        with opened_audio(self.utterance, whole=True) as file:
            for mono in blocks_of(file, round(BLOCK_S * file.samplerate)):
                n_read += len(mono)
                yield mono, file.samplerate
            refuse_short_read(self.utterance.name, file, n_read)


def check_readable(utterance: Utterance, max_duration_s: float | None = None) -> None:
    """Reads a recording whole, as `LongAudio` does; raises its AudioError where that cannot use it."""
    LongAudio(utterance, 16_000, max_duration_s)  # at any rate: nothing is resampled by this
