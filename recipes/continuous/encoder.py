"""The frozen encoder of a continuous-input SLM: recordings to features, each as it would be alone.

Shapes: S samples at 16 kHz, E frames (50 a second) of width D.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from recipes.config import ConfigError
from tokenizer.fingerprint import add_weights
from tokenizer.teacher.whisper import SpeechTeacher, TeacherConfig

ENCODER_RATE_HZ = 16000
FRAMES_PER_S = 50  # of the features


def load_encoder(config: TeacherConfig, device: str) -> SpeechTeacher:
    """The encoder, frozen. Raises ConfigError where it cannot be had."""
    try:
        return SpeechTeacher.from_pretrained(config).to(device)
    except ValueError as error:
        raise ConfigError(f"encoder: {error}".replace("teacher", "encoder")) from error


def encoder_fingerprint(encoder: SpeechTeacher) -> str:
    """SHA-256 (hex) of the encoder's weights: equal ones give equal features."""
    digest = hashlib.sha256()
    add_weights(digest, encoder.state_dict())
    return digest.hexdigest()


@torch.no_grad()
def encode_recordings(encoder: SpeechTeacher, waveforms: Sequence[np.ndarray]) -> list[Tensor]:
    """The features (E, D) of each waveform (S,), in order.

    An encoder hears the silence that a shorter recording would be padded with, so only those of one length share a
    pass; with `pad_to_seconds` all of them do.
    """
    device = next(encoder.parameters()).device
    groups: dict[int, list[int]] = {}
    for number, waveform in enumerate(waveforms):
        groups.setdefault(0 if encoder.pad_to_seconds is not None else len(waveform), []).append(number)
    found: dict[int, Tensor] = {}
    for numbers in groups.values():
        longest = max(len(waveforms[number]) for number in numbers)
        padded = [np.pad(waveforms[number], (0, longest - len(waveforms[number]))) for number in numbers]
        hidden = encoder(torch.from_numpy(np.stack(padded)).float().to(device))
        for number, own in zip(numbers, hidden, strict=True):
            found[number] = own[: -(-len(waveforms[number]) * FRAMES_PER_S // ENCODER_RATE_HZ)]
    return [found[number] for number in range(len(waveforms))]
