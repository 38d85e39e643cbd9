"""Which recording stands at each position of a training: sources mixed by weight, listed or streamed.

Position n of the training is sample `n % batch_size` of step `n // batch_size`, whatever the number of processes and
of accumulations. What stands there depends on (seed, n) alone.

Shapes: S samples of one mono waveform, float32.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from tokenizer.data.manifest import check_utterances, read_source
from tokenizer.data.pieces import AudioStore, Part, Recording
from tokenizer.data.streams import Stream, stream_has_split, stream_head
from tokenizer.data.utterances import AudioError, DataError, DataSource, Utterance

logger = logging.getLogger(__name__)

BLOCK = 1000
CACHE_BYTES = 2 << 30
VALID_SEED = 0  # not the training's: runs of several seeds are validated on the same recordings
Key = tuple[int, tuple[Utterance, ...]]  # a position, and for streamed rows the row itself with its stand-in


class Mixture:
    """Deals positions out to sources: in every block of 1000 by their weights, in an order drawn from the seed.

    Args:
        weights: one per source, above 0.
        seed: of the order.

    Raises:
        ValueError: if a source would get less than one position in a block.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        exact = BLOCK * np.asarray(weights, dtype=np.float64) / sum(weights)
        counts = np.floor(exact).astype(int)
        # what rounding down leaves goes to the largest remainders
        counts[np.argsort(counts - exact, kind="stable")[: BLOCK - counts.sum()]] += 1
        if counts.min() < 1:
            raise ValueError(f"weights {list(weights)}: the smallest must be at least 1/{BLOCK} of their sum")
        self.counts, self.seed = tuple(counts.tolist()), seed

    def place(self, position: int) -> tuple[int, int]:
        """The source that position takes from, and how many positions before it took from the same."""
        if len(self.counts) == 1:
            return 0, position
        block, offset = divmod(position, BLOCK)
        sources, ranks = _dealt(self.counts, self.seed, block)
        source = int(sources[offset])
        return source, block * self.counts[source] + int(ranks[offset])


