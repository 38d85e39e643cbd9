"""Utterances and the sources they come from: the types of the data, and the checks that every kind of source needs."""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SPLITS = ("train", "valid", "test")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class AudioError(ValueError):
    """One file cannot be used as speech; the message names the file, the fault and the way out."""


class DataError(ValueError):
    """A source cannot be read as a whole; the message names the source and the way out."""


@dataclass(frozen=True)
class RowAudio:
    """Audio that stands in a row of a `datasets` table: read when needed, so a large table stays on disk."""

    table: Any
    row: int
    column: str

    def read(self) -> tuple[bytes | None, str | None]:
        value = self.table[self.row][self.column]
        return value.get("bytes"), value.get("path")


@dataclass(frozen=True)
class Utterance:
    """One recording and its transcript. `duration` is in seconds, None where the source does not say.

    `columns` are the texts of the further columns that its source was asked for, by name.
    """

    id: str
    audio: str | bytes | RowAudio
    text: str = ""
    speaker: str = ""
    duration: float | None = None
    split: str = "train"
    columns: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        """What a message calls it: the path where there is one, else the id."""
        return self.audio if isinstance(self.audio, str) else self.id


def split_of(source: DataSource, own: str) -> str | None:
    """The split that a row of a source belongs to, from what the row itself says; None: to none."""
    if source.own_splits and own not in source.own_splits:
        return None
    return source.split or own


@dataclass
class DataSource:
    """Where utterances come from.

    With `split`, all that the source has goes there. Without it the source's own splits hold (a manifest's lines, a
    Parquet file's column, a hub data set's names, LibriSpeech's and LibriTTS's folders); a source that has none counts
    as `train`.
    """

    path: str = field(
        default="",
        metadata={
            "help": "manifest.jsonl, a folder (LibriSpeech, LibriTTS, LJSpeech, VCTK, seed-tts-eval as downloaded, or "
            "audio with .txt beside it), a .parquet file or a hub name"
        },
    )
    split: str | None = field(default=None, metadata={"help": "put all of this source into one split"})
    own_splits: list[str] = field(
        default_factory=list,
        metadata={
            "help": "with `split`, of a manifest or a Parquet file: only what is in these of its own splits, such as "
            "[valid, test]"
        },
    )
    id_prefix: str = field(
        default="", metadata={"help": "put in front of all its ids, where another source has the same ones"}
    )
    limit: int | None = field(default=None, metadata={"help": "use the first N utterances of each split only"})
    subset: str | None = field(default=None, metadata={"help": "configuration of a hub data set (LibriSpeech: clean)"})
    hub_splits: dict[str, str] = field(
        default_factory=dict, metadata={"help": "our split -> the hub's name for it, e.g. {train: train.100}"}
    )
    audio_column: str = field(default="audio", metadata={"help": "Parquet and hub: the column that holds the audio"})
    text_column: str = field(default="text", metadata={"help": "Parquet and hub: the column that holds the text"})
    columns: list[str] = field(
        default_factory=list,
        metadata={
            "help": "manifest, Parquet, hub: further columns of text, for tasks that read them, such as [translation]"
        },
    )
    weight: float | None = field(
        default=None,
        metadata={
            "help": "trainings: share of the crops or utterances beside the other sources' weights; "
            "null in all: each recording counts the same"
        },
    )
    stream: bool = field(
        default=False,
        metadata={"help": "train-tokenizer: read a hub set or *.parquet row by row, without listing or copying it"},
    )
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "stream: rows held in memory to draw from (undecoded audio)"}
    )

    def __post_init__(self) -> None:
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise ValueError(f"data source {self.path}: weight={self.weight}: must be above 0, or null")
        if self.own_splits and (self.split is None or self.stream):
            raise ValueError(
                f"data source {self.path}: own_splits goes with `split`, into which they are put, and no stream"
            )
        if self.shuffle_buffer < 1:
            raise ValueError(f"data source {self.path}: shuffle_buffer={self.shuffle_buffer}: must be at least 1")


def text_of(path: Path) -> str:
    """A file's text, with or without a byte order mark. Raises DataError where it is not UTF-8, or no text at all."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        if b"\0" in content and not wide:
            raise DataError(f"{path}: no text but audio or another binary file; give a file of text") from None
        old = "UTF-16" if wide else "ISO-8859-1"
        raise DataError(f"{path}: not UTF-8 ({error}): convert it, e.g. iconv -f {old} -t UTF-8 OLD > NEW") from None


def check_duration(duration: object, where: str) -> float | None:
    """A duration as seconds, None where there is none. Raises DataError where it cannot be one."""
    if duration is None:
        return None
    if isinstance(duration, bool) or not isinstance(duration, (int, float)) or not 0 < duration < math.inf:
        raise DataError(
            f"{where}: duration {duration!r} is not a number of seconds above 0: correct it, or leave it out"
        )
    return float(duration)
