"""Measures of a waveform against the recording that it runs in step with: log-mel distance, STOI, PESQ, level.

Shapes: S samples of one mono waveform, M mel channels, T frames.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import numpy as np
import torch
from transformers.audio_utils import mel_filter_bank

from eval.speech.audio import level_db
from eval.speech.measures.registry import Measure, MeasureError, register_measure

__all__ = ["log_mel_db"]

_HZ = 16_000  # wide-band PESQ is defined at this rate; the other measures follow it
_N_FFT, _HOP, _N_MELS = 1024, 256, 80
_FLOOR = 1e-8  # of power: -80 dB, below which nobody hears a difference
_TOO_LITTLE = "too little speech in the clip"


@cache
def _mel_filters() -> torch.Tensor:
    filters = mel_filter_bank(_N_FFT // 2 + 1, _N_MELS, 0.0, _HZ / 2, _HZ, norm=None, mel_scale="slaney")
    return torch.from_numpy(filters).float()  # (bins, M)


def log_mel_db(audio: np.ndarray) -> np.ndarray:
    """Log-mel spectrogram in dB (M, T) of a waveform (S,) at 16 kHz, floored at -80 dB."""
    signal = torch.from_numpy(np.asarray(audio, dtype=np.float32))
    window = torch.hann_window(_N_FFT)
    signal = torch.nn.functional.pad(signal, (_N_FFT // 2, _N_FFT // 2))
    power = torch.stft(signal, _N_FFT, _HOP, window=window, center=False, return_complex=True).abs().square()
    power = power / window.sum().square() * 4  # a full-scale sine is 0 dB
    return (10 * (power.T @ _mel_filters()).clamp_min(_FLOOR).log10()).T.numpy()


def _mel_distance_db(audio: np.ndarray, reference: np.ndarray) -> float:
    """Mean over the frames that are above the floor in one of the two: silence added to both changes nothing."""
    levels = np.stack([log_mel_db(audio), log_mel_db(reference)])
    heard = levels.max(axis=(0, 1)) > 10 * np.log10(_FLOOR)
    if not heard.any():
        raise MeasureError("both are silent")
    return float(np.abs(levels[0] - levels[1])[:, heard].mean())


def _load_stoi() -> Any:
    from pystoi import stoi

    return stoi


def _stoi(stoi: Any, audio: np.ndarray, reference: np.ndarray) -> float:
    with warnings.catch_warnings():
        # Too few frames with speech: pystoi warns, and returns a number that means nothing.
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return float(stoi(reference, audio, _HZ))
        except (RuntimeWarning, ValueError, IndexError) as error:
            raise MeasureError(_TOO_LITTLE) from error


def _load_pesq() -> Any:
    import pesq

    return pesq


def _pesq(pesq: Any, audio: np.ndarray, reference: np.ndarray) -> float:
    # The ITU's code counts silence at the ends as speech where it is long: what is silent in both there is left out.
    heard = np.flatnonzero(np.maximum(np.abs(audio), np.abs(reference)) > _FLOOR**0.5)
    if not heard.size:
        raise MeasureError(_TOO_LITTLE)
    audio, reference = (signal[heard[0] : heard[-1] + 1] for signal in (audio, reference))
    try:
        return float(pesq.pesq(_HZ, reference, audio, "wb"))
    except (pesq.PesqError, ValueError, ZeroDivisionError) as error:
        raise MeasureError(_TOO_LITTLE) from error


def _level_difference_db(audio: np.ndarray, reference: np.ndarray) -> float:
    return level_db(audio) - level_db(reference)


register_measure(
    Measure(
        name="mel_distance_db",
        title="log-mel",
        explanation="Log-mel distance",
        better="lower",
        function=_mel_distance_db,
        sampling_rate=_HZ,
        defined_for_silence=True,
        unit="dB",
    )
)
register_measure(
    Measure(
        name="stoi",
        title="STOI",
        explanation="STOI (to 1)",
        better="higher",
        function=_stoi,
        load=_load_stoi,
        extra="eval",
        sampling_rate=_HZ,
        digits=3,
    )
)
register_measure(
    Measure(
        name="pesq",
        title="PESQ",
        explanation="Wide-band PESQ (to 4.6)",
        better="higher",
        function=_pesq,
        load=_load_pesq,
        extra="pesq",
        sampling_rate=_HZ,
    )
)
register_measure(
    Measure(
        name="level_difference_db",
        title="level",
        explanation="Level minus that of the recording",
        better="none",
        function=_level_difference_db,
        sampling_rate=_HZ,
        unit="dB",
        digits=1,
    )
)