@lru_cache(maxsize=4)
def _dealt(counts: tuple[int, ...], seed: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.repeat(np.arange(len(counts)), counts)
    order = np.random.default_rng((seed, block, len(counts))).permutation(order)
    ranks = np.zeros(BLOCK, dtype=np.int64)
    for source in range(len(counts)):
        own = order == source
        ranks[own] = np.arange(own.sum())
    return order, ranks


class TrainingAudio:
    """The recordings of a training, addressed by position.

    `key` is called in the main process, in rising order of position: it reads the streams. `recording` decodes, in
    whichever process loads the data.
    """

    def __init__(self, parts: Sequence[AudioStore | Stream], weights: Sequence[float], sampling_rate: int, seed: int):
        self.parts, self.sampling_rate, self.seed = list(parts), sampling_rate, seed
        self.mixture = Mixture(weights, seed)
        self._failed: set[str] = set()
        self._last_readable: dict[int, Utterance] = {}  # of each stream the last row that could be read

    @property
    def n_failed(self) -> int:
        """Recordings that this process could not read."""
        return len(self._failed) + sum(part.n_failed for part in self.parts if isinstance(part, AudioStore))

    @property
    def hours(self) -> float:
        """Hours of the listed recordings, as far as they say their duration; 0 with a stream, which has no end."""
        if any(isinstance(part, Stream) for part in self.parts):
            return 0.0
        return sum(u.duration or 0.0 for part in self.parts for u in part.utterances) / 3600

    def describe(self) -> str:
        """How many recordings, and with several sources which fraction of the crops each gives."""
        counts = [f"{len(p)}" if isinstance(p, AudioStore) else f"stream of {p.source.path}" for p in self.parts]
        if len(counts) == 1:
            return f"{counts[0]}, {self.hours:.2f} h" if isinstance(self.parts[0], AudioStore) else counts[0]
        return "; ".join(
            f"{c} ({n / BLOCK:.1%} of the crops)" for c, n in zip(counts, self.mixture.counts, strict=True)
        )

    def close(self) -> None:
        """Ends the streams."""
        for part in self.parts:
            if isinstance(part, Stream):
                part.close()

    def key(self, position: int) -> Key:
        """What `recording` needs for a position; for a streamed source it takes the row from the stream."""
        source, k = self.mixture.place(position)
        part = self.parts[source]
        return position, part.item(k) if isinstance(part, Stream) else ()

    def recording(self, key: Key, part: Part = lambda n_samples: (0, n_samples)) -> tuple[Utterance, np.ndarray]:
        """The utterance of a key and the part asked for of its waveform (S,); where it cannot be read, another's.

        Args:
            key: what `key` gave.
            part: given the number of samples of the recording, where to begin and to end. Little else is decoded. It
                may be asked several times; the last answer holds.

        Raises:
            AudioError: if no recording of a list can be read, or of a stream none that this process has asked for yet.
        """
        position, rows = key
        source, k = self.mixture.place(position)
        listed = self.parts[source]
        if isinstance(listed, AudioStore):
            return listed.readable(epoch_item(k, len(listed), self.seed), part)
        # The last resort, and the only one that depends on what this very process has read before.
        fallback = [self._last_readable[source]] if source in self._last_readable else []
        for row in [*rows, *fallback]:
            try:
                found = Recording(row, self.sampling_rate)
                samples = found.piece(*part(found.n_samples))
            except AudioError as error:
                if row.id not in self._failed:
                    self._failed.add(row.id)
                    logger.warning("left out: %s", error)
            else:
                self._last_readable[source] = row
                return row, samples
        raise AudioError(
            f"{listed.source.path}: of its streamed rows {', '.join(row.id for row in rows)} none can be read, nor any "
            "before them; the warnings above say why. Check data.N.audio_column, remove or repair those rows, or take "
            "the source as a list (data.N.stream=false), which passes over any number of unreadable rows"
        )

    def state_dict(self) -> dict[str, list[list[int]]]:
        """Where the streams' epochs began; positions need no state."""
        return {"epoch_starts": [part.epoch_starts for part in self.parts if isinstance(part, Stream)]}

    def load_state_dict(self, state: dict[str, list[list[int]]]) -> None:
        """Restores `state_dict`."""
        streams = [part for part in self.parts if isinstance(part, Stream)]
        for stream, starts in zip(streams, state["epoch_starts"], strict=True):
            stream.epoch_starts = list(starts)


def training_audio(
    sources: Sequence[DataSource],
    sampling_rate: int,
    seed: int,
    keep: Callable[[Utterance], bool] | None = None,
    needs_text: bool = True,
    cache_bytes: int = CACHE_BYTES,
) -> TrainingAudio:
    """The training recordings of all sources, mixed.

    Without weights all listed recordings form one list, so that each counts the same.

    Args:
        sources: listed or streamed.
        sampling_rate: of the waveforms, in Hz.
        seed: of the order.
        keep: take only the listed recordings of which it is true.
        needs_text: refuse listed tables without a text column.
        cache_bytes: of decoded audio kept in memory, by each process that decodes: a loader's workers each keep theirs.

    Raises:
        DataError: if a source cannot be read or is a hub set without the training split, or if some but not all of
            those with training data have a weight.
    """
    lists = [[] if source.stream else read_source(source, "train", needs_text) for source in sources]
    lists = [[u for u in own if keep is None or keep(u)] for own in lists]
    everything = [utterance for own in lists for utterance in own]
    used = [i for i, s in enumerate(sources) if lists[i] or (s.stream and stream_has_split(s, "train"))]
    if everything or not used:
        check_utterances(everything, sources, "train")
    weights = [sources[i].weight for i in used]
    if all(lists[i] and sources[i].weight is None for i in used):
        return TrainingAudio([AudioStore(everything, sampling_rate, cache_bytes)], [1.0], sampling_rate, seed)
    names = [sources[i].path for i in used]
    missing = [name for name, weight in zip(names, weights, strict=True) if weight is None]
    if missing and len(used) > 1:
        raise DataError(
            f"no weight for {', '.join(missing)}: where sources are weighted or streamed, each with training data "
            "needs one (data.N.weight), its share of the training"
        )
    cache = cache_bytes // len(used)
    parts = [
        AudioStore(lists[i], sampling_rate, cache) if lists[i] else Stream(sources[i], "train", seed) for i in used
    ]
    try:
        return TrainingAudio(parts, [weight or 1.0 for weight in weights], sampling_rate, seed)
    except ValueError as error:
        raise DataError(f"data: {error}") from None


def validation_utterances(sources: Sequence[DataSource], limit: int) -> list[tuple[str, list[Utterance]]]:
    """The valid split of each source that has one, by its path: what a validation takes crops of, in turn.

    A listed source's recordings come in an order drawn once and for all, so that the first few are spread over the
    whole; of a streamed one the first `limit` rows are taken. Texts are not needed. A source that cannot be read is
    left out, with a warning.

    Raises:
        DataError: if no source has any, or if two listed recordings share an id.
    """
    found = []
    for source in sources:
        try:
            if source.stream:
                own = stream_head(source, "valid", limit)
            else:
                listed = read_source(source, "valid", needs_text=False)
                own = [listed[i] for i in np.random.default_rng(VALID_SEED).permutation(len(listed))]
        except DataError as error:
            logger.warning("not validated on: %s", error)
            continue
        found.append((source, own))
    listed = [utterance for source, own in found if not source.stream for utterance in own]
    if listed or not any(own for _, own in found):
        check_utterances(listed, sources, "valid")
    return [(source.path, own) for source, own in found if own]


def epoch_item(position: int, n_items: int, seed: int) -> int:
    """Which item stands at `position` of an endless training order: a new permutation of all items each epoch.

    It depends on (seed, position) alone, so accumulation, resume and the number of processes do not change it.
    """
    epoch, offset = divmod(position, n_items)
    return int(_permutation(seed, epoch, n_items)[offset])


@lru_cache(maxsize=32)  # each of a mixture's sources asks for its own, at the turn of an epoch for two
def _permutation(seed: int, epoch: int, n_items: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n_items)
