"""How much a clip's voice is that of its recording, to a speaker encoder.

The encoder is that of the package resemblyzer (GE2E, 256 numbers for a voice), of which only the weights are read: its
own code needs a compiler and libraries that nothing else here does, and a folder without them (`pip install --no-deps
resemblyzer`) is enough. Unlike there no voice detector cuts pauses; the quiet ends are cut, and the level is made one.

Shapes: S samples of one mono waveform, T mel frames, P windows of 160 frames.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank

from eval.speech.audio import levelled
from eval.speech.measures.registry import Measure, MeasureError, register_measure

__all__ = ["VoiceEncoder"]

_HZ, _LEVEL_DB = 16_000, -30.0
_N_FFT, _HOP, _N_MELS, _SIZE = 400, 160, 40, 256
_WINDOW, _WINDOWS_PER_S, _COVERED = 160, 1.3, 0.75  # frames of 10 ms; a last window needs three quarters of sound
_SHORTEST_S = 0.4


class VoiceEncoder(nn.Module):
    """Three LSTM layers over mel frames; the last state, rectified, is the voice."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(_N_MELS, _SIZE, 3, batch_first=True)
        self.linear = nn.Linear(_SIZE, _SIZE)

    def forward(self, mels: Tensor) -> Tensor:
        """Mel power (P, T, 40) to unit vectors (P, 256)."""
        _, (hidden, _) = self.lstm(mels)
        return nn.functional.normalize(self.linear(hidden[-1]).relu(), dim=-1)

    @torch.inference_mode()
    def voice(self, audio: np.ndarray) -> Tensor:
        """The unit vector (256,) of a waveform (S,) at 16 kHz: the mean over windows of 1.6 s, about 1.3 a second.

        Raises:
            MeasureError: it is too short.
        """
        audio = levelled(audio, _LEVEL_DB)
        if len(audio) < _SHORTEST_S * _HZ:
            raise MeasureError(f"less than {_SHORTEST_S:g} s of sound")
        step = round(_HZ / _WINDOWS_PER_S / _HOP)
        n_frames = len(audio) // _HOP + 1
        starts = list(range(0, max(1, n_frames - _WINDOW + step + 1), step))
        if len(starts) > 1 and len(audio) / _HOP - starts[-1] < _COVERED * _WINDOW:
            starts.pop()
        missing = (starts[-1] + _WINDOW) * _HOP - len(audio)
        mel = _mel_power(torch.from_numpy(np.pad(audio, (0, max(0, missing)))))
        voices = self(torch.stack([mel[start : start + _WINDOW] for start in starts]))
        return nn.functional.normalize(voices.mean(0), dim=-1)


@cache
def _mel_filters() -> Tensor:
    filters = mel_filter_bank(_N_FFT // 2 + 1, _N_MELS, 0.0, _HZ / 2, _HZ, norm="slaney", mel_scale="slaney")
    return torch.from_numpy(filters).float()  # (bins, 40)


def _mel_power(audio: Tensor) -> Tensor:
    """Waveform (S,) to mel power (T, 40)."""
    window = torch.hann_window(_N_FFT)
    spectrum = torch.stft(audio, _N_FFT, _HOP, window=window, pad_mode="constant", return_complex=True)
    return spectrum.abs().square().T @ _mel_filters()


def _load_encoder() -> VoiceEncoder:
    package = importlib.util.find_spec("resemblyzer")
    if package is None:
        raise ModuleNotFoundError("No module named 'resemblyzer'")
    state = torch.load(Path(package.origin).with_name("pretrained.pt"), map_location="cpu", weights_only=True)
    encoder = VoiceEncoder()
    encoder.load_state_dict({k: v for k, v in state["model_state"].items() if not k.startswith("similarity")})
    return encoder.eval()


def _similarity(encoder: VoiceEncoder, audio: np.ndarray, reference: np.ndarray) -> float:
    return float(encoder.voice(audio) @ encoder.voice(reference))


register_measure(
    Measure(
        name="similarity",
        title="similarity",
        explanation="Similarity of the voices (Resemblyzer, to 1)",
        better="higher",
        function=_similarity,
        load=_load_encoder,
        extra="similarity",
        sampling_rate=_HZ,
        time_aligned=False,
        digits=3,
        default=False,
    )
)
