"""Any piece of a recording, at the rate wanted, without decoding the rest; and a list of recordings to take them from.

Shapes: S samples of a piece, N frames of the file (one sample of each channel); float32 as the file has it, mono.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import soundfile
import soxr

from tokenizer.data.audio import SILENCE_PEAK, check_recording, opened_audio, to_mono
from tokenizer.data.truncation import refuse_short_read
from tokenizer.data.utterances import AudioError, Utterance

logger = logging.getLogger(__name__)

# Of the number of samples at the rate wanted: where a piece begins and ends.
Part = Callable[[int], tuple[int, int]]

SHORT_S = 60.0  # only shorter recordings are ever decoded whole
BLOCK_FRAMES = 1 << 18
# A resampled piece equals the same part of the whole within 1e-6 of full scale with so many samples of the lower of
# the two rates around it (160 were enough at every pair of rates tried), and within 1e-4 where the two rates have no
# common divisor.
CONTEXT_SAMPLES = 400
# What an MP3 decoder gives depends on up to 511 bytes before (half a second at 8 kbit/s), an Opus decoder's on its
# state. After so much of a run-up an MP3's pieces equal the whole within 2e-7. An Opus file's are the very same
# but for one in some dozens, which differs by up to 2e-3 for some milliseconds.
RUN_UP_S = 1.0
WITH_STATE = ("MP3", "OGG")
REMEMBERED = 1 << 16


class Recording:
    """One recording, of which `piece` decodes what is asked for and a little around it.

    Args:
        utterance: the recording.
        sampling_rate: the rate wanted, in Hz.

    Attributes:
        n_samples: how many it has at that rate; as many as `load_audio` gives.

    Raises:
        AudioError: as `load_audio`, but that it is silent shows when a silent piece is read, and that its middle
            cannot be decoded when a piece there is.
    """

    __slots__ = ("_kept", "_keepable", "_sounds", "n_frames", "rate", "sampling_rate", "utterance")

    def __init__(self, utterance: Utterance, sampling_rate: int) -> None:
        self.utterance, self.sampling_rate = utterance, sampling_rate
        self._kept: np.ndarray | None = None
        self._keepable, self._sounds = True, False
        self._survey()

    @property
    def n_samples(self) -> int:
        return (2 * self.n_frames * self.sampling_rate + self.rate) // (2 * self.rate)  # rounded as soxr rounds

    def piece(self, start: int, stop: int) -> np.ndarray:
        """The samples (S,) from `start` up to `stop`, counted at the rate wanted; fewer where the recording ends.

        Raises:
            AudioError: they cannot be decoded or are not finite, or the whole recording is silent.
        """
        stop = min(stop, self.n_samples)
        if self.rate == self.sampling_rate:
            return self._checked(start, stop)
        # soxr puts sample 0 of what it makes on sample 0 of what it is given: both must fall together in the whole too.
        common = math.gcd(self.rate, self.sampling_rate)
        period, new_period = self.rate // common, self.sampling_rate // common
        context = math.ceil(CONTEXT_SAMPLES * self.rate / min(self.rate, self.sampling_rate))
        first = max(0, start * self.rate // self.sampling_rate - context) // period
        last = min(self.n_frames, -(-stop * self.rate // self.sampling_rate) + context)
        samples = soxr.resample(self._checked(first * period, last), self.rate, self.sampling_rate)
        offset = first * new_period
        return np.ascontiguousarray(samples[start - offset : stop - offset])

    def keep(self, n_bytes: int) -> int:
        """Holds the decoded samples of a short recording in memory if they fit into `n_bytes`; how many they take.

        Nothing is rounded: where 16 bits give the very samples, they are held as such, else as float32.
        """
        if self._kept is not None or not self._keepable or 2 * self.n_frames > n_bytes:
            return 0
        if self.n_frames > SHORT_S * self.rate:
            self._keepable = False
            return 0
        try:
            samples = self._decode(0, self.n_frames)
        except AudioError:  # a fault somewhere: what can be read of it is read piece by piece
            self._keepable = False
            return 0
        as_16 = np.rint(np.clip(np.nan_to_num(samples), -1, 1 - 2**-15) * 32768).astype(np.int16)
        kept = as_16 if np.array_equal(as_16 / np.float32(32768), samples) else samples
        self._keepable = kept.nbytes <= n_bytes
        if not self._keepable:
            return 0
        self._kept = kept
        return kept.nbytes

    @property
    def kept(self) -> bool:
        return self._kept is not None

    def _survey(self) -> None:
        """Finds rate and number of frames. A file whose header cannot be relied on is gone through once, in blocks."""
        with opened_audio(self.utterance, whole=True) as file:
            self.rate, self.n_frames = file.samplerate, file.frames
            finite, peak = True, math.inf
            if file.subtype in ("FLOAT", "DOUBLE") or not _reaches_its_end(file):
                self.n_frames, finite, peak = _go_through(file)
                refuse_short_read(self.utterance.name, file, self.n_frames)
        check_recording(self.utterance.name, self.n_frames / self.rate, finite, peak, None)

    def _checked(self, first: int, last: int) -> np.ndarray:
        samples = self._decode(first, last)
        low, high = float(samples.min(initial=0.0)), float(samples.max(initial=0.0))
        finite, peak = math.isfinite(low) and math.isfinite(high), max(high, -low)
        if finite and peak < SILENCE_PEAK and not self._sounds:
            with opened_audio(self.utterance) as file:
                _, _, peak = _go_through(file, until=SILENCE_PEAK)
        check_recording(self.utterance.name, self.n_frames / self.rate, finite, peak, None)
        self._sounds = True
        return samples

    def _decode(self, first: int, last: int) -> np.ndarray:
        """Frames `first` up to `last`, mono (N,)."""
        if self._kept is not None:
            kept = self._kept[first:last]
            return kept / np.float32(32768) if kept.dtype == np.int16 else kept.copy()
        with opened_audio(self.utterance) as file:
            if not file.seekable():
                _pass_over(file, first)
            short = self.n_frames <= SHORT_S * self.rate  # then from the start, so that it is the same as what is kept
            mono = decoded(file, first, last, first if short else round(RUN_UP_S * self.rate))
        if len(mono) < last - first:
            raise AudioError(
                f"{self.utterance.name}: damaged about {(first + len(mono)) / self.rate:.1f} s: copy it again"
            )
        return mono


def decoded(file: soundfile.SoundFile, first: int, last: int, run_up: int) -> np.ndarray:
    """Frames `first` up to `last` of an open file, mono (N,), fewer where it ends; as in one go from its start.

    Args:
        file: where it cannot seek, the pieces asked for must follow each other.
        first: of the frames.
        last: the one behind them.
        run_up: how many frames before them to decode where what a decoder gives depends on what it read before.
    """
    if not file.seekable():
        return _mono_of(file, last - first)
    begin = max(0, first - run_up) if file.format in WITH_STATE else first
    # All in one read: soundfile seeks to where it is after each, and that alone makes an MP3 decoder forget its state.
    if file.tell() != begin:
        file.seek(begin)
    return _mono_of(file, last - begin)[first - begin :]


def _pass_over(file: soundfile.SoundFile, n_frames: int) -> None:
    while n_frames and (found := len(file.read(min(BLOCK_FRAMES, n_frames), dtype="float32"))):
        n_frames -= found


def _mono_of(file: soundfile.SoundFile, n_frames: int) -> np.ndarray:
    return to_mono(file.read(n_frames, dtype="float32", always_2d=True))


def blocks_of(file: soundfile.SoundFile, n_frames: int) -> Iterator[np.ndarray]:
    """All of an open file from its start, in mono blocks (N,) of `n_frames`."""
    for first in range(0, file.frames, n_frames):
        mono = decoded(file, first, min(first + n_frames, file.frames), round(RUN_UP_S * file.samplerate))
        if len(mono):
            yield mono


def _reaches_its_end(file: soundfile.SoundFile) -> bool:
    """Whether a file has all the frames that its header says; a truncated one has not."""
    if not file.frames:
        return True
    if not file.seekable():
        return False
    file.seek(file.frames - 1)
    return len(file.read(1, dtype="float32")) == 1


def _go_through(file: soundfile.SoundFile, until: float = math.inf) -> tuple[int, bool, float]:
    """Number of frames, whether all are finite, and the peak of the mono samples; or of those up to a peak `until`."""
    n_frames, finite, peak = 0, True, 0.0
    for mono in blocks_of(file, BLOCK_FRAMES):
        n_frames += len(mono)
        finite = finite and bool(np.isfinite(mono).all())
        peak = max(peak, float(np.abs(mono).max()))
        if peak >= until:
            break
    return n_frames, finite, peak


class AudioStore:
    """A list of recordings. Short ones are decoded once and kept in memory up to a bound, of others only pieces are.

    What is kept gives the very samples that the file gives, so that nothing depends on what a process has kept. It
    takes 2 bytes for each sample of a 16-bit mono file at the file's own rate, 4 of others; resampling is done for each
    piece.

    An unreadable recording is reported once and replaced by the next readable one, so that one bad file among
    thousands does not end a training; `n_failed` counts them.
    """

    def __init__(self, utterances: Iterable[Utterance], sampling_rate: int, cache_bytes: int = 2 << 30) -> None:
        self.utterances = list(utterances)
        self.sampling_rate = sampling_rate
        self.cache_bytes = cache_bytes
        self._recordings: dict[int, Recording] = {}
        self._kept_bytes = 0
        self._failed: set[int] = set()  # as a whole
        self._damaged: set[int] = set()  # somewhere: another piece may be sound

    def __getstate__(self) -> dict[str, Any]:
        """For a loader's worker that is started anew: it keeps its own, instead of being sent gigabytes of samples."""
        return self.__dict__ | {"_recordings": {}, "_kept_bytes": 0}

    def __len__(self) -> int:
        return len(self.utterances)

    @property
    def n_failed(self) -> int:
        return len(self._failed | self._damaged)

    def readable(self, index: int, part: Part = lambda n_samples: (0, n_samples)) -> tuple[Utterance, np.ndarray]:
        """The utterance at `index` and the part asked for of its waveform (S,), or the next one's that can be read.

        Raises:
            AudioError: if none can.
        """
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            if candidate in self._failed:
                continue
            try:
                recording = self._recording(candidate)
            except AudioError as error:
                self._failed.add(candidate)
                logger.warning("left out: %s", error)
                continue
            try:
                return self.utterances[candidate], recording.piece(*part(recording.n_samples))
            except AudioError as error:
                # Not remembered as failed: which pieces are used must not depend on which were tried before.
                if candidate not in self._damaged:
                    self._damaged.add(candidate)
                    logger.warning("left out: %s", error)
        raise AudioError(f"none of the {len(self)} recordings can be read; the warnings above say why")

    def _recording(self, index: int) -> Recording:
        if (recording := self._recordings.get(index)) is None:
            recording = Recording(self.utterances[index], self.sampling_rate)
            if len(self._recordings) >= REMEMBERED:  # what is forgotten is found again, with the same result
                self._recordings = {i: known for i, known in self._recordings.items() if known.kept}
            self._recordings[index] = recording
        self._kept_bytes += recording.keep(self.cache_bytes - self._kept_bytes)
        return recording
