"""A recording through a speech tokenizer and back to a WAV, block by block, and the seconds that it takes.

Shapes: s samples of one block, K books, k of them that are decoded, F code frames.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from recipes.config import ConfigError
from recipes.encoding.encoder import encode_recording
from recipes.runs.files import disk_errors
from recipes.runs.logs import log
from tokenizer.long_form.chunking import CHUNK_S, can_chunk, decode_blocks
from tokenizer.long_form.long_audio import LongAudio


@dataclass
class Codec:
    """One tokenizer, loaded, with its name in tables and files."""

    name: str
    label: str
    model: Any
    fingerprint: str

    def ways(self) -> Iterator[tuple[str, int, int]]:
        """(output, books it reads, its sampling rate)."""
        config = self.model.config
        for way in self.model.decode_paths:
            n_books = len(config.codebook_sizes) if way == "reconstruction" else 1
            yield way, n_books, config.auxiliary_sampling_rate if way == "resynthesis" else config.sampling_rate


def encode_timed(
    codec: Codec, recording: LongAudio, chunk_s: float, precision: str, device: str
) -> tuple[np.ndarray, float]:
    """(K, F) codes of a recording at the tokenizer's rate, and the seconds without those of reading it."""
    reading = _Timed(long_enough(recording.blocks(), getattr(codec.model, "min_samples", 1)))
    started = time.perf_counter()
    codes, _ = encode_recording(codec.model, reading, chunk_s, precision, device)
    return codes, time.perf_counter() - started - reading.wall_s


def decode_timed(
    codec: Codec, codes: np.ndarray, way: str, chunk_s: float, path: Path, sampling_rate: int, most: int
) -> float:
    """Writes codes (k, F) as a WAV of at most `most` samples; returns the seconds without those of writing.

    Raises:
        ConfigError: The tokenizer gave samples that are not finite.
    """
    decoding = _Timed(_decoded(codec.model, codes, chunk_s, way == "resynthesis"))
    write_wav(path, decoding, sampling_rate, most, codec.name)
    return decoding.wall_s


@torch.inference_mode()
def warm_up(codec: Codec, precision: str, device: str) -> None:
    """Half a second there and back, so that no recording pays for a model's first call."""
    noise = 0.1 * torch.randn(codec.model.config.sampling_rate // 2, generator=torch.Generator().manual_seed(0))
    codes, _ = encode_recording(codec.model, [noise], CHUNK_S, precision, device)
    for way, n_books, _ in codec.ways():
        list(_decoded(codec.model, codes[:n_books], CHUNK_S, way == "resynthesis"))
    if not can_chunk(codec.model):
        log.info("%s cannot be cut into chunks: a recording goes through whole, memory grows with it", codec.name)


def write_wav(
    path: Path, blocks: Iterable[np.ndarray], sampling_rate: int, most: int | None = None, who: str = ""
) -> int:
    """Writes blocks (s,) as one 16-bit WAV of at most `most` samples; returns how many it holds.

    Raises:
        ConfigError: Samples that are not finite, which a tokenizer with broken weights gives; it is called `who`.
    """
    written = 0
    with disk_errors(path), soundfile.SoundFile(path, "w", sampling_rate, 1, "PCM_16", format="WAV") as file:
        for block in blocks:
            block = block[: None if most is None else most - written]
            if not np.isfinite(block).all():
                raise ConfigError(
                    f"tokenizer {who} gave NaN or infinite samples for {path.name}: its weights are broken"
                )
            file.write(np.clip(block, -1, 1))
            written += len(block)
    return written


def long_enough(blocks: Iterable[np.ndarray], fewest: int) -> Iterator[torch.Tensor]:
    """The blocks (s,), and silence behind them where all are too short for any code."""
    n_samples = 0
    for block in blocks:
        n_samples += len(block)
        yield torch.from_numpy(np.asarray(block, np.float32))
    if n_samples < fewest:
        yield torch.zeros(fewest - n_samples)


class _Timed:
    """An iterator that adds up the seconds that its items take to come."""

    def __init__(self, items: Iterable[Any]) -> None:
        self.items, self.wall_s = iter(items), 0.0

    def __iter__(self) -> _Timed:
        return self

    def __next__(self) -> Any:
        started = time.perf_counter()
        try:
            return next(self.items)
        finally:
            self.wall_s += time.perf_counter() - started


def _decoded(model: Any, codes: np.ndarray, chunk_s: float, resynthesis: bool) -> Iterator[np.ndarray]:
    """Samples (s,) of codes (k, F), block by block."""
    for samples in decode_blocks(model, torch.from_numpy(codes)[None], chunk_s, resynthesis):
        yield samples[0, 0].float().cpu().numpy()
