"""From manifests, folders, Parquet files and hub data sets to utterances, and from utterances to waveforms.

Shapes: S samples of one mono waveform, float32 in [-1, 1].
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
MIN_DURATION_S = 0.01
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
SILENCE_PEAK = 1e-5  # below the last bit of 16-bit audio


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
        cell = self.table[self.row][self.column]
        return cell.get("bytes"), cell.get("path")


@dataclass(frozen=True)
class Utterance:
    """One recording and its transcript. `duration` is in seconds, None where the source does not tell it."""

    id: str
    audio: str | bytes | RowAudio
    text: str = ""
    speaker: str = ""
    duration: float | None = None
    split: str = "train"

    @property
    def name(self) -> str:
        """What a message calls it: the path where there is one, else the id."""
        return self.audio if isinstance(self.audio, str) else self.id


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
            "help": "manifest.jsonl, a folder (LibriSpeech, LibriTTS, LJSpeech, VCTK as downloaded, or audio with .txt "
            "beside it), a .parquet file or a hub name"
        },
    )
    split: str | None = field(default=None, metadata={"help": "put all of this source into one split"})
    limit: int | None = field(default=None, metadata={"help": "use the first N utterances of each split only"})
    subset: str | None = field(default=None, metadata={"help": "configuration of a hub data set (LibriSpeech: clean)"})
    hub_splits: dict[str, str] = field(
        default_factory=dict, metadata={"help": "our split -> the hub's name for it, e.g. {train: train.100}"}
    )
    audio_column: str = field(default="audio", metadata={"help": "Parquet and hub: the column that holds the audio"})
    text_column: str = field(default="text", metadata={"help": "Parquet and hub: the column that holds the text"})
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
        if self.shuffle_buffer < 1:
            raise ValueError(f"data source {self.path}: shuffle_buffer={self.shuffle_buffer}: must be at least 1")


def read_sources(sources: Sequence[DataSource], split: str) -> list[Utterance]:
    """Reads one split of several sources, in their order.

    Raises:
        DataError: if a source is missing or malformed, if two utterances share an id, or if nothing is left.
    """
    utterances = [utterance for source in sources for utterance in read_source(source, split)]
    check_utterances(utterances, sources, split)
    return utterances


def check_utterances(utterances: Sequence[Utterance], sources: Sequence[DataSource], split: str) -> None:
    """Raises DataError if there are none, or if two share an id."""
    if not sources:
        raise DataError("no data: give at least one source, e.g. data.0.path=corpus/manifest.jsonl")
    if not utterances:
        raise DataError(
            f"no utterances in split {split!r} of {', '.join(source.path for source in sources)}: "
            f"a manifest's lines and a Parquet file's column `split` carry it, a hub set's own name for it is given by "
            f"`hub_splits: {{{split}: NAME}}`, other sources take `split: {split}`"
        )
    seen: set[str] = set()
    for utterance in utterances:
        if utterance.id in seen:
            raise DataError(f"two utterances are called {utterance.id!r} (second: {utterance.name}): ids must differ")
        seen.add(utterance.id)


def read_source(source: DataSource, split: str, needs_text: bool = True) -> list[Utterance]:
    """Reads one split of one source; an empty list where the source has none of it.

    Args:
        source: what to read.
        split: train, valid or test.
        needs_text: refuse a Parquet file or hub set without the text column; else texts are empty there.
    """
    from tokenizer.data.layouts import read_folder  # they build on this file
    from tokenizer.data.tables import read_table

    if not source.path:
        raise DataError("a data source has no path: give a manifest.jsonl, a folder, a .parquet file or a hub name")
    if source.limit is not None and source.limit < 1:
        raise DataError(f"{source.path}: limit={source.limit} must be at least 1, or null for all")
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}: one of {', '.join(SPLITS)}")
    if source.split is not None and source.split not in SPLITS:
        raise DataError(f"{source.path}: `split: {source.split}` is not one of {', '.join(SPLITS)}")
    if source.stream:
        raise DataError(f"{source.path}: stream=true cannot be listed; only train-tokenizer reads it, row by row")
    if source.split is not None and source.split != split:
        return []
    path = Path(source.path).expanduser()
    if path.suffix == ".jsonl" or (path.is_dir() and (path / "manifest.jsonl").is_file()):
        utterances = _read_manifest(path if path.suffix == ".jsonl" else path / "manifest.jsonl", source, split)
    elif path.is_dir():
        utterances = read_folder(path, split, source.split)
    elif path.suffix == ".parquet":
        utterances = read_table(source, split, path, needs_text)
    elif source.path.count("/") <= 1 and not path.exists() and not path.suffix:
        utterances = read_table(source, split, None, needs_text)
    else:
        raise DataError(f"{source.path}: no such manifest, folder or Parquet file (a hub name looks like owner/name)")
    return utterances[: source.limit]


def text_of(path: Path) -> str:
    """A file's text, with or without a byte order mark. Raises DataError where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 ({error}): convert it, e.g. iconv -f ISO-8859-1 -t UTF-8 OLD > NEW"
        ) from None


def check_duration(duration: object, where: str) -> float | None:
    """A duration as seconds, None where none is told. Raises DataError where it cannot be one."""
    if duration is None:
        return None
    if isinstance(duration, bool) or not isinstance(duration, (int, float)) or not 0 < duration < math.inf:
        raise DataError(
            f"{where}: duration {duration!r} is not a number of seconds above 0: correct it, or leave it out"
        )
    return float(duration)


