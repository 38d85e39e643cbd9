"""An SLM's semantic codes in the voice of a recording: the acoustic stage, loaded, with the voice encoded for it.

Shapes: n books that are given, K books, F code frames, P of a voice, S samples; codes (n, F), waveforms (S,).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recipes.config import ConfigError
from recipes.encoding.encoder import encode_batch
from recipes.inference.speech_checks import is_silent
from slm.acoustic.configuration import AcousticConfig
from slm.acoustic.decoding import AcousticDecoding, fill_books
from slm.acoustic.modeling import AcousticModel, load_acoustic_model
from slm.vocabulary import SpeechVocabulary
from tokenizer.data.audio import load_audio
from tokenizer.data.utterances import AudioError, Utterance


@dataclass
class AcousticVoice:
    """An acoustic stage and the codes (K, P) of the voice that it speaks in."""

    model: AcousticModel
    voice: np.ndarray
    settings: AcousticDecoding
    seed: int

    def filled(self, codes: Iterable[np.ndarray], keys: Iterable[str]) -> Iterator[np.ndarray]:
        """Yields all books (K, F) of each answer's codes (n, F), in their order, a batch at a time.

        Args:
            codes: Taken as they are needed.
            keys: What, beside the seed, decides each answer's random stream.
        """
        held: list[tuple[np.ndarray, str]] = []
        for pair in zip(codes, keys, strict=True):
            held.append(pair)
            if len(held) == self.settings.batch_size:
                yield from self._fill(held)
                held = []
        if held:
            yield from self._fill(held)

    def _fill(self, held: list[tuple[np.ndarray, str]]) -> list[np.ndarray]:
        codes, keys = zip(*held, strict=True)
        return fill_books(self.model, codes, [self.voice] * len(codes), keys, self.settings, self.seed)


def read_voice(source: Utterance | str | Path, stage: AcousticConfig, sampling_rate: int) -> np.ndarray:
    """The loudest `max_prompt_s` of a recording, resampled and mixed to mono: (S,).

    Raises:
        AudioError: It is missing, no audio, silent, or shorter than `min_prompt_s`.
    """
    waveform, path = load_audio(source, sampling_rate), source.name if isinstance(source, Utterance) else source
    if is_silent(waveform):
        raise AudioError(f"{path}: silent (nothing above -50 dB): give a recording in which the speaker is heard")
    seconds = len(waveform) / sampling_rate
    if seconds < stage.min_prompt_s:
        raise AudioError(
            f"{path}: {seconds:.2f} s are too short for a voice: the stage has learnt from {stage.min_prompt_s:g} s "
            f"and more, and reads {stage.max_prompt_s:g} s"
        )
    length = round(stage.max_prompt_s * sampling_rate)
    if len(waveform) <= length:
        return waveform
    energy = np.concatenate([[0.0], np.cumsum(waveform.astype(np.float64) ** 2)])
    start = int(np.argmax(energy[length:] - energy[:-length]))
    return waveform[start : start + length]


def acoustic_voice(config: Any, vocabulary: SpeechVocabulary, tokenizer: Any, device: str) -> AcousticVoice:
    """The stage `config.acoustic` with the recording `config.voice`, for an SLM's codes.

    Raises:
        AcousticError: There is no such stage, or it fills another tokenizer's codes.
        AudioError: The recording cannot be used (`read_voice`).
        ConfigError: The SLM speaks all books already.
    """
    model = load_acoustic_model(config.acoustic, device)
    stage = model.config
    stage.check_fingerprint(vocabulary.fingerprint, f"model {config.model}")
    if vocabulary.n_codebooks >= stage.n_codebooks:
        raise ConfigError(
            f"acoustic: model {config.model} speaks all {vocabulary.n_codebooks} books itself; leave acoustic and voice"
        )
    try:
        waveform = read_voice(config.voice, stage, tokenizer.config.sampling_rate)
    except AudioError as error:
        raise AudioError(f"voice: {error}") from error
    codes = encode_batch(tokenizer, [waveform], vocabulary.precision, device)[0]
    return AcousticVoice(model, codes, config.acoustic_decoding, config.decoding.seed)
