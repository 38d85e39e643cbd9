"""Fundamental frequency (F0) of a clip against that of the recording that it runs in step with, by Praat.

Praat (through parselmouth, GPL-3, an extra and never a core dependency) finds F0 by autocorrelation (Boersma 1993).

Shapes: S samples of one mono waveform, T frames of 10 ms.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from eval.speech.measures.registry import Measure, MeasureError, register_measure

__all__ = ["f0_contour", "load_praat"]

_HZ = 16_000
_STEP_S, _LOWEST_HZ, _HIGHEST_HZ = 0.01, 60.0, 500.0
_FEWEST = 10  # frames that are voiced in both, for a correlation
_QUIET_DB = 60.0
_LEAST_SPREAD_HZ = 0.1  # a steady tone's F0 moves less than this, by rounding alone


def load_praat() -> Any:
    """Praat as a module. Raises ImportError where the extra `f0` is not installed."""
    import parselmouth

    return parselmouth


def f0_contour(praat: Any, audio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """F0 by autocorrelation, every 10 ms.

    Args:
        praat: What :func:`load_praat` returns.
        audio: A waveform (S,) at 16 kHz.

    Returns:
        The frames' times in seconds (T,) and F0 in Hz (T,), 0 where unvoiced.

    Raises:
        MeasureError: The clip is too short to have a pitch.
    """
    sound = praat.Sound(np.asarray(audio, np.float64), _HZ)
    try:
        pitch = sound.to_pitch_ac(time_step=_STEP_S, pitch_floor=_LOWEST_HZ, pitch_ceiling=_HIGHEST_HZ)
    except praat.PraatError as error:
        raise MeasureError("the clip is too short to have a pitch") from error
    return pitch.xs(), pitch.selected_array["frequency"]


def _pitches(praat: Any, audio: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """F0 in Hz (T,) of both, 0 where unvoiced, and which frames are not quiet in both."""
    found, loud = [], []
    for signal in (audio, reference):
        times, f0 = f0_contour(praat, signal)
        found.append(f0)
        half = round(_STEP_S * _HZ / 2)
        power = [np.mean(np.square(signal[max(0, at - half) : at + half])) for at in np.rint(times * _HZ).astype(int)]
        loud.append(np.asarray(power) > np.max(power) * 10 ** (-_QUIET_DB / 10))
    return found[0], found[1], loud[0] | loud[1]


def _f0_correlation(praat: Any, audio: np.ndarray, reference: np.ndarray) -> float:
    own, other, _ = _pitches(praat, audio, reference)
    voiced = (own > 0) & (other > 0)
    if voiced.sum() < _FEWEST:
        raise MeasureError(f"fewer than {_FEWEST} frames are voiced in both")
    if min(own[voiced].std(), other[voiced].std()) < _LEAST_SPREAD_HZ:
        raise MeasureError("F0 does not move")
    return float(np.corrcoef(own[voiced], other[voiced])[0, 1])


def _voicing_error(praat: Any, audio: np.ndarray, reference: np.ndarray) -> float:
    own, other, heard = _pitches(praat, audio, reference)
    if not (other > 0).any():
        raise MeasureError("no frame of the recording is voiced")
    return float(np.mean(((own > 0) != (other > 0))[heard]))


register_measure(
    Measure(
        name="f0_correlation",
        title="F0 correlation",
        explanation="Correlation of F0 where both are voiced (Praat, to 1)",
        better="higher",
        function=_f0_correlation,
        load=load_praat,
        extra="f0",
        sampling_rate=_HZ,
        digits=3,
        default=False,
    )
)
register_measure(
    Measure(
        name="voicing_error",
        title="voicing error",
        explanation="Share of frames that are voiced in one alone (Praat, from 0)",
        better="lower",
        function=_voicing_error,
        load=load_praat,
        extra="f0",
        sampling_rate=_HZ,
        digits=3,
        default=False,
    )
)
