"""Coded corpora: utterances as audio codes in Parquet shards, with an index that is written last.

Shapes: K codebooks, F frames; a row's `audio_codes` is (K, F), without padding.

A folder holds `<split>-00000-of-00004.parquet`, ... and `index.json`. A shard is written to a temporary name and
renamed, so a shard that exists is whole; `begun.json` says what the folder was begun for until `index.json` takes its
place.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

FORMAT = "lmspt-coded-corpus/1"
INDEX_NAME = "index.json"
BEGUN_NAME = "begun.json"
_SHARD = re.compile(r"^(?P<split>.+)-(?P<index>\d{5})-of-(?P<total>\d{5})\.parquet$")


class CorpusError(ValueError):
    """A corpus is missing, unfinished, damaged or of another tokenizer; the message says which and the way out."""


class CodedRow(TypedDict):
    """One utterance of a coded corpus. `audio_codes` is a (K, F) int64 array, `duration` is in seconds.

    `columns` are the corpus's further columns of text by name, such as a translation.
    """

    id: str
    text: str
    speaker: str
    duration: float
    split: str
    audio_codes: np.ndarray
    columns: dict[str, str]


OWN_COLUMNS = ("id", "text", "speaker", "duration", "split", "audio_codes")


@dataclass(frozen=True)
class CorpusMetadata:
    """What every code of a corpus has in common.

    Args:
        fingerprint: Hash of the tokenizer's weights, configuration and precision.
        codebook_sizes: Entries of each of the K codebooks, book 0 (semantic) first.
        frame_rate: Frames per second, exact.
        sampling_rate: Rate of the audio that was encoded, in Hz.
        tokenizer: The name or folder the tokenizer was loaded from.
        precision: Arithmetic the encoder ran in.
        plan: Whatever else decides the shards (source, limits, augmentation); a folder begun with another plan is
            refused.
        columns: Names of further columns of text, beside id, text and speaker.
    """

    fingerprint: str
    codebook_sizes: list[int]
    frame_rate: float
    sampling_rate: int
    tokenizer: str = ""
    precision: str = "fp32"
    plan: dict[str, Any] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.fingerprint:
            raise CorpusError("fingerprint: empty; give the tokenizer's fingerprint()")
        if not self.codebook_sizes or min(self.codebook_sizes) < 1:
            raise CorpusError(f"codebook_sizes: {self.codebook_sizes} must be one positive size per codebook")
        if not (self.frame_rate > 0 and math.isfinite(self.frame_rate)):
            raise CorpusError(f"frame_rate: {self.frame_rate} must be positive")
        if taken := [name for name in self.columns if name in OWN_COLUMNS or self.columns.count(name) > 1]:
            raise CorpusError(f"columns: {', '.join(taken)} is a column of every corpus, or stands there twice")

    @property
    def n_codebooks(self) -> int:
        return len(self.codebook_sizes)

    def as_dict(self) -> dict[str, Any]:
        """The metadata as JSON would give it back, so that two of them compare equal across a save."""
        values = json.loads(json.dumps(asdict(self)))
        if not self.columns:  # as corpora say it that are older than the key
            del values["columns"]
        return values


def begun_metadata(folder: str | Path) -> dict[str, Any]:
    """The metadata that a folder was begun or finished with, as JSON gives it; empty where nothing was begun.

    Raises:
        CorpusError: the file that holds it is damaged.
    """
    for name in (INDEX_NAME, BEGUN_NAME):
        if (Path(folder) / name).exists():
            return _read_json(Path(folder) / name).get("metadata") or {"fingerprint": ""}
    return {}


class CodedCorpusWriter:
    """Writes a coded corpus shard by shard; the same call after a kill goes on where it stopped.

    Args:
        folder: Where the corpus goes; made if absent.
        metadata: What it is encoded with. A folder begun with other metadata is refused.

    Raises:
        CorpusError: The folder holds (part of) another corpus.
    """

    def __init__(self, folder: str | Path, metadata: CorpusMetadata) -> None:
        self.folder = Path(folder)
        self.metadata = metadata
        self.folder.mkdir(parents=True, exist_ok=True)
        wanted = metadata.as_dict()
        if found := begun_metadata(self.folder):
            self._refuse_other(found, wanted)
            return
        strays = sorted(path.name for path in self.folder.glob("*.parquet"))
        if strays:
            raise CorpusError(
                f"{self.folder}: holds {strays[0]} but neither {INDEX_NAME} nor {BEGUN_NAME}, so it is unknown "
                f"what encoded it; "
                "give an empty folder"
            )
        _write_atomic(self.folder / BEGUN_NAME, _dump({"format": FORMAT, "metadata": wanted}))

    def _refuse_other(self, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        differing = [key for key in wanted if found.get(key) != wanted[key]]
        if differing:
            changes = "; ".join(f"{key}: {found.get(key)!r} there, {wanted[key]!r} now" for key in differing)
            raise CorpusError(
                f"{self.folder}: was begun with other settings ({changes}); give another folder, or delete this "
                f"one to encode anew"
            )

    @property
    def finished(self) -> bool:
        """Whether index.json is there, which is written last."""
        return (self.folder / INDEX_NAME).exists()

    def shard_done(self, split: str, index: int) -> bool:
        """Whether shard `index` (from 0) of a split was written whole by this or an earlier call."""
        return any(True for _ in self.folder.glob(f"{_glob_escape(split)}-{index:05d}-of-*.parquet"))

    def write_shard(self, split: str, index: int, n_shards: int, rows: Iterable[Mapping[str, Any]]) -> Path:
        """Writes one shard under a temporary name and renames it.

        Args:
            split: The split's name.
            index: Which shard, from 0 to `n_shards` - 1.
            n_shards: How many the split has; the same in every call.
            rows: `id`, `text`, `speaker`, `duration` and `audio_codes` (K, F) of each utterance, in order, and further
                texts by name in `columns`; empty where a row lacks one.

        Raises:
            CorpusError: A row's codes have another number of codebooks or lie outside them.
        """
        if not 0 <= index < n_shards:
            raise CorpusError(f"shard {index} of {n_shards}: out of range")
        small = max(self.metadata.codebook_sizes) <= np.iinfo(np.int16).max + 1
        dtype = np.int16 if small else np.int32
        columns: dict[str, list[Any]] = {name: [] for name in (*OWN_COLUMNS, *self.metadata.columns)}
        for row in rows:
            codes = np.asarray(row["audio_codes"])
            self._check_codes(str(row["id"]), codes)
            columns["id"].append(str(row["id"]))
            columns["text"].append(str(row["text"]))
            columns["speaker"].append(str(row.get("speaker") or ""))
            columns["duration"].append(float(row["duration"]))
            columns["split"].append(split)
            columns["audio_codes"].append([book for book in codes.astype(dtype)])
            for name in self.metadata.columns:
                columns[name].append(str(row.get("columns", {}).get(name) or ""))
        table = pa.table(columns, schema=_schema(small, self.metadata.columns))
        path = self.folder / f"{split}-{index:05d}-of-{n_shards:05d}.parquet"
        temporary = self.folder / f".{path.name}.tmp"
        with temporary.open("wb") as stream:
            pq.write_table(table, stream, compression="zstd")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        return path

    def _check_codes(self, name: str, codes: np.ndarray) -> None:
        if codes.ndim != 2 or codes.shape[0] != self.metadata.n_codebooks or codes.shape[1] == 0:
            raise CorpusError(
                f"{name}: audio_codes of shape {codes.shape}, expected ({self.metadata.n_codebooks}, F) with F > 0"
            )
        sizes = np.asarray(self.metadata.codebook_sizes)
        if codes.min() < 0 or (codes.max(axis=1) >= sizes).any():
            raise CorpusError(
                f"{name}: a code lies outside its codebook (sizes {sizes.tolist()}); cut padding (-1) off first"
            )

    def finish(self, extra: Mapping[str, Any] | None = None) -> Path:
        """Checks that every shard is there and writes index.json, last.

        Args:
            extra: Anything worth keeping beside the counts, such as the files that were set aside. Kept under `extra`.

        Raises:
            CorpusError: A shard is missing, or two utterances of a split have one id.
        """
        splits: dict[str, dict[str, Any]] = {}
        seen: dict[str, set[str]] = {}
        totals: dict[str, set[int]] = {}
        for path in sorted(self.folder.glob("*.parquet")):
            match = _SHARD.match(path.name)
            if match is None:
                raise CorpusError(f"{path}: not a shard's name; move it out of the corpus")
            table = pq.read_table(path, columns=["id", "duration", "audio_codes"])
            ids = seen.setdefault(match["split"], set())
            for name in table["id"].to_pylist():
                if name in ids:
                    raise CorpusError(
                        f"{path}: a second utterance of id {name!r} in split {match['split']!r}, whose predictions "
                        "would be taken for the first one's; give each an id of its own"
                    )
                ids.add(name)
            frames = pc.sum(pc.list_value_length(pc.list_element(table["audio_codes"], 0))).as_py() or 0
            seconds = float(np.sum(table["duration"].to_numpy())) if len(table) else 0.0
            entry = splits.setdefault(match["split"], {"utterances": 0, "frames": 0, "duration_s": 0.0, "shards": []})
            totals.setdefault(match["split"], set()).add(int(match["total"]))
            entry["utterances"] += len(table)
            entry["frames"] += frames
            entry["duration_s"] = round(entry["duration_s"] + seconds, 6)
            entry["shards"].append(
                {"name": path.name, "utterances": len(table), "bytes": path.stat().st_size, "sha256": _sha256(path)}
            )
        for split, entry in splits.items():
            if len(totals[split]) != 1 or len(entry["shards"]) != next(iter(totals[split])):
                names = ", ".join(shard["name"] for shard in entry["shards"])
                raise CorpusError(
                    f"{self.folder}: split {split!r} is not whole (found {names}); run the same encode again"
                )
        if not splits:
            raise CorpusError(f"{self.folder}: no shard was written, so there is nothing to index")
        index = {"format": FORMAT, "metadata": self.metadata.as_dict(), "splits": splits, "extra": dict(extra or {})}
        path = self.folder / INDEX_NAME
        _write_atomic(path, _dump(index))
        (self.folder / BEGUN_NAME).unlink(missing_ok=True)
        return path


class CodedCorpus:
    """A finished coded corpus. Use `CodedCorpus.open(folder)`."""

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        self.folder = folder
        self.index = index
        self.metadata = CorpusMetadata(**index["metadata"])

    @classmethod
    def open(cls, folder: str | Path) -> CodedCorpus:
        """Opens a corpus and checks its index and that every shard is there at its size.

        Raises:
            CorpusError: Missing, unfinished or damaged; the message says which and what to do.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CorpusError(f"{folder}: no such folder; make the corpus with `slm encode run_dir={folder}`")
        if not (folder / INDEX_NAME).exists():
            begun = (folder / BEGUN_NAME).exists()
            raise CorpusError(
                f"{folder}: no {INDEX_NAME}, so the encode "
                + (
                    "is not finished; run the same `slm encode` again, it goes on where it stopped"
                    if begun
                    else "never ran here"
                )
            )
        index = _read_json(folder / INDEX_NAME)
        if index.get("format") != FORMAT:
            raise CorpusError(
                f"{folder / INDEX_NAME}: format {index.get('format')!r}, this version reads {FORMAT!r}; encode again"
            )
        corpus = cls(folder, index)
        for split in corpus.splits:
            for shard in index["splits"][split]["shards"]:
                path = folder / shard["name"]
                if not path.exists() or path.stat().st_size != shard["bytes"]:
                    state = (
                        "is missing" if not path.exists() else f"has {path.stat().st_size} bytes, not {shard['bytes']}"
                    )
                    raise CorpusError(f"{path}: {state}; delete {folder} and encode again, or copy the corpus anew")
        return corpus

    @property
    def splits(self) -> list[str]:
        return list(self.index["splits"])

    def count(self, split: str) -> int:
        """Utterances of a split; 0 where the corpus has no such split."""
        return self.index["splits"].get(split, {}).get("utterances", 0)

    def check_fingerprint(self, expected: str) -> None:
        """Refuses a corpus whose codes come from another tokenizer.

        Raises:
            CorpusError: The fingerprints differ.
        """
        if self.metadata.fingerprint != expected:
            raise CorpusError(
                f"{self.folder}: encoded with tokenizer {self.metadata.tokenizer!r} in {self.metadata.precision}, of "
                f"fingerprint {self.metadata.fingerprint}, but {expected} is asked for; its codes mean something else. "
                "Encode the corpus with that tokenizer (and precision), or use the model that was trained on this one"
            )

    def verify(self) -> None:
        """Reads every shard and compares its hash with the index.

        Raises:
            CorpusError: A shard's bytes changed.
        """
        for split in self.splits:
            for shard in self.index["splits"][split]["shards"]:
                if _sha256(self.folder / shard["name"]) != shard["sha256"]:
                    raise CorpusError(
                        f"{self.folder / shard['name']}: its hash is not the index's; encode again or copy it anew"
                    )

    def values(self, split: str, column: str) -> set[str]:
        """What stands in one of the further columns of a split, each text once; no codes are read."""
        found: set[str] = set()
        for shard in self.index["splits"].get(split, {}).get("shards", ()):
            found.update(pq.read_table(self.folder / shard["name"], columns=[column])[column].to_pylist())
        return found

    def rows(self, split: str) -> Iterator[CodedRow]:
        """Yields a split's utterances in the corpus's order.

        Raises:
            CorpusError: The corpus has no such split.
        """
        if split not in self.index["splits"]:
            raise CorpusError(f"{self.folder}: no split {split!r}; it has {', '.join(self.splits)}")
        for shard in self.index["splits"][split]["shards"]:
            for batch in pq.ParquetFile(self.folder / shard["name"]).iter_batches():
                columns = [batch.column(name).to_pylist() for name in OWN_COLUMNS[:-1]]
                further = {name: batch.column(name).to_pylist() for name in self.metadata.columns}
                for i, (name, text, speaker, duration, own_split) in enumerate(zip(*columns, strict=True)):
                    books = batch.column("audio_codes")[i].values
                    codes = np.stack([book.values.to_numpy(zero_copy_only=False) for book in books]).astype(np.int64)
                    yield CodedRow(
                        id=name,
                        text=text,
                        speaker=speaker,
                        duration=duration,
                        split=own_split,
                        audio_codes=codes,
                        columns={column: values[i] for column, values in further.items()},
                    )


def _schema(small: bool, columns: Sequence[str]) -> pa.Schema:
    code = pa.int16() if small else pa.int32()
    text = [(name, pa.string()) for name in ("id", "text", "speaker")]
    further = [(name, pa.string()) for name in columns]
    own = [("duration", pa.float64()), ("split", pa.string()), ("audio_codes", pa.list_(pa.list_(code)))]
    return pa.schema([*text, *own, *further])


def _glob_escape(text: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", text)


def _dump(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path}: not readable as JSON ({error}); delete the folder and encode again") from error


def _write_atomic(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
