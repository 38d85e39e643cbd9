"""Streamed sources: hub data sets and Parquet files read row by row through `datasets`, for what is too large to list.

The order is a function of the seed alone: `datasets` shuffles the shards and a buffer of rows anew each epoch. Every
process walks through all rows and decodes only its own, so that the number of processes does not change the data; the
rows it passes over are fetched all the same. A resumed run walks from the start of the epoch it was in to its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizer.data import SPLITS, DataError, DataSource, Utterance

ROWS = "*.parquet"


def stream_has_split(source: DataSource, split: str) -> bool:
    """Whether a streamed source may have rows of `split`; nothing is opened to find out."""
    if split not in SPLITS or (source.split is not None and source.split not in SPLITS):
        raise DataError(f"{source.path}: split {source.split or split!r} is not one of {', '.join(SPLITS)}")
    return source.split in (None, split)


def open_stream(source: DataSource, split: str) -> Any:
    """The rows of one split as a `datasets.IterableDataset`, their audio undecoded.

    Args:
        source: with a hub name, a .parquet file, a pattern (`folder/*.parquet`) or a folder of .parquet files.
        split: ours; `source.hub_splits` gives the hub's name for it.

    Raises:
        DataError: if it cannot be opened here or lacks the audio column.
    """
    from datasets import Audio, load_dataset

    path = Path(source.path).expanduser()
    try:
        if path.is_dir() or path.suffix == ".parquet":
            pattern = path / ROWS if path.is_dir() else path
            files = sorted(str(file) for file in pattern.parent.glob(pattern.name))
            if not files:
                raise FileNotFoundError(f"no file fits {pattern}")
            rows = load_dataset("parquet", data_files=files, split="train", streaming=True)
            own_splits = source.split is None and "split" in (rows.column_names or [])
        else:
            rows = load_dataset(source.path, source.subset, split=source.hub_splits.get(split, split), streaming=True)
            own_splits = False
        if rows.features is None:
            rows = rows._resolve_features()
    except Exception as error:  # datasets raises a dozen kinds: offline, unknown name, unknown split
        raise DataError(
            f"{source.path}: cannot be streamed here ({type(error).__name__}: {error}). Give a hub name (online), a "
            ".parquet file or a folder of them; other sources take stream=false"
        ) from None
    if source.audio_column not in rows.column_names:
        raise DataError(f"{source.path}: no column {source.audio_column!r} among {rows.column_names}: set audio_column")
    rows = rows.cast_column(source.audio_column, Audio(decode=False))
    if own_splits:
        rows = rows.filter(lambda value: value == split, input_columns=["split"])
    return rows if source.limit is None else rows.take(source.limit)


def stream_head(source: DataSource, split: str, limit: int) -> list[Utterance]:
    """The first rows of a stream as a list: what a validation takes. Empty where it has no such split."""
    if not stream_has_split(source, split):
        return []
    try:
        rows = islice(iter(open_stream(source, split)), limit)
        return [_utterance(row, source, split, index) for index, row in enumerate(rows)]
    except DataError:
        if source.split == split or split in source.hub_splits:
            raise
        return []  # a hub set without a split of that name


def _utterance(row: dict[str, Any], source: DataSource, split: str, index: int) -> Utterance:
    cell = row[source.audio_column] or {}
    audio = cell.get("bytes") if cell.get("bytes") is not None else cell.get("path") or b""
    return Utterance(
        id=str(row["id"]) if "id" in row else f"{Path(source.path).stem}-{index:06d}",
        audio=audio,
        text=str(row.get(source.text_column) or ""),
        speaker=str(row.get("speaker") or row.get("speaker_id") or ""),
        duration=row.get("duration"),
        split=split,
    )


class Stream:
    """An endless stream over one split of a source: item k is the k-th row of epoch after epoch.

    Items are asked for in rising order, with gaps. Where the epochs began is its state: with it, a resumed run opens
    the epoch that it was in instead of the first.
    """

    def __init__(self, source: DataSource, split: str, seed: int) -> None:
        self.source, self.split = source, split
        self.rows = open_stream(source, split).shuffle(seed=seed, buffer_size=source.shuffle_buffer)
        self.epoch_starts = [0]
        self._start = self._next = 0
        self._rows: Iterator[dict[str, Any]] | None = None
        self._newest: list[Utterance] = []

    def item(self, k: int) -> tuple[Utterance, ...]:
        """Row k, and after it the row before, to fall back on where it cannot be decoded.

        Raises:
            DataError: if the source has no rows.
        """
        # To return for a row that is still in hand costs nothing; further back, the epoch is opened again.
        if self._rows is None or k < self._next - 1:
            self._open(k)
        while self._next <= k:
            self._advance()
        return tuple(reversed(self._newest))

    def close(self) -> None:
        """Lets go of the open epoch; `item` opens it again."""
        if hasattr(self._rows, "close"):
            self._rows.close()
        self._rows = None

    def _open(self, k: int) -> None:
        # one row early, so that the row before k is in hand
        self._begin_epoch(max(start for start in self.epoch_starts if start <= max(0, k - 1)))
        self._newest = []

    def _begin_epoch(self, start: int) -> None:
        self.rows.set_epoch(self.epoch_starts.index(start))
        self._rows, self._start, self._next = iter(self.rows), start, start

    def _advance(self) -> None:
        row = next(self._rows, None)
        if row is None:
            if self._next == self._start:
                raise DataError(f"{self.source.path}: the stream has no rows in split {self.split!r}")
            if self._next not in self.epoch_starts:
                self.epoch_starts.append(self._next)
            self._begin_epoch(self._next)
            return
        self._newest = [*self._newest[-1:], _utterance(row, self.source, self.split, self._next - self._start)]
        self._next += 1
