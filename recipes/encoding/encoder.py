"""Waveforms to codes: a batch, a long recording chunk by chunk, and many batches in order, read ahead by threads.

On a CPU each batch of a stream is encoded by one thread, and as many batches at a time as torch has threads. Sums are
then made in one order whatever the number of cores, so that shards are the same bytes for one process of eight threads
as for eight of one; and threads that share no batch do not wait for each other at every operation.

Shapes: B items, S samples, s of one block, K books, F frames; waveforms (S,), codes (K, F).
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recipes.encoding.copies import columns_of_copy
from recipes.encoding.plan import Batch, Item, Shard, bucket
from tokenizer.data.audio import load_audio
from tokenizer.data.utterances import AudioError
from tokenizer.long_form.chunking import can_chunk, encode_blocks, encode_long
from tokenizer.long_form.long_audio import LongAudio
from tokenizer.precision import autocast, precision_agreement


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


Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Encoder:
    """Reads and encodes batches.

    Args:
        tokenizer: any tokenizer behind the codec protocol, on `device`.
        precision: fp32, bf16 or fp16.
        device: where the tokenizer is.
        batch_seconds: longer recordings are read and encoded in chunks of this length, where the tokenizer allows it.
        max_duration_s: longer ones are set aside; None: no limit.
        strict: raise at the first recording that cannot be used, in place of setting it aside.
        n_readers: threads that read; 0: each batch is read by the thread that encodes it.
    """

    tokenizer: Any
    precision: str
    device: str
    batch_seconds: float
    max_duration_s: float | None = None
    strict: bool = False
    n_readers: int = 2

    @cached_property
    def _chunks(self) -> bool:
        return can_chunk(self.tokenizer)

    def read(self, items: Batch) -> list[np.ndarray | LongAudio | AudioError]:
        """The waveform (S,) of each item, a LongAudio where it is to be cut in chunks, or the error that says why not.

        Raises:
            AudioError: with `strict`, the first.
        """
        rate = self.tokenizer.config.sampling_rate
        found: list[Any] = []
        for item in items:
            try:
                if self._chunks and item.duration_s > self.batch_seconds:
                    found.append(LongAudio(item.utterance, rate, self.max_duration_s))
                else:
                    found.append(item.variation.apply(load_audio(item.utterance, rate, self.max_duration_s), rate))
            except AudioError as error:
                if self.strict:
                    raise
                found.append(error)
        return found

    def stream(self, batches: Iterable[Batch]) -> Iterator[tuple[Rows, Rows]]:
        """Each batch's rows for the coded corpus and the rows that say what was set aside, in the batches' order.

        Raises:
            AudioError: with `strict`, as `read`.
        """
        threads = torch.get_num_threads()
        n_encoders = threads if self._on_cpu else 1
        readers, encoders = ThreadPoolExecutor(max(1, self.n_readers)), ThreadPoolExecutor(n_encoders)
        waiting: deque[Future] = deque()
        try:
            for items in batches:
                read = readers.submit(self.read, items) if self.n_readers else None
                waiting.append(encoders.submit(self._encode, items, read))
                if len(waiting) > n_encoders + self.n_readers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            readers.shutdown(cancel_futures=True)
            encoders.shutdown(cancel_futures=True)
            if self._on_cpu:
                torch.set_num_threads(threads)

    @property
    def _on_cpu(self) -> bool:
        return torch.device(self.device).type == "cpu"

    def _encode(self, items: Batch, read: Future | None) -> tuple[Rows, Rows]:
        if self._on_cpu and torch.get_num_threads() != 1:
            torch.set_num_threads(1)  # counts for this thread of the pool
        waveforms = self.read(items) if read is None else read.result()
        skipped = [
            {"id": item.id, "file": item.utterance.name, "reason": str(error)}
            for item, error in zip(items, waveforms, strict=True)
            if isinstance(error, AudioError)
        ]
        good = [(i, w) for i, w in zip(items, waveforms, strict=True) if not isinstance(w, AudioError)]
        return [self._row(*parts) for parts in self._codes(good)], skipped

    def _codes(self, good: list[tuple[Item, Any]]) -> list[tuple[Item, np.ndarray, float]]:
        """Each item's codes and seconds."""
        if not good:
            return []
        if isinstance(good[0][1], LongAudio):  # longer than a batch, so alone in it
            item, recording = good[0]
            blocks = item.variation.blocks(recording)
            codes, duration = encode_recording(self.tokenizer, blocks, self.batch_seconds, self.precision, self.device)
            return [(item, codes, duration)]
        waveforms, rate = [waveform for _, waveform in good], self.tokenizer.config.sampling_rate
        n_samples = round(bucket(max(map(len, waveforms)) / rate) * rate)
        codes = encode_batch(self.tokenizer, waveforms, self.precision, self.device, n_samples)
        return [(item, c, len(waveform) / rate) for (item, waveform), c in zip(good, codes, strict=True)]

    def _row(self, item: Item, codes: np.ndarray, duration: float) -> dict[str, Any]:
        utterance = item.utterance
        columns = columns_of_copy(utterance.columns, item.variation, self.tokenizer.config.sampling_rate)
        row = {"id": item.id, "text": utterance.text, "speaker": utterance.speaker, "duration": duration}
        return row | {"audio_codes": codes, "columns": columns}


def return_free_memory() -> None:
    """Gives the system what glibc holds as free: holes between batches of many sizes, and more of them with time."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def measure_agreement(encoder: Encoder, shards: dict[str, list[Shard]]) -> list[float] | None:
    """How far the codes of one batch of middling length, the same in every run, are fp32's; None: nothing to read."""
    every = [batch for split in shards.values() for shard in split for batch in shard]
    middle = len(next(iter(shards.values()))[0]) // 2  # of the first shard
    for batch in itertools.chain(every[middle:], every[:middle]):
        waveforms = []
        for item, waveform in zip(batch, encoder.read(batch), strict=True):
            if isinstance(waveform, LongAudio):
                waveform = _beginning(item, waveform, encoder.batch_seconds)
            if not isinstance(waveform, AudioError):
                waveforms.append(waveform)
        if waveforms:
            values, mask = (part.to(encoder.device) for part in pad_batch(encoder.tokenizer, waveforms))
            return precision_agreement(encoder.tokenizer, values, mask, encoder.precision)
    return None


def _beginning(item: Item, recording: LongAudio, seconds: float) -> np.ndarray:
    wanted, parts = round(seconds * recording.sampling_rate), []
    for block in item.variation.blocks(recording):
        parts.append(block.numpy())
        if sum(map(len, parts)) >= wanted:
            break
    return np.concatenate(parts)[:wanted]
