"""Quality of a waveform against its reference: log-mel distance, STOI, PESQ, level.

These need the two waveforms to run in step, so they fit a codec's output, never synthesised speech. STOI and PESQ come
with the extra ``eval``; where it is absent, or a clip too short or silent for them, they are None and a note says why.

Shapes: S samples of one mono waveform, M mel channels, T frames.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from transformers.audio_utils import mel_filter_bank

from eval.speech.audio import resample
from eval.stats import mean_interval

__all__ = [
    "MEASURES",
    "MEASURES_EXPLAINED",
    "Quality",
    "QualitySummary",
    "compare_audio",
    "log_mel_db",
    "summarise_quality",
]

MEASURES = ("mel_distance_db", "stoi", "pesq", "level_difference_db")
MEASURES_EXPLAINED = "Log-mel distance: lower is better. STOI (to 1) and wide-band PESQ (to 4.6): higher is better."
QUALITY_HZ = 16_000  # wide-band PESQ is defined at this rate; the other measures follow it
_N_FFT, _HOP, _N_MELS = 1024, 256, 80
_FLOOR = 1e-8  # of power: -80 dB, below which nobody hears a difference
_LONG_S, _PIECE_S = 60.0, 30.0  # a longer clip is measured in pieces: the measures' memory grows with the length
_INSTALL = "install the extra: pip install 'lmspt-slm[{}]'"


@dataclass(frozen=True)
class Quality:
    """One clip. Lower is better for ``mel_distance_db``; higher for ``stoi`` (0 to 1) and ``pesq`` (1 to 4.6).

    ``level_difference_db`` is the clip's level minus the reference's; ``length_difference_s`` likewise: what was longer
    was cut before comparing.
    """

    mel_distance_db: float | None
    stoi: float | None
    pesq: float | None
    level_difference_db: float | None
    length_difference_s: float
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class QualitySummary:
    """Means over the clips for which a measure exists; ``n_measured`` says how many those were.

    ``n_scored`` clips could be compared; ``n_failed`` could not (no audio came out, or the recording cannot be read)
    and are in no mean. ``intervals``: measure -> 95 % bootstrap interval of its mean over clips, where there are two
    clips or more. ``test_set`` names the recordings; ``system`` and ``cell`` are those of :class:`eval.schema.Row`.
    """

    name: str
    model: str
    n_scored: int
    mel_distance_db: float | None
    stoi: float | None
    pesq: float | None
    level_difference_db: float | None
    n_measured: dict[str, int]
    notes: list[str]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    test_set: str = ""
    n_failed: int = 0
    system: str = ""
    cell: str = ""

    @property
    def label(self) -> str:
        """The name in tables."""
        return f"{self.cell}: {self.name}" if self.cell else self.name


@cache
def _mel_filters() -> torch.Tensor:
    filters = mel_filter_bank(_N_FFT // 2 + 1, _N_MELS, 0.0, QUALITY_HZ / 2, QUALITY_HZ, norm=None, mel_scale="slaney")
    return torch.from_numpy(filters).float()  # (bins, M)


def log_mel_db(audio: np.ndarray) -> np.ndarray:
    """Log-mel spectrogram in dB (M, T) of a waveform (S,) at 16 kHz, floored at -80 dB."""
    signal = torch.from_numpy(np.asarray(audio, dtype=np.float32))
    window = torch.hann_window(_N_FFT)
    signal = torch.nn.functional.pad(signal, (_N_FFT // 2, _N_FFT // 2))
    power = torch.stft(signal, _N_FFT, _HOP, window=window, center=False, return_complex=True).abs().square()
    power = power / window.sum().square() * 4  # a full-scale sine is 0 dB
    return (10 * (power.T @ _mel_filters()).clamp_min(_FLOOR).log10()).T.numpy()


def _level_db(audio: np.ndarray) -> float | None:
    rms = float(np.sqrt(np.mean(np.square(audio, dtype=np.float64))))
    return 20 * np.log10(rms) if rms > 1e-5 else None


def _stoi(reference: np.ndarray, audio: np.ndarray) -> tuple[float | None, str | None]:
    try:
        from pystoi import stoi
    except ImportError:
        return None, f"STOI: {_INSTALL.format('eval')}"
    with warnings.catch_warnings():
        # Too few frames with speech: pystoi warns, and returns a number that means nothing.
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return float(stoi(reference, audio, QUALITY_HZ)), None
        except (RuntimeWarning, ValueError, IndexError):
            return None, "STOI: too little speech in the clip"


def _pesq(reference: np.ndarray, audio: np.ndarray) -> tuple[float | None, str | None]:
    try:
        from pesq import PesqError, pesq
    except ImportError:
        return None, f"PESQ: {_INSTALL.format('pesq')}"
    try:
        return float(pesq(QUALITY_HZ, reference, audio, "wb")), None
    except (PesqError, ValueError, ZeroDivisionError):
        return None, "PESQ: too little speech in the clip"


def compare_audio(
    reference: np.ndarray, audio: np.ndarray, sampling_rate: int, audio_sampling_rate: int | None = None
) -> Quality:
    """Compare a waveform with its reference.

    Args:
        reference: the original waveform (S,) at ``sampling_rate``.
        audio: the waveform to be judged (S',); the longer of the two is cut to the shorter. More than 60 s are measured
            in equal pieces of at most 30 s; the means of those for which a measure exists count.
        sampling_rate: Hz.
        audio_sampling_rate: rate of ``audio`` where it differs.

    Raises:
        ValueError: a waveform is empty, not one-dimensional or not finite.
    """
    for name, signal in (("reference", reference), ("audio", audio)):
        if signal.ndim != 1 or signal.size == 0 or not np.isfinite(signal).all():
            raise ValueError(f"{name} (shape {signal.shape}) must be one-dimensional, not empty and finite")
    reference = resample(reference, sampling_rate, QUALITY_HZ)
    audio = resample(audio, audio_sampling_rate or sampling_rate, QUALITY_HZ)
    difference_s = (len(audio) - len(reference)) / QUALITY_HZ
    length = min(len(reference), len(audio))
    reference, audio = reference[:length], audio[:length]
    if length <= _LONG_S * QUALITY_HZ:
        return _measured(reference, audio, difference_s)
    edges = np.linspace(0, length, math.ceil(length / (_PIECE_S * QUALITY_HZ)) + 1).round().astype(int)
    found = [_measured(reference[i:j], audio[i:j], difference_s) for i, j in zip(edges, edges[1:], strict=False)]
    values = {name: [v for piece in found if (v := getattr(piece, name)) is not None] for name in MEASURES}
    means = {name: float(np.mean(some)) if some else None for name, some in values.items()}
    notes = list(dict.fromkeys(note for piece in found for note in piece.notes))
    return Quality(**means, length_difference_s=difference_s, notes=notes)


def _measured(reference: np.ndarray, audio: np.ndarray, difference_s: float) -> Quality:
    """Two waveforms (S,) of one length at 16 kHz."""
    levels = _level_db(reference), _level_db(audio)
    if levels[0] is None or levels[1] is None:
        silent = "reference" if levels[0] is None else "clip"
        distance = float(np.abs(log_mel_db(reference) - log_mel_db(audio)).mean())
        return Quality(distance, None, None, None, difference_s, [f"the {silent} is silent"])
    stoi, stoi_note = _stoi(reference, audio)
    pesq, pesq_note = _pesq(reference, audio)
    return Quality(
        mel_distance_db=float(np.abs(log_mel_db(reference) - log_mel_db(audio)).mean()),
        stoi=stoi,
        pesq=pesq,
        level_difference_db=levels[1] - levels[0],
        length_difference_s=difference_s,
        notes=[note for note in (stoi_note, pesq_note) if note],
    )


def summarise_quality(
    name: str,
    model: str,
    clips: Sequence[Quality | None],
    test_set: str = "",
    samples: int = 10_000,
    seed: int = 0,
    system: str = "",
    speakers: Sequence[str] | None = None,
) -> QualitySummary:
    """Means over clips, with their intervals; what could not be measured is counted and said, not hidden.

    Args:
        name: the system, as tables name it.
        model: the tokenizer.
        clips: one for each recording; None where there is none to compare.
        test_set: the recordings' name.
        samples: resamples of the bootstrap over clips.
        seed: of the bootstrap.
        system: which kind of system.
        speakers: of each recording, to draw speakers, not clips.
    """
    who = speakers or [""] * len(clips)
    there = [(clip, speaker) for clip, speaker in zip(clips, who, strict=True) if clip is not None]
    means: dict[str, float | None] = {}
    counts: dict[str, int] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for measure in MEASURES:
        found = [(v, speaker) for clip, speaker in there if (v := getattr(clip, measure)) is not None]
        values = [value for value, _ in found]
        counts[measure] = len(values)
        means[measure] = float(np.mean(values)) if values else None
        drawn = [speaker for _, speaker in found] if speakers else None
        if (interval := mean_interval(values, speakers=drawn, samples=samples, seed=seed)) is not None:
            intervals[measure] = interval
    notes = Counter(note for clip, _ in there for note in clip.notes)
    return QualitySummary(
        name,
        model,
        len(there),
        **means,
        n_measured=counts,
        notes=[f"{note} ({n} clips)" for note, n in notes.items()],
        intervals=intervals,
        test_set=test_set,
        n_failed=len(clips) - len(there),
        system=system,
    )
