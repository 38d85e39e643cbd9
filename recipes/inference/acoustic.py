"""An SLM's semantic codes in the voice of a recording: the acoustic stage, loaded, with the voice encoded for it.

Most stages fill the codes of the tokenizer whose decoder makes sound. One may make a tokenizer's codes sound through
another's decoder (`DecoderFacts`): then the voice is encoded by both.

Shapes: n books that are given, K books, F code frames, P of a voice, D latent channels, S samples; codes (n, F),
latents (D, F), waveforms (S,).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.speech.audio import resample
from recipes.config import ConfigError
from recipes.encoding.encoder import encode_batch
from recipes.encoding.joined import joined_codes
from recipes.inference.speech_checks import is_silent
from slm.acoustic.configuration import AcousticConfig, AcousticError
from slm.acoustic.pieces import AcousticDecoding
from slm.acoustic.stages import Stage, fill_speech, load_acoustic_model
from slm.vocabulary import SpeechVocabulary
from tokenizer import load_tokenizer
from tokenizer.data.audio import load_audio
from tokenizer.data.utterances import AudioError, Utterance


@dataclass
class AcousticVoice:
    """An acoustic stage, the codec that makes sound of what it fills, and the codes (K, P) of the voice."""

    model: Stage
    decoder: Any
    voice: np.ndarray
    settings: AcousticDecoding
    seed: int

    def filled(self, codes: Iterable[np.ndarray], keys: Iterable[str]) -> Iterator[np.ndarray]:
        """Yields what is to be decoded of each answer's codes (n, F), in their order, a batch at a time.

        Args:
            codes: Taken as they are needed.
            keys: What, beside the seed, decides each answer's random stream.

        Returns:
            As :func:`complete`.
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
        filled = fill_speech(self.model, codes, [self.voice] * len(codes), keys, self.settings, self.seed)
        return complete(self.model.config, self.decoder, codes, filled)


@torch.inference_mode()
def complete(
    stage: AcousticConfig, decoder: Any, codes: Sequence[np.ndarray], filled: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """What the codec's main decoder is to be given of what a stage filled.

    Args:
        stage: The stage's configuration.
        decoder: The codec that makes sound.
        codes: (n, F) int64 of each item, as they were given to the stage.
        filled: What `fill_speech` made of them.

    Returns:
        All books (K, F) int64 of each as they are; latents that were predicted with those of the codes, (D, F) float32.
        Of a stage with another decoder what it filled alone: the given codes are none of that decoder's.
    """
    if stage.decoder is not None:
        return [item if np.issubdtype(item.dtype, np.floating) else item[1:] for item in filled]
    device = next(iter(decoder.parameters())).device
    found = []
    for given, item in zip(codes, filled, strict=True):
        if np.issubdtype(item.dtype, np.floating):
            own = decoder.latents_of(torch.from_numpy(given)[None].to(device))[0]
            item = item + own.float().cpu().numpy()
        found.append(item)
    return found


def load_decoder(stage: AcousticConfig, tokenizer: Any, device: str) -> Any:
    """The codec that makes sound of what a stage fills: the tokenizer whose codes are given, or another.

    Raises:
        AcousticError: The other one is not the one that the stage was trained with.
    """
    facts = stage.other_decoder
    if facts is None:
        return tokenizer
    decoder = load_tokenizer(facts.tokenizer, device)
    if decoder.fingerprint(facts.precision) != facts.fingerprint:
        raise AcousticError(
            f"acoustic: the stage speaks through the decoder of {facts.tokenizer}, which is another one by now; put "
            "back the one it was trained with, or train a stage with it (`slm train-acoustic decoder_corpus=...`)"
        )
    return decoder


def voice_codes(
    stage: AcousticConfig, tokenizer: Any, decoder: Any, waveform: np.ndarray, precision: str
) -> np.ndarray:
    """The codes (K, P) that a stage reads of a voice (S,) at the tokenizer's rate, `precision` the tokenizer's."""
    device = next(iter(decoder.parameters())).device.type
    given = encode_batch(tokenizer, [waveform], precision, device)[0]
    if stage.other_decoder is None:
        return given
    heard = resample(waveform, tokenizer.config.sampling_rate, decoder.config.sampling_rate)
    return joined_codes(given, encode_batch(decoder, [heard], stage.other_decoder.precision, device)[0])


def read_voice(source: Utterance | str | Path, stage: AcousticConfig, sampling_rate: int) -> np.ndarray:
    """The loudest `max_prompt_s` of a recording, resampled and mixed to mono: (S,).

    Raises:
        AudioError: It is missing, no audio, silent, or shorter than `min_prompt_s`.
    """
    name = source.name if isinstance(source, Utterance) else str(source)
    return loudest_part(load_audio(source, sampling_rate), stage, sampling_rate, name)


def loudest_part(waveform: np.ndarray, stage: AcousticConfig, sampling_rate: int, name: str) -> np.ndarray:
    """The loudest `max_prompt_s` of a voice (S,); `name` is for messages. Raises AudioError as `read_voice`."""
    if is_silent(waveform):
        raise AudioError(f"{name}: silent (nothing above -50 dB): give a recording in which the speaker is heard")
    seconds = len(waveform) / sampling_rate
    if seconds < stage.min_prompt_s:
        raise AudioError(
            f"{name}: {seconds:.2f} s are too short for a voice: the stage has learnt from {stage.min_prompt_s:g} s "
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
    stage.check_given(vocabulary.n_codebooks)
    try:
        waveform = read_voice(config.voice, stage, tokenizer.config.sampling_rate)
    except AudioError as error:
        raise AudioError(f"voice: {error}") from error
    decoder = load_decoder(stage, tokenizer, device)
    codes = voice_codes(stage, tokenizer, decoder, waveform, vocabulary.precision)
    return AcousticVoice(model, decoder, codes, config.acoustic_decoding, config.decoding.seed)
