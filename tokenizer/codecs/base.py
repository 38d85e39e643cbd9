"""Codec, the base of every codec that is not LM-SPT's own: batches, padding, lengths and fingerprints in one place.

Shapes: B items, G items of one length, S samples, K books, k <= K of them, F code frames.

The wrapped models handle no mask, so items are encoded and decoded together only where they have the same number of
frames: a batch then equals its single items, and a padded item the unpadded one. All run in fp32 whatever the
precision: their look-ups are not guarded against less.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from tokenizer.fingerprint import add_weights
from tokenizer.precision import full_precision
from tokenizer.protocol import (
    CodecConfig,
    LMSPTDecoderOutput,
    LMSPTEncoderOutput,
    code_mask,
    item_lengths,
    refuse_reference,
    trim,
)


class Codec(nn.Module):
    """Holds a model to the codec protocol; a kind of codec fills in `encode_frames` and `decode_frames`.

    `loading.register_codec` makes it known to `load_tokenizer`.

    Attributes:
        config: sampling rate, exact frame rate, codebook sizes.
        decode_paths: the ways from codes to a waveform, of `ALL_DECODE_PATHS`. `semantic_reconstruction` stands there
            only where book 0 was trained to hold the words.
        trained: true, such codecs are only loaded with weights or need none.
    """

    decode_paths: tuple[str, ...] = ("reconstruction",)
    trained = True

    def __init__(self, model: nn.Module, config: CodecConfig, num_codebooks: int | None = None) -> None:
        super().__init__()
        sizes = config.codebook_sizes
        if num_codebooks is not None and not 1 <= num_codebooks <= len(sizes):
            raise ValueError(f"num_codebooks={num_codebooks}: {config.model_type} has 1 to {len(sizes)} books")
        self.model = model
        self.config = CodecConfig(config.model_type, config.sampling_rate, config.hop_length, sizes[:num_codebooks])

    def encode_frames(self, samples: Tensor) -> Tensor:
        """Codes (G, >= K, F) of samples (G, 1, F * hop)."""
        raise NotImplementedError

    def decode_frames(self, codes: Tensor) -> Tensor:
        """Samples (G, S) or (G, 1, S), S near F * hop, of valid codes (G, k, F)."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """The settings that decide the codes, beside the weights."""
        return _settings(self.model.config.to_diff_dict())

    @torch.no_grad()
    def encode(self, input_values: Tensor, padding_mask: Tensor | None = None) -> LMSPTEncoderOutput:
        """Codes (B, K, F), -1 past an item's length, and their mask; arguments and errors as `LMSPTModel.encode`."""
        lengths = item_lengths(input_values, padding_mask)
        hop, batch = self.config.hop_length, len(input_values)
        frames = (lengths + hop - 1) // hop
        longest = -(-input_values.shape[-1] // hop)
        codes = torch.full((batch, self.config.num_codebooks, longest), -1, device=input_values.device)
        samples = pad(input_values.float(), (0, longest * hop - input_values.shape[-1]))
        positions = torch.arange(longest * hop, device=samples.device)
        samples = samples.masked_fill((positions >= lengths[:, None])[:, None], 0.0)
        with full_precision(samples):
            for rows, n in _of_equal_length(frames):
                found = self.encode_frames(samples[rows, :, : n * hop])
                codes[rows, :, :n] = found[:, : self.config.num_codebooks, :n].to(codes)
        mask = torch.arange(longest, device=codes.device) < frames[:, None]
        return LMSPTEncoderOutput(audio_codes=codes, audio_codes_mask=mask)

    @torch.no_grad()
    def decode(
        self, audio_codes: Tensor, lengths: Tensor | None = None, reference: Tensor | None = None
    ) -> LMSPTDecoderOutput:
        """Samples (B, 1, F * hop) or the largest of `lengths`; arguments and errors as `LMSPTModel.decode`."""
        refuse_reference(reference)
        mask = code_mask(audio_codes, self.config.codebook_sizes)
        batch, _, n_frames = audio_codes.shape
        hop = self.config.hop_length
        samples = torch.zeros(batch, n_frames * hop, device=audio_codes.device)
        frames = mask.sum(dim=1) if mask is not None else torch.full((batch,), n_frames)
        with full_precision(samples):
            for rows, n in _of_equal_length(frames):
                decoded = self.decode_frames(audio_codes[rows, :, :n].long()).float().reshape(len(rows), -1)
                # odd strides fall a few samples short
                samples[rows, : n * hop] = pad(decoded, (0, max(0, n * hop - decoded.shape[-1])))[:, : n * hop]
        return LMSPTDecoderOutput(audio_values=trim(samples, mask, lengths, hop))

    def fingerprint(self, precision: str = "fp32", sound: bool = False) -> str:
        """SHA-256 of kind, books, settings and all weights, as `LMSPTModel.fingerprint` with `sound`.

        The precision is no part of it: codes are always fp32's.
        """
        digest = hashlib.sha256(json.dumps([vars(self.config), self.identity()], sort_keys=True).encode())
        add_weights(digest, self.state_dict())
        return digest.hexdigest()


def _of_equal_length(frames: Tensor) -> Iterator[tuple[list[int], int]]:
    """Rows with the same number of frames, and that number."""
    counts = frames.tolist()
    for n in sorted(set(counts)):
        yield [row for row, count in enumerate(counts) if count == n], n


def _settings(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration's values without what says only how and with which version it was saved."""
    volatile = ("transformers_version", "architectures", "_name_or_path", "dtype", "torch_dtype", "_commit_hash")
    return {
        key: _settings(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in volatile
    }
