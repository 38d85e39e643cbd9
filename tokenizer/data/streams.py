"""Streamed sources: hub data sets and Parquet files read row by row through `datasets`, for what is too large to list.

The order is a function of the seed alone: `datasets` shuffles the shards and a buffer of rows anew each epoch. Every
process walks through all rows and decodes only its own, so that the number of processes does not change the data; the
rows it passes over are fetched all the same. A resumed run walks from the start of the epoch it was in to its place.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import soundfile

from tokenizer.data.audio import MIN_DURATION_S, open_audio
from tokenizer.data.tables import NoSplitError, may_lack, no_split_error
from tokenizer.data.utterances import SPLITS, AudioError, DataError, DataSource, Utterance
from tokenizer.hub import ask_hub

logger = logging.getLogger(__name__)

ROWS = "*.parquet"
NEIGHBOURS = 16  # rows of its epoch that a row's stand-ins are looked for among
STAND_INS = 2
SEARCH_ROWS = 5000  # among which those of the valid split are looked for: one process walks, the others wait for it


def stream_has_split(source: DataSource, split: str) -> bool:
    """Whether a streamed source may have rows of `split`; nothing is opened to find out.

    Raises:
        DataError: The source's split, or the one asked for, is none of ours.
    """
    if split not in SPLITS or (source.split is not None and source.split not in SPLITS):
        raise DataError(f"{source.path}: split {source.split or split!r} is not one of {', '.join(SPLITS)}")
    return source.split in (None, split)


def open_stream(source: DataSource, split: str, search: int | None = None) -> Any:
    """The rows of one split as a `datasets.IterableDataset`, their audio undecoded.

    Args:
        source: with a hub name, a .parquet file, a pattern (`folder/*.parquet`) or a folder of .parquet files; without
            `split`, the files' column `split` holds, and files without the column are train.
        split: ours; `source.hub_splits` gives the hub's name for it.
        search: look for the split's rows among the first so many of the files only.

    Raises:
        NoSplitError: if it is a hub set without such a split.
        DataError: if it cannot be opened here or lacks the audio column.
    """
    from datasets import Audio, load_dataset

    path = Path(source.path).expanduser()
    local = path.is_dir() or path.suffix == ".parquet"
    try:
        if local:
            pattern = path / ROWS if path.is_dir() else path
            files = sorted(str(file) for file in pattern.parent.glob(pattern.name))
            if not files:
                raise FileNotFoundError(f"no file fits {pattern}")
            rows = load_dataset("parquet", data_files=files, split="train", streaming=True)
        else:
            ask_hub(source.path, dataset=True)
            rows = load_dataset(source.path, source.subset, split=source.hub_splits.get(split, split), streaming=True)
        if rows.features is None:
            rows = rows._resolve_features()
    except Exception as error:  # datasets raises a dozen kinds: offline, unknown name, unknown split
        if missing := no_split_error(source, split, error):
            raise missing from None
        raise DataError(
            f"{source.path}: cannot be streamed here ({type(error).__name__}: {error}). Give a hub name (online), a "
            ".parquet file or a folder of them; other sources take stream=false"
        ) from None
    if source.audio_column not in rows.column_names:
        raise DataError(f"{source.path}: no column {source.audio_column!r} among {rows.column_names}: set audio_column")
    rows = rows.cast_column(source.audio_column, Audio(decode=False))
    if local and source.split is None:
        if "split" in rows.column_names:
            rows = rows if search is None else rows.take(search)
            rows = rows.filter(lambda value: value == split, input_columns=["split"])
        elif split != "train":
            rows = rows.take(0)
    return rows if source.limit is None else rows.take(source.limit)


def stream_head(source: DataSource, split: str, limit: int) -> list[Utterance]:
    """The first rows of a stream as a list: what a validation takes. Empty, with a warning, without such a split.

    Raises:
        DataError: if it cannot be opened here.
    """
    if not stream_has_split(source, split):
        return []
    try:
        rows = open_stream(source, split, SEARCH_ROWS)
    except NoSplitError as error:
        if not may_lack(source, split):
            raise
        logger.warning("%s", error)
        return []
    head = [_utterance(row, source, split, index) for index, row in enumerate(islice(iter(rows), limit))]
    if not head and "split" in rows.column_names:
        logger.warning(
            "%s: none of its first %d rows is of split %r: nothing of it is taken for that. If there are such rows "
            "further on, name a file that holds only them as a source of its own: data.N={path: FILE, split: %s}. If "
            "there are none at all, split: train here says so",
            source.path, SEARCH_ROWS, split, split
        )  # fmt: skip
    return head


def _utterance(row: dict[str, Any], source: DataSource, split: str, index: int) -> Utterance:
    value = row[source.audio_column] or {}
    audio = value.get("bytes") if value.get("bytes") is not None else value.get("path") or b""
    return Utterance(
        id=source.id_prefix + (str(row["id"]) if "id" in row else f"{Path(source.path).stem}-{index:06d}"),
        audio=audio,
        text=str(row.get(source.text_column) or ""),
        speaker=str(row.get("speaker") or row.get("speaker_id") or ""),
        duration=row.get("duration"),
        split=split,
    )


def _opens(utterance: Utterance) -> bool:
    """Whether a row's header reads like audio: cheap, and enough to choose a stand-in by."""
    try:
        header = soundfile.info(open_audio(utterance))
    except (AudioError, RuntimeError, TypeError, OSError):  # libsndfile's own error is a RuntimeError
        return False
    return header.frames >= MIN_DURATION_S * header.samplerate


