"""How long a clip's sound is beside that of its recording: too long where synthesis rambles, too short where it skips.

Shapes: S samples of one mono waveform.
"""

from __future__ import annotations

import numpy as np

from eval.speech.measures.registry import Measure, register_measure

__all__ = ["sound_s"]

_HZ = 16_000
_FRAME = _HZ // 100
_QUIET_DB = 40.0


def sound_s(audio: np.ndarray) -> float:
    """Seconds from the first to the last 10 ms that lie within 40 dB of the loudest; pauses between count.

    Args:
        audio: a waveform (S,) at 16 kHz, not silent.
    """
    audio = np.asarray(audio, np.float64)
    starts = np.arange(0, len(audio), _FRAME)
    power = np.add.reduceat(np.square(audio), starts) / _FRAME
    loud = np.flatnonzero(power > power.max() * 10 ** (-_QUIET_DB / 10))
    return float(loud[-1] - loud[0] + 1) * _FRAME / _HZ


def _duration_ratio(audio: np.ndarray, reference: np.ndarray) -> float:
    return sound_s(audio) / sound_s(reference)


register_measure(
    Measure(
        name="duration_ratio",
        title="duration",
        explanation="Length of the sound over that of the recording, quiet ends left out",
        better="none",
        function=_duration_ratio,
        sampling_rate=_HZ,
        time_aligned=False,
        digits=3,
        default=False,
    )
)
