"""Measures of a waveform that runs in step with its recording: SI-SDR and the distance of spectra.

Shapes: S samples of one mono waveform, T frames.
"""

from __future__ import annotations

import numpy as np
import torch

from eval.speech.measures.registry import Measure, MeasureError, register_measure

__all__ = ["si_sdr_db", "stft_distance_db"]

_HZ = 16_000
_MOST_DELAY = _HZ // 100  # 10 ms
_BOUND_DB = 100.0  # SI-SDR of a copy is infinite; further than this 32-bit samples do not tell
_WINDOWS = (2048, 512)
_FLOOR = 1e-8  # of power: -80 dB, as of the log-mel distance


def si_sdr_db(audio: np.ndarray, reference: np.ndarray) -> float:
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al. 2019, eq. 3), between -100 and 100.

    A constant delay of up to 10 ms, the one at which the two correlate most, is taken out first: a codec's delay is no
    distortion. The figure is therefore never lower than without that.

    Args:
        audio: the clip (S,) at 16 kHz.
        reference: the recording (S,).
    """
    audio, reference = (np.asarray(x, np.float64) - np.mean(x, dtype=np.float64) for x in (audio, reference))
    most = min(_MOST_DELAY, len(audio) - 1)
    size = 2 ** (len(audio) + most).bit_length()
    products = np.fft.irfft(np.fft.rfft(audio, size) * np.fft.rfft(reference, size).conj(), size)
    delay = int(np.argmax(np.roll(products, most)[: 2 * most + 1])) - most  # > 0: the clip is late
    length = len(audio) - abs(delay)
    audio, reference = audio[max(0, delay) :][:length], reference[max(0, -delay) :][:length]
    target = (audio @ reference) / max(reference @ reference, 1e-12) * reference
    rest = audio - target
    ratio = (target @ target) / max(rest @ rest, 1e-30)
    return float(np.clip(10 * np.log10(max(ratio, 1e-30)), -_BOUND_DB, _BOUND_DB))


def stft_distance_db(audio: np.ndarray, reference: np.ndarray) -> float:
    """Mean absolute difference of the log-magnitude spectra in dB, windows of 128 and 32 ms, floored at -80 dB.

    Frames that are below the floor in both do not count, so that silence which was added to both changes nothing.

    Args:
        audio: the clip (S,) at 16 kHz.
        reference: the recording (S,).

    Raises:
        MeasureError: both are silent.
    """
    distances = []
    for n_fft in _WINDOWS:
        levels = [_spectrum_db(signal, n_fft) for signal in (audio, reference)]
        heard = torch.maximum(*levels).amax(0) > 10 * np.log10(_FLOOR)
        if not bool(heard.any()):
            raise MeasureError("both are silent")
        distances.append(float((levels[0] - levels[1]).abs()[:, heard].mean()))
    return float(np.mean(distances))


def _spectrum_db(signal: np.ndarray, n_fft: int) -> torch.Tensor:
    """(S,) -> (bins, T) in dB, a full-scale sine being 0; zeros stand before and behind."""
    window = torch.hann_window(n_fft)
    samples = torch.from_numpy(np.asarray(signal, np.float32))
    spectrum = torch.stft(samples, n_fft, n_fft // 4, window=window, pad_mode="constant", return_complex=True)
    power = spectrum.abs().square() * (2 / window.sum()) ** 2
    return 10 * power.clamp_min(_FLOOR).log10()


register_measure(
    Measure(
        name="si_sdr_db",
        title="SI-SDR",
        explanation="Scale-invariant signal-to-distortion ratio, a delay of up to 10 ms taken out",
        better="higher",
        function=si_sdr_db,
        sampling_rate=_HZ,
        unit="dB",
        digits=1,
        default=False,
    )
)
register_measure(
    Measure(
        name="stft_distance_db",
        title="STFT",
        explanation="Log-spectral distance at windows of 128 and 32 ms",
        better="lower",
        function=stft_distance_db,
        sampling_rate=_HZ,
        defined_for_silence=True,
        unit="dB",
        default=False,
    )
)
