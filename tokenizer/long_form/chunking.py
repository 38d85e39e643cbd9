"""Audio of any length in bounded memory: encode and decode in chunks that overlap by the receptive field.

Shapes: B items, S samples, s samples of one block, K books (k of them given), F code frames, f frames of one block.

A chunk of frames goes through the model together with as many frames on each side as can reach it, and only the chunk's
own are kept: they come out as if the whole had gone through (codes in at least 99.5 % of entries, waveforms to 1e-4;
what differs is the rounding of sums). A tokenizer that states no receptive field (transformers' codecs, some of which
have recurrent layers or a statistic over the whole input) takes the whole at once: exact, but its memory grows with the
length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenizer.protocol import LMSPTDecoderOutput, LMSPTEncoderOutput, code_mask, item_lengths, trim

CHUNK_S = 30.0


class Window(NamedTuple):
    """Frames start to stop go through the model; of these first to last are kept."""

    start: int
    first: int
    last: int
    stop: int


def windows(n_frames: int, size: int, reach: int) -> Iterator[Window]:
    """Cuts n_frames into chunks of `size`, each with up to `reach` frames of context on both sides."""
    for first in range(0, n_frames, size):
        last = min(first + size, n_frames)
        yield Window(max(0, first - reach), first, last, min(n_frames, last + reach))


def can_chunk(tokenizer: Any) -> bool:
    """Whether the tokenizer states finite receptive fields: then chunks equal the whole, in bounded memory."""
    fields = ("receptive_field_frames", "decoder_receptive_field_frames")
    return all(getattr(tokenizer, name, None) is not None for name in fields)


def encode_long(
    tokenizer: Any, input_values: Tensor, chunk_s: float = CHUNK_S, padding_mask: Tensor | None = None
) -> LMSPTEncoderOutput:
    """`tokenizer.encode` of waveforms of any length.

    Args:
        tokenizer: any tokenizer behind the codec protocol.
        input_values: (B, 1, S), right-padded; may lie on another device than the model, chunks are moved one by one.
        chunk_s: seconds of a chunk, its context not counted. Memory follows it.
        padding_mask: (B, S), true on each item's samples; None where all are.

    Returns:
        What `encode` gives for the whole, on the device of `input_values`.

    Raises:
        ValueError: chunk_s is not above 0, or what `encode` raises.
    """
    size = _frames_of(tokenizer, chunk_s)
    lengths = item_lengths(input_values, padding_mask)
    device, batch, total = _device(tokenizer, input_values), *input_values.shape[::2]
    if not can_chunk(tokenizer):
        mask = None if padding_mask is None else padding_mask.to(device)
        output = tokenizer.encode(input_values.to(device), mask)
        return LMSPTEncoderOutput(
            audio_codes=output.audio_codes.to(input_values.device),
            audio_codes_mask=output.audio_codes_mask.to(input_values.device),
        )
    hop, n_frames = tokenizer.config.hop_length, -(-total // tokenizer.config.hop_length)
    codes = torch.full((batch, len(tokenizer.config.codebook_sizes), n_frames), -1, device=input_values.device)
    for window in windows(n_frames, size, tokenizer.receptive_field_frames):
        rows = (lengths > window.first * hop).nonzero().flatten()
        if not len(rows):
            break  # padding alone
        part = input_values[rows, :, window.start * hop : window.stop * hop]
        mask = torch.arange(part.shape[-1], device=lengths.device) < (lengths[rows] - window.start * hop)[:, None]
        found = tokenizer.encode(part.to(device), mask.to(device)).audio_codes[:, :, window.first - window.start :]
        if window.last < n_frames:  # the last chunk keeps what there is: published lengths may fall short
            found = found[:, :, : window.last - window.first]
        codes[rows, :, window.first : window.first + found.shape[-1]] = found.to(codes)
    if not getattr(tokenizer.config, "exact_lengths", True):
        codes = codes[:, :, : tokenizer.semantic_encoder.out_length(total)]
    return LMSPTEncoderOutput(audio_codes=codes, audio_codes_mask=codes[:, 0] >= 0)


def encode_blocks(tokenizer: Any, blocks: Iterable[Tensor], chunk_s: float = CHUNK_S) -> Iterator[Tensor]:
    """Encodes one recording that is read block by block, so that it is never whole in memory.

    Args:
        tokenizer: any tokenizer behind the codec protocol.
        blocks: waveforms (s,) that follow each other, of any sizes.
        chunk_s: as in `encode_long`.

    Yields:
        Codes (K, f) that follow each other.

    Raises:
        ValueError: chunk_s is not above 0, or the blocks hold no sample.
    """
    size = _frames_of(tokenizer, chunk_s)
    if not can_chunk(tokenizer):
        whole = torch.cat(list(blocks))[None, None]
        yield tokenizer.encode(whole.to(_device(tokenizer, whole))).audio_codes[0].cpu()
        return
    hop, reach = tokenizer.config.hop_length, tokenizer.receptive_field_frames
    held = torch.zeros(0)
    context = total = 0  # frames of `held` that are there for their reach alone; samples read

    def codes_of(samples: Tensor) -> Tensor:
        return tokenizer.encode(samples[None, None].to(_device(tokenizer, samples))).audio_codes[0].cpu()

    for block in blocks:
        held, total = torch.cat([held, block]), total + len(block)
        while len(held) >= (context + size + reach) * hop:
            yield codes_of(held[: (context + size + reach) * hop])[:, context : context + size]
            done = context + size
            context = min(reach, done)
            held = held[(done - context) * hop :]
    if not total:
        raise ValueError("the blocks hold no sample")
    if len(held) > context * hop:
        yield codes_of(held)[:, context:]


def decode_blocks(
    tokenizer: Any, audio_codes: Tensor, chunk_s: float = CHUNK_S, resynthesis: bool = False
) -> Iterator[Tensor]:
    """Decodes chunk by chunk, for waveforms that are written as they come.

    Args:
        tokenizer: any tokenizer behind the codec protocol.
        audio_codes: (B, k, F), -1 past an item's length.
        chunk_s: seconds of a chunk, its context not counted.
        resynthesis: use `resynthesize` (book 0, auxiliary decoder) in place of `decode`.

    Yields:
        Samples (B, 1, s) that follow each other, on the device of `audio_codes`; zero past an item's length.

    Raises:
        ValueError: chunk_s is not above 0, or what `decode` raises.
    """
    size, config = _frames_of(tokenizer, chunk_s), tokenizer.config
    device = _device(tokenizer, audio_codes)
    decode = tokenizer.resynthesize if resynthesis else tokenizer.decode
    if not can_chunk(tokenizer):
        yield decode(audio_codes.to(device)).audio_values.to(audio_codes.device)
        return
    code_mask(audio_codes, config.codebook_sizes)
    hop = config.auxiliary_hop_length if resynthesis else config.hop_length

    def samples_of(codes: Tensor, mask: Tensor) -> Tensor:
        # Past every item one goes through for the number of samples alone.
        return decode((codes if bool(mask.any()) else codes.clamp(min=0)).to(device)).audio_values

    yield from _windowed(tokenizer, audio_codes, audio_codes[:, 0] >= 0, size, hop, samples_of)


def _windowed(
    tokenizer: Any,
    frames: Tensor,
    mask: Tensor,
    size: int,
    hop: int,
    samples_of: Callable[[Tensor, Tensor], Tensor],
) -> Iterator[Tensor]:
    """Yields the samples (B, 1, s) of codes or latents (B, k, F) under a mask (B, F), chunk by chunk."""
    lengths, n_frames = mask.sum(dim=1), frames.shape[-1]
    for window in windows(n_frames, size, tokenizer.decoder_receptive_field_frames):
        rows = (lengths > window.first).nonzero().flatten()
        read = rows if len(rows) else slice(0, 1)
        part, part_mask = frames[read, :, window.start : window.stop], mask[read, window.start : window.stop]
        found = samples_of(part, part_mask)[:, :, (window.first - window.start) * hop :]
        if window.last < n_frames:
            found = found[:, :, : (window.last - window.first) * hop]
        samples = torch.zeros(len(frames), 1, found.shape[-1], device=frames.device)
        samples[rows] = found[: len(rows)].to(samples)
        yield samples


def decode_long(
    tokenizer: Any, audio_codes: Tensor, chunk_s: float = CHUNK_S, lengths: Tensor | None = None
) -> LMSPTDecoderOutput:
    """`tokenizer.decode` of codes (B, k, F) of any length; only the waveform itself grows with it.

    Arguments and errors as in `decode_blocks` and `decode`; returns `audio_values` (B, 1, S).
    """
    return _joined(tokenizer, audio_codes, chunk_s, lengths, resynthesis=False)


def decode_latents_long(tokenizer: Any, latents: Tensor, mask: Tensor, chunk_s: float = CHUNK_S) -> LMSPTDecoderOutput:
    """`tokenizer.decode_latents` of latents (B, D, F) of any length, under a mask (B, F).

    Returns `audio_values` (B, 1, S), zero past an item's length. Raises ValueError as `decode_long`.
    """
    size, device, hop = _frames_of(tokenizer, chunk_s), _device(tokenizer, latents), tokenizer.config.hop_length

    def samples_of(part: Tensor, part_mask: Tensor) -> Tensor:
        read = part_mask.to(device) if bool(part_mask.any()) else None  # past every item, for the number of samples
        return tokenizer.decode_latents(part.to(device), read).audio_values

    if not can_chunk(tokenizer):
        return LMSPTDecoderOutput(audio_values=samples_of(latents, mask).to(latents.device))
    samples = torch.cat(list(_windowed(tokenizer, latents, mask, size, hop, samples_of)), dim=-1)[:, 0]
    return LMSPTDecoderOutput(audio_values=trim(samples, mask, None, hop))


def resynthesize_long(
    tokenizer: Any, audio_codes: Tensor, chunk_s: float = CHUNK_S, lengths: Tensor | None = None
) -> LMSPTDecoderOutput:
    """`tokenizer.resynthesize` of codes of any length, at the auxiliary rate; otherwise as `decode_long`."""
    return _joined(tokenizer, audio_codes, chunk_s, lengths, resynthesis=True)


def _joined(
    tokenizer: Any, codes: Tensor, chunk_s: float, lengths: Tensor | None, resynthesis: bool
) -> LMSPTDecoderOutput:
    if not can_chunk(tokenizer):
        decode = tokenizer.resynthesize if resynthesis else tokenizer.decode
        values = decode(codes.to(_device(tokenizer, codes)), lengths).audio_values
        return LMSPTDecoderOutput(audio_values=values.to(codes.device))
    samples = torch.cat(list(decode_blocks(tokenizer, codes, chunk_s, resynthesis)), dim=-1)[:, 0]
    hop = tokenizer.config.auxiliary_hop_length if resynthesis else tokenizer.config.hop_length
    if lengths is not None:  # published lengths may fall a few samples short
        samples = torch.nn.functional.pad(samples, (0, codes.shape[-1] * hop - samples.shape[-1]))
    return LMSPTDecoderOutput(
        audio_values=trim(samples, code_mask(codes, tokenizer.config.codebook_sizes), lengths, hop)
    )


def _frames_of(tokenizer: Any, chunk_s: float) -> int:
    if not chunk_s > 0:
        raise ValueError(f"chunk_s={chunk_s}: must be above 0 seconds")
    return max(1, round(chunk_s * tokenizer.config.frame_rate))


def _device(tokenizer: Any, other: Tensor) -> torch.device:
    parameters = tokenizer.parameters() if isinstance(tokenizer, torch.nn.Module) else iter(())
    return next((parameter.device for parameter in parameters), other.device)
