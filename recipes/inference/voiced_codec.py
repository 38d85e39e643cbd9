"""A tokenizer with an acoustic stage behind it, as a codec whose `decode` takes the voice to speak in.

    codec = load_voiced_codec("runs/acoustic/model")
    codes = codec.encode(input_values).audio_codes
    sound = codec.decode(codes[:, :1], reference=recording).audio_values

Shapes: B items, S samples, n books that are given, F code frames, P samples of a reference.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recipes.inference.acoustic import complete, load_decoder, loudest_part, voice_codes
from recipes.inference.speech_files import padded
from slm.acoustic.configuration import AcousticError
from slm.acoustic.pieces import AcousticDecoding
from slm.acoustic.stages import Stage, fill_speech, load_acoustic_model
from tokenizer import load_tokenizer
from tokenizer.protocol import LMSPTDecoderOutput, LMSPTEncoderOutput, code_mask, trim


class VoicedCodec:
    """Follows the codec protocol (`tokenizer.protocol`); of its tokenizer's books it decodes the first ones.

    Args:
        stage: What fills the rest.
        tokenizer: Whose codes are given, on the device that all run on.
        decoder: The codec that makes sound: the tokenizer, or the one that the stage was trained to speak through.
        settings: How the stage draws.
        seed: Of what it draws, beside the codes themselves.

    Raises:
        AcousticError: Tokenizer and decoder differ in their sampling rates.
    """

    decode_paths = ("reconstruction",)
    trained = True

    def __init__(self, stage: Stage, tokenizer: Any, decoder: Any, settings: AcousticDecoding, seed: int) -> None:
        rates = [codec.config.sampling_rate for codec in (tokenizer, decoder)]
        if rates[0] != rates[1]:
            raise AcousticError(f"acoustic: codes are of {rates[0]} Hz and sound is made at {rates[1]} Hz")
        self.stage, self.tokenizer, self.decoder = stage, tokenizer, decoder
        self.settings, self.seed, self.config = settings, seed, tokenizer.config

    def encode(self, input_values: Tensor, padding_mask: Tensor | None = None) -> LMSPTEncoderOutput:
        """As the tokenizer's."""
        return self.tokenizer.encode(input_values, padding_mask)

    @torch.no_grad()
    def decode(
        self, audio_codes: Tensor, lengths: Tensor | None = None, reference: Tensor | None = None
    ) -> LMSPTDecoderOutput:
        """Codes in the voice of a recording; a batch equals its single items.

        Args:
            audio_codes: (B, n, F) int64, -1 past an item's length.
            lengths: (B,) samples to keep of each item; None keeps all frames.
            reference: (B, 1, P), or (1, 1, P) for all, at `config.sampling_rate`, without padding: who speaks. None:
                as the tokenizer decodes by itself.

        Raises:
            AcousticError: n does not suit the stage.
            AudioError: A reference is silent or too short.
            ValueError: Shapes or codes are wrong.
        """
        if reference is None:
            return self.tokenizer.decode(audio_codes, lengths)
        mask = code_mask(audio_codes, list(self.tokenizer.config.codebook_sizes))
        batch, _, n_frames = audio_codes.shape
        if reference.ndim != 3 or reference.shape[1] != 1 or reference.shape[0] not in (1, batch):
            raise ValueError(f"reference must be of shape (1 or {batch}, 1, P), not {tuple(reference.shape)}")
        frames = [n_frames] * batch if mask is None else mask.sum(dim=1).tolist()
        items = [row[:, :n].cpu().numpy().astype(np.int64) for row, n in zip(audio_codes, frames, strict=True)]
        voices = [self._voice(recording[0].float().cpu().numpy(), n) for n, recording in enumerate(reference)]
        keys = [hashlib.sha256(item.tobytes()).hexdigest() for item in items]
        filled = fill_speech(self.stage, items, voices * (batch // len(voices)), keys, self.settings, self.seed)
        given, valid = padded(complete(self.stage.config, self.decoder, items, filled))
        given, valid = given.to(audio_codes.device), valid.to(audio_codes.device)
        latents = given.is_floating_point()
        found = self.decoder.decode_latents(given, valid) if latents else self.decoder.decode(given)
        hop = round(self.config.sampling_rate / self.config.frame_rate)
        return LMSPTDecoderOutput(audio_values=trim(found.audio_values[:, 0, : n_frames * hop], mask, lengths, hop))

    def _voice(self, waveform: np.ndarray, number: int) -> np.ndarray:
        config, rate = self.stage.config, self.config.sampling_rate
        part = loudest_part(waveform, config, rate, f"reference {number}")
        return voice_codes(config, self.tokenizer, self.decoder, part, config.precision)


def load_voiced_codec(
    folder: str | Path, device: str = "cpu", settings: AcousticDecoding | None = None, seed: int = 0
) -> VoicedCodec:
    """The acoustic stage that `slm train-acoustic` wrote (`run_dir/model`), with the tokenizers that it names.

    Raises:
        AcousticError: There is no such stage, or a tokenizer is not the one that it was trained with.
    """
    stage = load_acoustic_model(folder, device)
    tokenizer = load_tokenizer(stage.config.tokenizer, device)
    stage.config.check_fingerprint(tokenizer.fingerprint(stage.config.precision), f"{stage.config.tokenizer} by now")
    decoder = load_decoder(stage.config, tokenizer, device)
    return VoicedCodec(stage, tokenizer, decoder, settings or AcousticDecoding(), seed)
