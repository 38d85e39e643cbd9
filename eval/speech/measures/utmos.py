"""UTMOS: what listeners would say of a clip's naturalness, without a recording (arXiv 2204.02152).

The model is the strong learner of 2022, as github.com/tarepan/SpeechMOS packs it for torch.hub: code and weights are
of that repository and need torchaudio. A folder that holds a copy of it is used as it lies; the repository's own name
is looked up in torch.hub's cache, and else downloaded. As for DNSMOS a clip's quiet ends are cut and its level is made
one before it is judged (-26 dB), so that the figure does not change with either; published figures are of clips as they
are.

Shapes: S samples of one mono waveform.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.speech.audio import levelled
from eval.speech.measures.registry import Measure, MeasureError, register_measure

_HZ, _LEVEL_DB = 16_000, -26.0
_SHORTEST_S = 0.4


def _load_predictor(name: str) -> Any:
    """The predictor of a torch.hub repository, by its name or in a folder. Raises MeasureError where there is none."""
    source = "local" if Path(name).is_dir() else "github"
    try:
        return torch.hub.load(name, "utmos22_strong", source=source, trust_repo=True).eval()
    except Exception as error:  # whatever stops code of others: no network, no torchaudio, no such folder
        raise MeasureError(
            f"{name} cannot be loaded ({type(error).__name__}: {error}); it needs torchaudio, and the repository with "
            "its weights: name a folder that holds a copy, measure_models={utmos: FOLDER}"
        ) from error


@torch.inference_mode()
def _utmos(predictor: Any, audio: np.ndarray) -> float:
    """An opinion score, 1 to 5."""
    audio = levelled(audio, _LEVEL_DB)
    if len(audio) < _SHORTEST_S * _HZ:
        raise MeasureError(f"less than {_SHORTEST_S:g} s of sound")
    return float(predictor(torch.from_numpy(audio)[None], _HZ))


register_measure(
    Measure(
        name="utmos",
        title="UTMOS",
        explanation="UTMOS of the naturalness (1 to 5)",
        better="higher",
        function=_utmos,
        load=_load_predictor,
        model="tarepan/SpeechMOS:v1.2.0",
        sampling_rate=_HZ,
        needs_reference=False,
        default=False,
    )
)
