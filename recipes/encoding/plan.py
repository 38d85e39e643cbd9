"""What ``slm encode`` has to do: utterances and their lengths, in batches, dealt to shards and processes.

The shards follow from the data and the settings alone, never from the number of processes.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor

from recipes.runs.logs import log
from tokenizer.data.manifest import no_utterances, read_source
from tokenizer.data.utterances import AudioError, DataError, DataSource, RowAudio, Utterance
from tokenizer.long_form.long_audio import LongAudio, check_readable

HEADER_THREADS = 2  # that read how long recordings are


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


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to encode: an utterance, as recorded or varied."""

    utterance: Utterance
    copy: int
    variation: Variation
    duration_s: float

    @property
    def id(self) -> str:
        return f"{self.utterance.id}#{self.copy}" if self.copy else self.utterance.id


LENGTHS_PER_OCTAVE = 16  # 2 % of a batch is padding for this
K = TypeVar("K")
Batch = list[Item]
Shard = list[Batch]


def read_splits(sources: Sequence[DataSource], splits: Iterable[str]) -> dict[str, list[Utterance]]:
    """The utterances of each split that has any. Raises DataError: two of one id, or none at all."""
    found, seen = {}, {}
    for split in splits:
        utterances = [utterance for source in sources for utterance in read_source(source, split)]
        for utterance in utterances:
            if utterance.id in seen:
                raise DataError(
                    f"id {utterance.id!r} stands for both {seen[utterance.id]} and {utterance.name}: ids must differ"
                )
            seen[utterance.id] = utterance.name
        if utterances:
            found[split] = utterances
        else:
            log.info("no utterances in split %s: left out", split)
    if not found:
        raise DataError(no_utterances(list(splits), sources))
    return found


def duration_of(utterance: Utterance) -> float:
    """Seconds as the file's header says (a manifest may err); 0 where there is none, as reading will report."""
    audio = utterance.audio
    try:
        if isinstance(audio, RowAudio):
            content, path = audio.read()
            audio = content if content is not None else path
        return soundfile.info(io.BytesIO(audio) if isinstance(audio, bytes) else audio).duration
    except (soundfile.LibsndfileError, OSError, RuntimeError, TypeError, ValueError):
        return 0.0


def durations_of(utterances: Sequence[Utterance], n_threads: int) -> list[float]:
    """`duration_of` each, read in threads: a list for each thread, as a task for each file would cost more memory."""
    n_threads = max(1, n_threads)
    parts = [utterances[start::n_threads] for start in range(n_threads)]
    found = [0.0] * len(utterances)
    with ThreadPoolExecutor(n_threads) as pool:
        for start, part in enumerate(pool.map(lambda part: [duration_of(u) for u in part], parts)):
            found[start::n_threads] = part
    return found


def refuse_unreadable(utterances: Sequence[Utterance], durations: Sequence[float], strict: bool) -> None:
    """Raises AudioError where a run would end so: of one that cannot be read with `strict`, else where none can be.

    Those are looked at whose header tells no length (`durations_of`): they are broken, or were written to a pipe.
    """
    without = [utterance for utterance, seconds in zip(utterances, durations, strict=True) if not seconds]
    if not strict and len(without) < len(utterances):
        return
    n_unreadable = 0
    for utterance in without:
        try:
            check_readable(utterance)
        except AudioError:
            n_unreadable += 1
            if strict or n_unreadable == len(utterances):
                raise


def data_fingerprint(splits: dict[str, list[Utterance]], durations: Iterable[float]) -> str:
    """A hash of what is said by whom and for how long, and of further columns; `durations` in the order of all splits'
    utterances.
    """
    digest, seconds = hashlib.sha256(), iter(durations)
    for split, utterances in splits.items():
        for u in utterances:
            further = [dict(u.columns)] if u.columns else []
            digest.update(json.dumps([split, u.id, u.text, u.speaker, next(seconds), *further]).encode())
    return digest.hexdigest()


def make_items(
    utterances: Sequence[Utterance], durations: Sequence[float], copies: int, seed: int, hop_length: int, rate: int
) -> list[Item]:
    """The plain copy of each utterance and `copies` - 1 varied ones, with their lengths in seconds."""
    items = []
    for copy in range(copies):
        for utterance, duration_s in zip(utterances, durations, strict=True):
            variation = Variation.draw(utterance.id, copy, seed, hop_length)
            items.append(Item(utterance, copy, variation, duration_s / variation.speed + variation.shift / rate))
    return items


def bucket(duration_s: float) -> float:
    """The length that a batch is padded to, in seconds: the next of LENGTHS_PER_OCTAVE to each doubling.

    Few lengths, and with them few shapes: oneDNN writes kernels for each shape that it meets and keeps them, which for
    a small model takes up to as long as to encode the batch, and memory as long as there are new ones.
    """
    if duration_s <= 0:
        return 0.0
    return 2 ** (math.ceil(LENGTHS_PER_OCTAVE * math.log2(duration_s)) / LENGTHS_PER_OCTAVE)


def deal(items: list[Item], batch_seconds: float, shard_size: int) -> list[Shard]:
    """Batches of like length (shortest first), dealt to shards in turn, so that every shard has short and long ones."""
    batches: list[Batch] = []
    for item in sorted(items, key=lambda item: (item.duration_s, item.id)):
        # Sorted, so the newest is the longest: the batch would be padded to its bucket.
        n_items = len(batches[-1]) + 1 if batches else 1
        if batches and n_items * bucket(item.duration_s) <= batch_seconds and n_items <= shard_size:
            batches[-1].append(item)
        else:
            batches.append([item])
    n_shards = min(math.ceil(len(items) / shard_size), len(batches))
    return [batches[index::n_shards] for index in range(n_shards)]


def assign_shards(weights: Sequence[float], n_processes: int) -> list[list[int]]:
    """Which shards (by their place in `weights`, seconds) each process encodes: the next largest to the least laden."""
    assigned: list[list[int]] = [[] for _ in range(n_processes)]
    load = [0.0] * n_processes
    for place in sorted(range(len(weights)), key=lambda place: (-weights[place], place)):
        lightest = load.index(min(load))
        assigned[lightest].append(place)
        load[lightest] += weights[place]
    return [sorted(places) for places in assigned]


def interleaved(shards: Mapping[K, Shard], n_together: int) -> Iterator[tuple[K, Batch]]:
    """Batches and the key of their shard, `n_together` shards at a time, a batch of each in turn.

    The batches that stand at one place of neighbouring shards are of like length, mostly of one shape: see `bucket`.
    """
    keys = list(shards)
    for start in range(0, len(keys), n_together):
        group = keys[start : start + n_together]
        for batches in itertools.zip_longest(*(shards[key] for key in group)):
            yield from ((key, batch) for key, batch in zip(group, batches, strict=True) if batch is not None)
