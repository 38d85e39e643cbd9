"""From an SLM's codes to sound, several answers at a time, and the formats of audio files.

Shapes: n books that the SLM speaks, F code frames, D latent channels, S samples; codes (n, F), latents (D, F),
waveforms (S,). Latents come from an acoustic stage that predicts them in place of codes; they are what is floating.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from tokenizer.long_form.chunking import can_chunk
from tokenizer.long_form.lookahead import LookaheadDecoder
from tokenizer.long_form.streaming import StreamingDecoder

DECODED_S = 60.0  # of speech decoded together, padding included; a decoder's memory grows with it


def decoded(tokenizer: Any, codes: Iterable[np.ndarray], device: str) -> Iterator[np.ndarray]:
    """Yields the waveform (S,), within [-1, 1], of each answer's codes or latents by the main decoder, in their order.

    Neighbours are decoded together, up to `DECODED_S` seconds; no more are held at once.
    """
    most = DECODED_S * tokenizer.config.frame_rate
    held: list[np.ndarray] = []
    for item in codes:
        longest = max(one.shape[1] for one in (*held, item))
        if held and (len(held) + 1) * longest > most:
            yield from _decode(tokenizer, held, device)
            held = []
        held.append(item)
    if held:
        yield from _decode(tokenizer, held, device)


@torch.inference_mode()
def _decode(tokenizer: Any, codes: Sequence[np.ndarray], device: str) -> Iterator[np.ndarray]:
    frames, mask = padded(codes)
    frames, mask = frames.to(device), mask.to(device)
    output = tokenizer.decode_latents(frames, mask) if frames.is_floating_point() else tokenizer.decode(frames)
    values = output.audio_values[:, 0].float().clamp(-1, 1).cpu().numpy()
    samples_per_frame = tokenizer.config.sampling_rate / tokenizer.config.frame_rate
    for row, item in enumerate(codes):
        # A copy: one answer that is held on to would hold all of them.
        yield values[row, : round(item.shape[1] * samples_per_frame)].copy()


def padded(items: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (n, F), or latents (D, F), as one batch and its mask (B, F); codes are padded with -1, latents with 0."""
    lengths = torch.tensor([item.shape[1] for item in items])
    latents = np.issubdtype(items[0].dtype, np.floating)
    shape, kind = (len(items), len(items[0]), int(lengths.max())), torch.float32 if latents else torch.int64
    frames = torch.full(shape, 0 if latents else -1, dtype=kind)
    for row, item in enumerate(items):
        frames[row, :, : item.shape[1]] = torch.from_numpy(item)
    return frames, torch.arange(shape[2]) < lengths[:, None]


def decoded_stream(tokenizer: Any, codes: Iterable[np.ndarray], device: str) -> Iterator[np.ndarray]:
    """Yields the waveform (s,), within [-1, 1], of codes (n, f) that come bit by bit, as soon as it is certain.

    That is at the end alone where the tokenizer states no receptive field.
    """
    decoder: Any = None
    pushed = False
    if getattr(tokenizer.config, "causal", False) and tokenizer.config.exact_lengths:
        decoder = StreamingDecoder(tokenizer)
    elif can_chunk(tokenizer):
        decoder = LookaheadDecoder(tokenizer)
    held = []
    for item in codes:
        if decoder is None:
            held.append(item)
        elif item.shape[1]:
            pushed = True
            yield _waveform(decoder.push(torch.from_numpy(item)[None].to(device)))
    if held:
        yield from _decode(tokenizer, [np.concatenate(held, axis=1)], device)
    elif pushed:
        yield _waveform(decoder.flush())


def _waveform(values: torch.Tensor) -> np.ndarray:
    return values[0, 0].float().clamp(-1, 1).cpu().numpy()


def audio_format(file: str) -> dict[str, str]:
    """soundfile's format and subtype for a file's ending, 16 bits where the format has them.

    Raises:
        ValueError: the ending names no format that can be written.
    """
    kind = {"aif": "AIFF", "opus": "OGG"}.get(ending := Path(file).suffix[1:].lower(), ending.upper())
    if kind not in soundfile.available_formats() or kind == "RAW":
        raise ValueError(f"output (-o): {file!r} must end in a format's name: .wav, .flac, .ogg, .mp3")
    subtype = "OPUS" if ending == "opus" else "PCM_16"
    return {
        "format": kind,
        "subtype": subtype if soundfile.check_format(kind, subtype) else soundfile.default_subtype(kind),
    }
