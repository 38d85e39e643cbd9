"""The codec protocol: configuration, outputs and checks of input that LM-SPT and the other codecs share.

`encode(input_values, padding_mask)` gives codes, `decode(audio_codes, lengths, reference)` a waveform. `reference` is a
recording of the voice to speak in, for a codec with a second stage behind it; others refuse it.

Shapes: B items, S samples, k books (k <= K), F code frames.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput

# What a codec's `decode_paths` may name: the ways from codes to a waveform, by the names of result tables' rows.
ALL_DECODE_PATHS = ("reconstruction", "semantic_reconstruction", "resynthesis")


@dataclass(frozen=True)
class CodecConfig:
    """What the protocol asks of a tokenizer's `config`: exact numbers, whatever the wrapped model calls them.

    Args:
        model_type: the kind of model, as its config.json says.
        sampling_rate: Hz of input and output.
        hop_length: samples per code frame.
        codebook_sizes: entries of each book.
    """

    model_type: str
    sampling_rate: int
    hop_length: int
    codebook_sizes: list[int]

    @property
    def frame_rate(self) -> float:
        """Code frames per second, not rounded."""
        return self.sampling_rate / self.hop_length

    @property
    def num_codebooks(self) -> int:
        return len(self.codebook_sizes)

    @property
    def bitrate_bps(self) -> float:
        """Bits per second of all books, each code sent with log2(size) bits."""
        return self.frame_rate * sum(math.log2(size) for size in self.codebook_sizes)


@dataclass
class LMSPTEncoderOutput(ModelOutput):
    """Codes (B, K, F) int64 with -1 past an item's length, and their mask (B, F) bool."""

    audio_codes: Tensor | None = None
    audio_codes_mask: Tensor | None = None


@dataclass
class LMSPTDecoderOutput(ModelOutput):
    """Samples (B, 1, S) in fp32, zero past an item's length."""

    audio_values: Tensor | None = None


def item_lengths(input_values: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Samples of each item, as int64 (B,).

    Args:
        input_values: (B, 1, S), right-padded.
        padding_mask: (B, S), true on each item's samples, which come first; None where all are.

    Raises:
        ValueError: a shape is wrong, there is no sample, or an item's mask is empty or has holes.
    """
    batch, length = _batch_and_samples(input_values)
    if padding_mask is None:
        return torch.full((batch,), length, device=input_values.device)
    if padding_mask.shape != (batch, length):
        raise ValueError(f"padding_mask must be of shape {(batch, length)}, not {tuple(padding_mask.shape)}")
    valid = padding_mask.to(input_values.device).bool()
    lengths = valid.sum(dim=1)
    if not bool(lengths.all()):
        items = (lengths == 0).nonzero().flatten().tolist()
        raise ValueError(f"padding_mask marks no sample of item(s) {items}")
    positions = torch.arange(length, device=valid.device)
    if not bool((valid == (positions < lengths[:, None])).all()):
        raise ValueError("padding_mask must mark the first samples of each item (right padding, no holes)")
    return lengths


def check_lengths(input_values: Tensor, padding_mask: Tensor | None, lengths: Sequence[int]) -> None:
    """Raises ValueError where a shape is wrong, or `lengths` do not say how many samples each item has, from 1 to S."""
    batch, length = _batch_and_samples(input_values)
    if padding_mask is not None:
        raise ValueError("padding_mask and lengths say the same: give one of them")
    if len(lengths) != batch or not all(1 <= n <= length for n in lengths):
        raise ValueError(f"lengths must be {batch} numbers of samples from 1 to {length}, not {list(lengths)}")


def _batch_and_samples(input_values: Tensor) -> tuple[int, int]:
    """B and S of waveforms. Raises ValueError where there are none."""
    if input_values.ndim != 3 or input_values.shape[1] != 1:
        raise ValueError(f"input_values must be of shape (B, 1, S), not {tuple(input_values.shape)}")
    batch, _, length = input_values.shape
    if not batch or not length:
        raise ValueError(f"input_values holds no samples: its shape is {tuple(input_values.shape)}")
    return batch, length


def code_mask(codes: Tensor, sizes: Sequence[int]) -> Tensor | None:
    """Checks codes (B, k, F) against the books' sizes; returns their frame mask (B, F), None where all are valid.

    Raises:
        ValueError: a wrong shape or type, more books than there are, a code out of its book's range, books that differ
            in where -1 begins, or -1 before a valid frame.
    """
    if codes.ndim != 3 or 0 in codes.shape or codes.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"audio_codes must be integers of shape (B, k, F), none of them 0, not {codes.dtype} {tuple(codes.shape)}"
        )
    if codes.shape[1] > len(sizes):
        raise ValueError(f"audio_codes has {codes.shape[1]} books, the tokenizer has {len(sizes)}")
    for book, size in zip(range(codes.shape[1]), sizes, strict=False):
        low, high = int(codes[:, book].min()), int(codes[:, book].max())
        if low < -1 or high >= size:
            raise ValueError(
                f"book {book} holds code {high if high >= size else low}; its codes go from 0 to {size - 1}, with "
                "-1 past an item's length"
            )
    mask = codes[:, 0] >= 0
    if bool(mask.all()) and bool((codes >= 0).all()):
        return None
    if bool(((codes >= 0) != mask[:, None]).any()):
        raise ValueError("audio_codes: the books of an item differ in where -1 begins")
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()) or not bool(mask[:, 0].all()):
        raise ValueError("audio_codes: -1 may stand only past an item's last code, and each item needs one code")
    return mask


def refuse_reference(reference: Tensor | None) -> None:
    """Raises ValueError where a codec that decodes codes alone is given a voice to speak in."""
    if reference is not None:
        raise ValueError(
            "reference: this codec decodes codes as they are, whoever said them. A voice is given by a second stage "
            "behind it: `slm train-acoustic` trains one, recipes.inference.voiced_codec loads it as a codec"
        )


def trim(samples: Tensor, mask: Tensor | None, lengths: Tensor | None, hop: int) -> Tensor:
    """Cuts samples (B, F * hop) to `lengths`: (B, 1, largest length), zero past each; None keeps them whole.

    Raises:
        ValueError: the lengths are not one per item, or reach further than the item's codes.
    """
    if lengths is None:
        return samples[:, None]
    batch, total = samples.shape
    lengths = torch.as_tensor(lengths, device=samples.device)
    reach = torch.full((batch,), total, device=samples.device) if mask is None else mask.sum(dim=1) * hop
    if lengths.shape != (batch,) or bool(((lengths < 0) | (lengths > reach)).any()):
        raise ValueError(
            f"lengths must be {batch} numbers of samples within what the codes give ({reach.tolist()}), "
            f"not {lengths.tolist()}"
        )
    longest = int(lengths.max())
    positions = torch.arange(longest, device=samples.device)
    return samples[:, None, :longest].masked_fill((positions >= lengths[:, None])[:, None], 0.0)
