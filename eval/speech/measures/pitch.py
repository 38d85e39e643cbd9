"""Measures of pitch against the recording that a waveform runs in step with: F0 correlation and voicing, by Praat.

Praat's autocorrelation method (Boersma 1993), by parselmouth: GPL-3, hence an extra of its own.

Shapes: S samples of one mono waveform, T frames of 10 ms.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from eval.speech.measures.registry import Measure, MeasureError, register_measure

__all__ = ["f0_track"]

_HZ, _STEP_S, _LOWEST_HZ, _HIGHEST_HZ = 16_000, 0.01, 60.0, 500.0
_LEAST_VOICED = 10  # frames, a tenth of a second: fewer give no correlation worth the name


def _load() -> Any:
    import parselmouth

    return parselmouth


def f0_track(parselmouth: Any, audio: np.ndarray) -> np.ndarray:
    """F0 in Hz (T,) of a waveform (S,) at 16 kHz, 0 where it is not voiced.

    Raises:
        MeasureError: The clip is shorter than the method's window.
    """
    try:
        sound = parselmouth.Sound(audio.astype(np.float64), _HZ)
        pitch = sound.to_pitch_ac(time_step=_STEP_S, pitch_floor=_LOWEST_HZ, pitch_ceiling=_HIGHEST_HZ)
    except parselmouth.PraatError as error:
        raise MeasureError("too short for a pitch") from error
    return pitch.selected_array["frequency"]


def _pitch(parselmouth: Any, audio: np.ndarray, reference: np.ndarray) -> Mapping[str, float]:
    """Pearson's correlation of log F0 where both are voiced; share of frames where only one of them is."""
    found, wanted = f0_track(parselmouth, audio), f0_track(parselmouth, reference)
    length = min(len(found), len(wanted))
    found, wanted = found[:length], wanted[:length]
    both = (found > 0) & (wanted > 0)
    if both.sum() < _LEAST_VOICED:
        raise MeasureError("fewer than 0.1 s voiced in both")
    tracks = np.log(found[both]), np.log(wanted[both])
    if min(track.std() for track in tracks) < 1e-6:
        raise MeasureError("a pitch that does not move")
    return {
        "correlation": float(np.corrcoef(*tracks)[0, 1]),
        "voicing_error": float(((found > 0) != (wanted > 0)).mean()),
    }


register_measure(
    Measure(
        name="f0",
        title="F0",
        explanation="Correlation of log F0 where both are voiced (to 1), and share of frames where one alone is",
        better="none",
        function=_pitch,
        load=_load,
        extra="f0",
        sampling_rate=_HZ,
        digits=3,
        parts={"correlation": "corr.", "voicing_error": "voicing"},
        default=False,
    )
)
