"""How much a clip's voice is that of its recording, to the network of seed-tts-eval's tables: WavLM-large, ECAPA-TDNN.

Network and weights are others': github.com/BytedanceSpeech/seed-tts-eval holds the code in
thirdparty/UniSpeech/downstreams/speaker_verification, and its page links `wavlm_large_finetune.pth`. A folder with both
is loaded by that code, which needs torchaudio, fire and s3prl. As there, clips are taken as they are. Its tables
compare with the prompt, another recording of the speaker; here it is the recording of the same text.

Shapes: S samples of one mono waveform, D numbers of a voice.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.speech.measures.registry import Measure, MeasureError, register_measure

_HZ = 16_000
_CODE, _WEIGHTS = "verification.py", "wavlm_large_finetune.pth"


def _load_network(name: str) -> Any:
    """The network of a folder with code and weights. Raises MeasureError where it cannot be loaded."""
    folder = Path(name)
    try:
        if missing := [file for file in (_CODE, _WEIGHTS) if not (folder / file).is_file()]:
            raise FileNotFoundError(f"no {' and no '.join(missing)} there")
        spec = importlib.util.spec_from_file_location("seed_tts_verification", folder / _CODE)
        code = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(folder))  # it imports its neighbours
        try:
            spec.loader.exec_module(code)
            return code.init_model("wavlm_large", str(folder / _WEIGHTS)).eval()
        finally:
            sys.path.remove(str(folder))
    except Exception as error:  # whatever stops code of others: a package that is missing, no network, torn weights
        raise MeasureError(
            f"{name} cannot be loaded ({type(error).__name__}: {error}); name a copy of seed-tts-eval's "
            f"thirdparty/UniSpeech/downstreams/speaker_verification with {_WEIGHTS} in it, "
            "measure_models={wavlm_ecapa_similarity: FOLDER}"
        ) from error


@torch.inference_mode()
def _similarity(network: Any, audio: np.ndarray, reference: np.ndarray) -> float:
    mine, other = (network(torch.from_numpy(np.asarray(clip, np.float32))[None]) for clip in (audio, reference))
    return float(torch.nn.functional.cosine_similarity(mine, other)[0])  # of (1, D)


register_measure(
    Measure(
        name="wavlm_ecapa_similarity",
        title="WavLM-large ECAPA similarity",
        explanation="Similarity of the voices to seed-tts-eval's WavLM-large with ECAPA-TDNN (to 1)",
        better="higher",
        function=_similarity,
        load=_load_network,
        model="seed-tts-eval's speaker_verification",
        sampling_rate=_HZ,
        time_aligned=False,
        digits=3,
        default=False,
    )
)
