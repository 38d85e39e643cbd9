"""DNSMOS P.835: what listeners would say of a clip's speech, its background and the whole, without a recording.

The model is that of the package speechmos, run by onnxruntime; the package's own code is not used, since it needs
libraries that it does not install. Unlike there a clip's quiet ends are cut and its level is made one before it is
judged (-26 dB): level has a measure of its own, and silence behind a clip is no background.

Shapes: S samples of one mono waveform.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.speech.audio import levelled
from eval.speech.measures.registry import Measure, MeasureError, register_measure

_HZ, _LEVEL_DB = 16_000, -26.0
_WINDOW_S = 9.01  # a shorter clip is repeated until it fills one window
_SHORTEST_S = 0.4
# Fitted by the model's authors, from its outputs to opinion scores: highest power first.
_CALIBRATION = {
    "sig": (-0.08397278, 1.22083953, 0.0052439),
    "bak": (-0.13166888, 1.60915514, -0.39604546),
    "ovrl": (-0.06766283, 1.11546468, 0.04602535),
}


def _load_session() -> Any:
    import onnxruntime

    package = importlib.util.find_spec("speechmos")
    if package is None:
        raise ModuleNotFoundError("No module named 'speechmos'")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    model = Path(package.origin).parent / "dnsmos_models" / "sig_bak_ovr.onnx"
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def _dnsmos(session: Any, audio: np.ndarray) -> dict[str, float]:
    """Opinion scores, 1 to 5: means over windows of 9 s, one a second."""
    audio = levelled(audio, _LEVEL_DB)
    if len(audio) < _SHORTEST_S * _HZ:
        raise MeasureError(f"less than {_SHORTEST_S:g} s of sound")
    window = int(_WINDOW_S * _HZ)
    while len(audio) < window:
        audio = np.tile(audio, 2)
    starts = [_HZ * second for second in range(int(len(audio) // _HZ - _WINDOW_S) + 1)]
    raw = [session.run(None, {"input_1": audio[None, start : start + window]})[0][0] for start in starts]
    scores = zip(_CALIBRATION.items(), np.asarray(raw, dtype=np.float64).T, strict=True)
    return {part: float(np.polyval(powers, found).mean()) for (part, powers), found in scores}


register_measure(
    Measure(
        name="dnsmos",
        title="DNSMOS",
        explanation="DNSMOS of the speech, the background and the whole (1 to 5)",
        better="higher",
        function=_dnsmos,
        load=_load_session,
        extra="dnsmos",
        sampling_rate=_HZ,
        needs_reference=False,
        parts={"sig": "SIG", "bak": "BAK", "ovrl": "OVRL"},
        default=False,
    )
)