class Stream:
    """An endless stream over one split of a source: item k is the k-th row of epoch after epoch.

    Items are asked for in rising order, with gaps. Where the epochs began is its state: with it, a resumed run opens
    the epoch that it was in instead of the first.
    """

    def __init__(self, source: DataSource, split: str, seed: int) -> None:
        self.source, self.split, self.seed = source, split, seed
        self.epoch_starts = [0]
        self._open()

    def _open(self) -> None:
        rows = open_stream(self.source, self.split)
        self.rows = rows.shuffle(seed=self.seed, buffer_size=self.source.shuffle_buffer)
        self._start = self._read = 0  # of the open epoch: its first item, and how many of its rows were read
        self._rows: Iterator[dict[str, Any]] | None = None
        self._in_hand: deque[Utterance] = deque(maxlen=2 * NEIGHBOURS)  # the last of those

    def __getstate__(self) -> dict[str, Any]:
        """What a loader's worker needs: an open stream cannot be sent to a process that is started anew."""
        return {name: getattr(self, name) for name in ("source", "split", "seed", "epoch_starts")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.rows = self._rows = None  # opened if an item is asked for, which in a worker none is

    def item(self, k: int) -> tuple[Utterance, ...]:
        """Row k, and after it up to two others to fall back on where it cannot be decoded.

        Those are the nearest rows before it in its epoch whose headers can be read; for the first rows of an epoch
        also the nearest after. They depend on k alone, like the row.

        Raises:
            DataError: if the source has no rows.
        """
        if self.rows is None:
            self._open()
        # To return for a row that is still in hand costs nothing; further back, the epoch is opened again.
        dropped = self._read - len(self._in_hand)
        if self._rows is None or k < self._start or max(0, k - self._start - NEIGHBOURS) < dropped:
            self._begin_epoch(max(start for start in self.epoch_starts if start <= k))
        while not self._read_to(k - self._start):
            self._end_epoch()
        offset = k - self._start
        if offset < NEIGHBOURS:
            self._read_to(NEIGHBOURS - 1)
        place = offset - (self._read - len(self._in_hand))
        rows = list(self._in_hand)
        before, after = rows[max(0, place - NEIGHBOURS) : place], rows[offset + 1 : NEIGHBOURS]
        nearest = [*reversed(before), *after]
        return rows[place], *islice(filter(_opens, nearest), STAND_INS)

    def close(self) -> None:
        """Lets go of the open epoch; `item` opens it again."""
        if hasattr(self._rows, "close"):
            self._rows.close()
        self._rows = None

    def _begin_epoch(self, start: int) -> None:
        self.rows.set_epoch(self.epoch_starts.index(start))
        self._rows, self._start, self._read = iter(self.rows), start, 0
        self._in_hand.clear()

    def _end_epoch(self) -> None:
        if not self._read:
            raise DataError(f"{self.source.path}: the stream has no rows in split {self.split!r}")
        following = self._start + self._read
        if following not in self.epoch_starts:
            self.epoch_starts.append(following)
        self._begin_epoch(following)

    def _read_to(self, offset: int) -> bool:
        """Reads the open epoch on to the row at `offset`; whether it has one."""
        while self._read <= offset:
            row = next(self._rows, None)
            if row is None:
                return False
            self._in_hand.append(_utterance(row, self.source, self.split, self._read))
            self._read += 1
        return True
