"""Waveforms to codes, together or chunk by chunk, and the varied copies that ``slm encode`` makes of a recording.

Shapes: B items, S samples, s of one block, K books, F frames; waveforms (S,), codes (K, F).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import soxr
import torch
from torch import Tensor

from tokenizer.long_form.chunking import encode_blocks, encode_long
from tokenizer.long_form.long_audio import LongAudio
from tokenizer.precision import autocast


@dataclass(frozen=True, slots=True)
class Variation:
    """How a copy differs from the recording: a start inside a frame, another level, another speed."""

    shift: int = 0  # samples of silence in front, up to one hop
    gain: float = 1.0
    speed: float = 1.0

    @classmethod
    def draw(cls, utterance_id: str, copy: int, seed: int, hop_length: int) -> Variation:
        """The variation of a copy, a function of (seed, id, copy) alone; copy 0 is the plain recording."""
        if copy == 0:
            return PLAIN
        digest = hashlib.sha256(f"{seed}\0{copy}\0{utterance_id}".encode()).digest()
        rng = np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))
        shift = int(rng.integers(0, hop_length + 1))
        return cls(shift, float(10 ** (rng.uniform(-6, 6) / 20)), round(float(rng.uniform(0.95, 1.05)), 3))

    def apply(self, waveform: np.ndarray, sampling_rate: int) -> np.ndarray:
        """(S,) -> (S',); a gain that would clip is held at full scale."""
        if self == PLAIN:
            return waveform
        if self.speed != 1.0:
            waveform = soxr.resample(waveform, sampling_rate * self.speed, sampling_rate)
        gain = min(self.gain, 1.0 / max(float(np.abs(waveform).max()), 1e-9)) if self.gain != 1.0 else 1.0
        return np.concatenate([np.zeros(self.shift), gain * waveform]).astype(np.float32)

    def blocks(self, recording: LongAudio) -> Iterator[Tensor]:
        """The same of a long recording, in blocks (s,) that follow each other."""
        gain = min(self.gain, 1.0 / max(recording.peak, 1e-9)) if self.gain != 1.0 else 1.0
        yield torch.zeros(self.shift)
        for block in recording.blocks(self.speed):
            yield torch.from_numpy(np.asarray(gain * block, np.float32))


PLAIN = Variation()


def pad_batch(tokenizer: Any, waveforms: Sequence[np.ndarray], n_samples: int = 0) -> tuple[Tensor, Tensor]:
    """Waveforms (S,) as one batch (B, 1, S) with S at least `n_samples`, and its mask (B, S).

    What is too short for any code ends in silence.
    """
    fewest = getattr(tokenizer, "min_samples", 1)
    lengths = torch.tensor([max(len(waveform), fewest) for waveform in waveforms])
    values = torch.zeros(len(waveforms), 1, max(n_samples, int(lengths.max())))
    for row, waveform in enumerate(waveforms):
        values[row, 0, : len(waveform)] = torch.from_numpy(waveform)
    return values, torch.arange(values.shape[-1])[None] < lengths[:, None]


def encode_batch(
    tokenizer: Any,
    waveforms: list[np.ndarray],
    precision: str,
    device: str,
    n_samples: int = 0,
    chunk_s: float | None = None,
) -> list[np.ndarray]:
    """Codes (K, F) of each waveform (S,), encoded together; silence fills up what is too short for any code.

    The batch is padded to `n_samples`, or to its longest waveform where that is longer. With `chunk_s` what is longer
    than so many seconds goes through in chunks, where the tokenizer allows it: memory does not grow with the length.
    """
    values, mask = pad_batch(tokenizer, waveforms, n_samples)
    with torch.inference_mode(), autocast(precision, device):
        if chunk_s is not None and values.shape[-1] > chunk_s * tokenizer.config.sampling_rate:
            output = encode_long(tokenizer, values, chunk_s, mask)
        else:
            output = tokenizer.encode(values.to(device), mask.to(device))
    codes, valid = output.audio_codes.cpu().numpy(), output.audio_codes_mask.cpu().numpy()
    return [item[:, keep] for item, keep in zip(codes, valid, strict=True)]


def encode_recording(
    tokenizer: Any, blocks: Iterable[Tensor], chunk_s: float, precision: str, device: str
) -> tuple[np.ndarray, float]:
    """Codes (K, F) of a recording that comes in blocks (s,), encoded in chunks, and its seconds."""
    n_samples = 0

    def counted() -> Iterator[Tensor]:
        nonlocal n_samples
        for block in blocks:
            n_samples += len(block)
            yield block

    with torch.inference_mode(), autocast(precision, device):
        codes = torch.cat(list(encode_blocks(tokenizer, counted(), chunk_s)), dim=1)
    return codes.numpy(), n_samples / tokenizer.config.sampling_rate
