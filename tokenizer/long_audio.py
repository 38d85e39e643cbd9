"""A recording too long to hold: read from its file block by block, at the rate wanted.

Shapes: s samples of one block, mono, float32 in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import soundfile
import soxr

from .data import AudioError, Utterance, check_recording, open_audio

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
            self.peak = max(self.peak, float(np.abs(samples.mean(axis=1)).max()))
        self.duration_s = n_samples / rate
        check_recording(utterance.name, self.duration_s, finite, self.peak, max_duration_s)

    def blocks(self, speed: float = 1.0) -> Iterator[np.ndarray]:
        """Yields the samples (s,) that follow each other, played `speed` times as fast."""
        stream = None
        for samples, rate in self._read():
            mono = samples.mean(axis=1)
            if stream is None and rate * speed == self.sampling_rate:
                yield mono
                continue
            stream = stream or soxr.ResampleStream(rate * speed, self.sampling_rate, 1, dtype="float32")
            yield stream.resample_chunk(mono)
        if stream is not None:
            yield stream.resample_chunk(np.zeros(0, np.float32), last=True)

    def _read(self) -> Iterator[tuple[np.ndarray, int]]:
        handle = open_audio(self.utterance)
        try:
            with soundfile.SoundFile(handle) as file:
                for samples in file.blocks(round(BLOCK_S * file.samplerate), dtype="float32", always_2d=True):
                    yield samples, file.samplerate
        except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
            name = self.utterance.name
            raise AudioError(
                f"{name}: not audio that libsndfile can read ({error}): convert it to WAV or FLAC"
            ) from None
