"""The row `acoustic stage` of `slm evaluate`: book 0 of a recording, its other books filled in its speaker's voice.

Shapes: K books, F code frames, D latent channels, S samples; codes (K, F), latents (D, F), waveforms (S,).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from recipes.config import ConfigError
from recipes.inference.acoustic import complete, load_decoder, read_voice, voice_codes
from recipes.runs.logs import log
from slm.acoustic.pieces import AcousticDecoding
from slm.acoustic.stages import fill_speech, load_acoustic_model
from tokenizer.data.utterances import AudioError, Utterance


class SpeakerVoices:
    """An acoustic stage and a voice for each utterance: another recording of the same speaker.

    A speaker's first two usable recordings are the voices: the second is that of the first, the first that of all
    others. An utterance whose speaker has no other usable recording is not filled, and counts as failed.

    Args:
        folder: The stage.
        tokenizer: On `device`; the stage must fill its codes.
        utterances: The test set.
        settings: Rounds and temperature of the decoding.
        precision: Of the encoder.
        device: Where the tokenizer is.
        seed: Of the decoding.

    Raises:
        AcousticError: There is no such stage, or it fills another tokenizer's codes.
        ConfigError: No utterance has another one of its speaker (or the test set names no speakers).
    """

    def __init__(
        self,
        folder: str,
        tokenizer: Any,
        utterances: Sequence[Utterance],
        settings: AcousticDecoding,
        precision: str,
        device: str,
        seed: int,
    ) -> None:
        self.model = load_acoustic_model(folder, device)
        self.model.config.check_fingerprint(tokenizer.fingerprint(precision), "the tokenizer of this evaluation")
        self.tokenizer, self.settings, self.precision, self.device = tokenizer, settings, precision, device
        self.decoder = load_decoder(self.model.config, tokenizer, device)
        self.seed = seed
        self.by_speaker: dict[str, list[Utterance]] = {}
        self.speakers = {utterance.id: utterance.speaker for utterance in utterances}
        for utterance in utterances:
            if utterance.speaker:
                self.by_speaker.setdefault(utterance.speaker, []).append(utterance)
        if not any(len(same) > 1 for same in self.by_speaker.values()):
            raise ConfigError(
                "acoustic: no utterance has another one of its speaker to take the voice from; name speakers in the "
                "manifest, or score more utterances (limit)"
            )
        self._voices: dict[str, list[tuple[str, np.ndarray]]] = {}

    def voice(self, utterance_id: str) -> np.ndarray | None:
        """The codes (K, P) of another recording of the speaker; None where there is none that can be used."""
        speaker = self.speakers.get(utterance_id, "")
        if speaker not in self._voices:
            self._voices[speaker] = self._encode(self.by_speaker.get(speaker, []))
        return next((codes for name, codes in self._voices[speaker] if name != utterance_id), None)

    def _encode(self, utterances: Sequence[Utterance]) -> list[tuple[str, np.ndarray]]:
        """The first two of a speaker's recordings that can be used, encoded."""
        found: list[tuple[str, np.ndarray]] = []
        for utterance in utterances:
            try:
                waveform = read_voice(utterance, self.model.config, self.tokenizer.config.sampling_rate)
            except AudioError:
                continue
            parts = (self.model.config, self.tokenizer, self.decoder, waveform, self.precision)
            found.append((utterance.id, voice_codes(*parts)))
            if len(found) == 2:
                break
        return found

    def filled(self, names: Sequence[str], codes: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """What is to be decoded (`complete`) of the utterances that have a voice, from book 0 of their codes (K, F)."""
        voices = {name: voice for name in names if (voice := self.voice(name)) is not None}
        for name in names:
            if name not in voices:
                log.warning("acoustic stage: %s has no other recording of its speaker: counted as failed", name)
        kept = {name: item[:1].astype(np.int64) for name, item in zip(names, codes, strict=True) if name in voices}
        if not kept:
            return {}
        given = list(kept.values())
        filled = fill_speech(self.model, given, list(voices.values()), list(kept), self.settings, self.seed)
        return dict(zip(kept, complete(self.model.config, self.decoder, given, filled), strict=True))
