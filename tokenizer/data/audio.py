"""From utterances to waveforms: opening, decoding, checking and resampling recordings.

Shapes: S samples of one mono waveform, float32 in [-1, 1].
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile
import soxr

from tokenizer.data.truncation import check_whole, refuse_short_read, with_its_length
from tokenizer.data.utterances import AudioError, RowAudio, Utterance

MIN_DURATION_S = 0.01
UNKNOWN_FRAMES = 1 << 62  # what libsndfile says of a FLAC that does not tell its length is above
SILENCE_PEAK = 1e-5  # below the last bit of 16-bit audio


def load_audio(
    utterance: Utterance | str | Path, sampling_rate: int, max_duration_s: float | None = None
) -> np.ndarray:
    """Decodes one recording to mono float32 at `sampling_rate`.

    Args:
        utterance: an utterance, or the path of a file.
        sampling_rate: the rate wanted, in Hz; other rates are resampled (soxr, high quality).
        max_duration_s: refuse what is longer, in seconds.

    Returns:
        The waveform (S,).

    Raises:
        AudioError: missing, empty, not audio, cut off, shorter than 10 ms, silent, not finite, or too long.
    """
    if not isinstance(utterance, Utterance):
        utterance = Utterance(id=Path(utterance).stem, audio=str(utterance))
    name = utterance.name
    with opened_audio(utterance, whole=True) as file:
        rate, n_frames = file.samplerate, file.frames
        # of what is too long no more than shows it
        at_most = n_frames if max_duration_s is None else min(n_frames, int(max_duration_s * rate) + 1)
        samples = file.read(at_most, dtype="float32", always_2d=True)
        if len(samples) < at_most:
            refuse_short_read(name, file, len(samples))
            n_frames = len(samples)
    mono = to_mono(samples)
    # Two passes, since all of a corpus goes through: what is not finite in any sample shows in the extremes.
    low, high = float(mono.min(initial=0.0)), float(mono.max(initial=0.0))
    finite = math.isfinite(low) and math.isfinite(high)
    check_recording(name, n_frames / rate, finite, max(high, -low), max_duration_s)
    if rate != sampling_rate:
        mono = soxr.resample(mono, rate, sampling_rate).astype(np.float32)
    return np.ascontiguousarray(mono)


def check_recording(name: str, duration: float, finite: bool, peak: float, max_duration_s: float | None) -> None:
    """Raises AudioError where a recording of so many seconds and such a peak cannot be used."""
    if duration < MIN_DURATION_S:
        raise AudioError(
            f"{name}: {1000 * duration:.1f} ms of audio, at least {1000 * MIN_DURATION_S:.0f} ms are needed"
        )
    if max_duration_s is not None and duration > max_duration_s:
        raise AudioError(
            f"{name}: {duration:.1f} s, more than max_duration_s={max_duration_s:g}: cut it or raise the limit"
        )
    if not finite:
        raise AudioError(f"{name}: holds NaN or infinite samples: export it again")
    if peak < SILENCE_PEAK:
        raise AudioError(f"{name}: silent (peak below {SILENCE_PEAK:g}): nothing to encode")


def to_mono(samples: np.ndarray) -> np.ndarray:
    """(S, channels) -> (S,), their mean."""
    return samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)


@contextmanager
def opened_audio(utterance: Utterance, whole: bool = False) -> Iterator[soundfile.SoundFile]:
    """An utterance's audio, open.

    Args:
        utterance: the recording.
        whole: refuse a file that is cut off, as far as its header and its end tell; no samples are decoded for it.

    Raises:
        AudioError: missing, empty, cut off or, then or while it is read, not audio.
    """
    handle = open_audio(utterance)
    try:
        with _opened(handle) as file:
            if file.frames >= UNKNOWN_FRAMES:
                raise AudioError(
                    f"{utterance.name}: does not say how long it is, as a FLAC written to a pipe, and libsndfile "
                    "cannot read such: convert it to WAV"
                )
            if whole:
                check_whole(utterance.name, handle, file.frames / file.samplerate)
            yield file
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
        raise AudioError(
            f"{utterance.name}: not audio that libsndfile can read ({error}): convert it to WAV or FLAC"
        ) from None


def _opened(handle: str | io.BytesIO) -> soundfile.SoundFile:
    file = soundfile.SoundFile(handle)
    if file.frames or (mended := with_its_length(handle)) is None:
        return file
    file.close()
    return soundfile.SoundFile(mended)


def open_audio(utterance: Utterance) -> str | io.BytesIO:
    """The path of an utterance's audio, or its bytes as a file. Raises AudioError: missing or empty."""
    audio = utterance.audio
    if isinstance(audio, RowAudio):
        content, path = audio.read()
        audio = content if content is not None else path
        if audio is None:
            raise AudioError(f"{utterance.name}: its row holds neither bytes nor a path")
    if isinstance(audio, bytes):
        if not audio:
            raise AudioError(f"{utterance.name}: empty (0 bytes)")
        return io.BytesIO(audio)
    path = Path(audio)
    if path.is_dir():
        raise AudioError(f"{path}: a folder, not a recording: name its files, or read it as a source (data.path)")
    if not path.is_file():
        raise AudioError(f"{path}: no such file: correct the path, or leave it out")
    if path.stat().st_size == 0:
        raise AudioError(f"{path}: empty (0 bytes): copy it again")
    if not os.access(path, os.R_OK):
        raise AudioError(f"{path}: may not be read by this user: chmod +r, or run as one who may")
    return str(path)
