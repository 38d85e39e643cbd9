"""Measures of a waveform against its recording: log-mel and STFT distance, SI-SDR, STOI, PESQ, level, duration.

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
_STFT_SIZES = (512, 1024, 2048)
_TINY, _MOST_DB = 1e-20, 100.0  # an exact copy has no distortion; what lies beyond 100 dB is rounding
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
    return float(np.abs(log_mel_db(reference) - log_mel_db(audio)).mean())


def _stft_distance_db(audio: np.ndarray, reference: np.ndarray) -> float:
    """Mean over window lengths and bins of |20 log10| of the magnitudes' ratio, floored as the log-mel is."""
    spectra = []
    for signal in (torch.from_numpy(np.asarray(one, dtype=np.float32)) for one in (audio, reference)):
        for size in _STFT_SIZES:
            window = torch.hann_window(size)
            padded = torch.nn.functional.pad(signal, (size // 2, size // 2))
            power = torch.stft(padded, size, size // 4, window=window, center=False, return_complex=True).abs().square()
            spectra.append(10 * (power / window.sum().square() * 4).clamp_min(_FLOOR).log10())
    own, others = spectra[: len(_STFT_SIZES)], spectra[len(_STFT_SIZES) :]
    return float(np.mean([(a - b).abs().mean().item() for a, b in zip(own, others, strict=True)]))


def _si_sdr_db(audio: np.ndarray, reference: np.ndarray) -> float:
    """Scale-invariant signal-to-distortion ratio (Le Roux et al. 2019, arXiv 1811.02508, equation 5), means removed."""
    found, wanted = (np.asarray(one, dtype=np.float64) - np.mean(one) for one in (audio, reference))
    target = wanted * (found @ wanted) / max(wanted @ wanted, _TINY)
    noise = found - target
    return float(np.clip(10 * np.log10(max(target @ target, _TINY) / max(noise @ noise, _TINY)), -_MOST_DB, _MOST_DB))


def _duration_ratio(audio: np.ndarray, reference: np.ndarray) -> float:
    return len(audio) / len(reference)


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
register_measure(
    Measure(
        name="stft_distance_db",
        title="STFT",
        explanation="Distance of log magnitudes, mean of windows of 32, 64 and 128 ms",
        better="lower",
        function=_stft_distance_db,
        sampling_rate=_HZ,
        defined_for_silence=True,
        unit="dB",
        default=False,
    )
)
register_measure(
    Measure(
        name="si_sdr_db",
        title="SI-SDR",
        explanation="Scale-invariant signal-to-distortion ratio",
        better="higher",
        function=_si_sdr_db,
        sampling_rate=_HZ,
        unit="dB",
        digits=1,
        default=False,
    )
)
register_measure(
    Measure(
        name="duration_ratio",
        title="duration",
        explanation="Duration by that of the recording",
        better="none",
        function=_duration_ratio,
        sampling_rate=_HZ,
        time_aligned=False,
        defined_for_silence=True,
        default=False,
    )
)