def _read_manifest(path: Path, source: DataSource, split: str) -> list[Utterance]:
    if not path.is_file():
        raise DataError(f"{path}: no such manifest")
    utterances = []
    for number, line in enumerate(text_of(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            audio = row["audio"]
            identity = str(row["id"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}, line {number}: needs a JSON object with at least id and audio ({error})"
            ) from None
        own_split = source.split or row.get("split", "train")
        if own_split not in SPLITS:
            raise DataError(f"{path}, line {number}: split {own_split!r} is not one of {', '.join(SPLITS)}")
        if own_split != split:
            continue
        if "\\u" in line and (halves := LONE_SURROGATE.search("\0".join(map(str, row.values())))):
            raise DataError(
                f"{path}, line {number}: holds {halves[0]!r}, half of a character: correct it, or leave it out"
            )
        utterances.append(
            Utterance(
                id=identity,
                audio=str(path.parent / audio),
                text=str(row.get("text") or ""),
                speaker=str(row.get("speaker") or ""),
                duration=check_duration(row.get("duration"), f"{path}, line {number}"),
                split=split,
            )
        )
    return utterances


def load_audio(
    utterance: Utterance | str | Path, sampling_rate: int, max_duration_s: float | None = None
) -> np.ndarray:
    """Decodes one recording to mono float32 at `sampling_rate`.

    Args:
        utterance: an utterance, or the path of a file.
        sampling_rate: the rate wanted, in Hz; other rates are resampled (soxr, high quality).
        max_duration_s: refuse what is longer, in seconds.

    Returns:
        The waveform (S,).

    Raises:
        AudioError: missing, empty, not audio, shorter than 10 ms, silent, not finite, or too long.
    """
    if not isinstance(utterance, Utterance):
        utterance = Utterance(id=Path(utterance).stem, audio=str(utterance))
    name = utterance.name
    with opened_audio(utterance) as file:
        rate, n_frames = file.samplerate, file.frames
        # of what is too long no more than shows it
        at_most = n_frames if max_duration_s is None else min(n_frames, int(max_duration_s * rate) + 1)
        samples = file.read(at_most, dtype="float32", always_2d=True)
    n_frames = n_frames if len(samples) == at_most else len(samples)  # a file cut off has fewer than it says
    mono = to_mono(samples)
    # Two passes, since all of a corpus goes through: what is not finite in any sample shows in the extremes.
    low, high = float(mono.min(initial=0.0)), float(mono.max(initial=0.0))
    finite = math.isfinite(low) and math.isfinite(high)
    check_recording(name, n_frames / rate, finite, max(high, -low), max_duration_s)
    if rate != sampling_rate:
        mono = soxr.resample(mono, rate, sampling_rate).astype(np.float32)
    return np.ascontiguousarray(mono)


def check_recording(name: str, duration: float, finite: bool, peak: float, max_duration_s: float | None) -> None:
    """Raises AudioError where a recording of so many seconds and such a peak cannot be used."""
    if duration < MIN_DURATION_S:
        raise AudioError(
            f"{name}: {1000 * duration:.1f} ms of audio, at least {1000 * MIN_DURATION_S:.0f} ms are needed"
        )
    if max_duration_s is not None and duration > max_duration_s:
        raise AudioError(
            f"{name}: {duration:.1f} s, more than max_duration_s={max_duration_s:g}: cut it or raise the limit"
        )
    if not finite:
        raise AudioError(f"{name}: holds NaN or infinite samples: export it again")
    if peak < SILENCE_PEAK:
        raise AudioError(f"{name}: silent (peak below {SILENCE_PEAK:g}): nothing to encode")


def to_mono(samples: np.ndarray) -> np.ndarray:
    """(S, channels) -> (S,), their mean."""
    return samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)


@contextmanager
def opened_audio(utterance: Utterance) -> Iterator[soundfile.SoundFile]:
    """An utterance's audio, open. Raises AudioError: missing, empty or, then or while it is read, not audio."""
    handle = open_audio(utterance)
    try:
        with soundfile.SoundFile(handle) as file:
            yield file
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
        raise AudioError(
            f"{utterance.name}: not audio that libsndfile can read ({error}): convert it to WAV or FLAC"
        ) from None


def open_audio(utterance: Utterance) -> str | io.BytesIO:
    """The path of an utterance's audio, or its bytes as a file. Raises AudioError: missing or empty."""
    audio = utterance.audio
    if isinstance(audio, RowAudio):
        content, path = audio.read()
        audio = content if content is not None else path
        if audio is None:
            raise AudioError(f"{utterance.name}: its row holds neither bytes nor a path")
    if isinstance(audio, bytes):
        if not audio:
            raise AudioError(f"{utterance.name}: empty (0 bytes)")
        return io.BytesIO(audio)
    path = Path(audio)
    if path.is_dir():
        raise AudioError(f"{path}: a folder, not a recording: name its files, or read it as a source (data.path)")
    if not path.is_file():
        raise AudioError(f"{path}: no such file: correct the path, or leave it out")
    if path.stat().st_size == 0:
        raise AudioError(f"{path}: empty (0 bytes): copy it again")
    if not os.access(path, os.R_OK):
        raise AudioError(f"{path}: may not be read by this user: chmod +r, or run as one who may")
    return str(path)


def epoch_item(position: int, n_items: int, seed: int) -> int:
    """Which item stands at `position` of an endless training order: a new permutation of all items each epoch.

    It depends on (seed, position) alone, so accumulation, resume and the number of processes do not change it.
    """
    epoch, offset = divmod(position, n_items)
    return int(_permutation(seed, epoch, n_items)[offset])


@lru_cache(maxsize=32)  # each of a mixture's sources asks for its own, at the turn of an epoch for two
def _permutation(seed: int, epoch: int, n_items: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n_items)
