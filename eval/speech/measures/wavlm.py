"""How much a clip's voice is that of its recording, to the x-vectors of a WavLM (arXiv 2110.13900).

The model is one of transformers' x-vector models (:class:`transformers.WavLMForXVector`): that of the hub, or a folder
with one. It is not the WavLM-large with an ECAPA-TDNN head of seed-tts-eval's tables: figures of the two are on
different scales.

Shapes: S samples of one mono waveform, D numbers of a voice.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from eval.speech.audio import levelled
from eval.speech.measures.registry import Measure, MeasureError, register_measure

__all__ = ["load_voice"]

_HZ, _LEVEL_DB = 16_000, -26.0
_SHORTEST_S = 0.4
Voice = Callable[[np.ndarray], torch.Tensor]


def load_voice(name: str) -> Voice:
    """From waveforms (S,) to unit vectors (D,), by an x-vector model.

    Args:
        name: of the hub, or a folder.

    Raises:
        MeasureError: it cannot be loaded; the message says how else it is given.
    """
    from transformers import AutoFeatureExtractor, AutoModelForAudioXVector

    try:
        extractor = AutoFeatureExtractor.from_pretrained(name)
        model = AutoModelForAudioXVector.from_pretrained(name).eval()
    except (OSError, ValueError) as error:
        raise MeasureError(
            f"{name} cannot be loaded ({str(error).splitlines()[0]}); name a folder that holds it, "
            "measure_models={wavlm_similarity: FOLDER}"
        ) from error

    @torch.inference_mode()
    def voice(audio: np.ndarray) -> torch.Tensor:
        audio = levelled(audio, _LEVEL_DB)
        if len(audio) < _SHORTEST_S * _HZ:
            raise MeasureError(f"less than {_SHORTEST_S:g} s of sound")
        found = model(**extractor(audio, sampling_rate=_HZ, return_tensors="pt")).embeddings[0]  # (D,)
        return torch.nn.functional.normalize(found, dim=-1)

    return voice


def _similarity(voice: Voice, audio: np.ndarray, reference: np.ndarray) -> float:
    return float(voice(audio) @ voice(reference))


register_measure(
    Measure(
        name="wavlm_similarity",
        title="WavLM x-vector similarity",
        explanation="Similarity of the voices to a WavLM's x-vectors (to 1)",
        better="higher",
        function=_similarity,
        load=load_voice,
        model="microsoft/wavlm-base-plus-sv",
        sampling_rate=_HZ,
        time_aligned=False,
        digits=3,
        default=False,
    )
)
