"""References and hypotheses from the files that other systems write: Kaldi, JSONL, CSV, TSV, sclite, manifests.

Only a newline ends a line: U+2028 and the like stand in transcripts.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from recipes.config import ConfigError
from recipes.scoring.predictions import PREDICTIONS_FILE
from tokenizer.data.utterances import LONE_SURROGATE, DataError, check_duration, text_of

__all__ = ["AUDIO_ENDINGS", "Columns", "Entry", "TextFile", "read_texts"]

KALDI = "Kaldi text"
AUDIO_ENDINGS = (".wav", ".flac", ".ogg", ".opus", ".mp3")
# Names that the field uses, the first that a file has.
ID_COLUMNS = ("id", "utt_id", "utterance_id", "utt", "key", "uid", "audio_filepath", "file", "path", "audio")
PATH_COLUMNS = ("audio_filepath", "file", "path", "audio")  # as an id: the file's name without its ending
REFERENCE_COLUMNS = ("reference", "ref", "text", "transcript", "transcription", "sentence")
HYPOTHESIS_COLUMNS = ("hypothesis", "hyp", "pred_text", "prediction", "transcript", "transcription", "text", "sentence")
AUDIO_COLUMNS = ("audio", "audio_filepath", "wav", "path")
SPEAKER_COLUMNS = ("speaker", "speaker_id", "spk", "client_id")
DURATION_COLUMNS = ("duration", "duration_s")


@dataclass(frozen=True)
class Columns:
    """Which columns hold the id and the texts; None: the first of those that the field uses."""

    id: str | None = None
    reference: str | None = None
    hypothesis: str | None = None


@dataclass(frozen=True)
class Entry:
    """What a file says of one utterance. ``text`` is None where the system gave no answer.

    ``faults`` are those that predictions name; None in other files.
    """

    text: str | None
    speaker: str = ""
    duration: float | None = None
    audio: str | None = None
    faults: tuple[str, ...] | None = None


@dataclass(frozen=True)
class TextFile:
    """A file's utterances, in its order. ``form`` names its kind for people, ``column`` where its texts stand."""

    path: Path
    form: str
    entries: dict[str, Entry]
    column: str = ""

    @property
    def ids_look_like_words(self) -> bool:
        """Whether the ids of Kaldi's `id words` may be words of lines that have none: no digit or sign in any."""
        return self.form == KALDI and all(identity.isalpha() for identity in self.entries)

    @property
    def is_audio(self) -> bool:
        """Whether there is audio and no column of texts: a judge has to read it."""
        return not self.column and any(entry.audio is not None for entry in self.entries.values())


def read_texts(
    name: str, role: Literal["reference", "hypothesis"], columns: Columns | None = None, split: str | None = None
) -> TextFile:
    """Read a file of texts, or a folder: of a Kaldi data set, a manifest, predictions, or audio.

    Args:
        name: its path. ``.jsonl`` and ``.json`` hold objects, ``.csv`` and ``.tsv`` a header and rows, ``.trn``
            sclite's ``words (id)``; anything else is Kaldi's ``id words``.
        role: as what; decides which column is taken where a file holds both.
        columns: which columns, where they have names of their own.
        split: only the lines of this split, of a manifest that names one in each line.

    Raises:
        ConfigError: the file is missing, not UTF-8, empty, or a line of it is wrong (which one, and how); an id occurs
            twice; it holds several splits and none was asked for.
    """
    columns, path = columns or Columns(), Path(name).expanduser()
    if path.is_dir():
        path = _file_in(path, role)
        if path.is_dir():
            return _audio_folder(path)
    if not path.is_file():
        raise ConfigError(f"{role}: {name} does not exist; give a file of texts, or a folder that holds one")
    kinds = {".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _table, ".tsv": _table}
    if (read := kinds.get(path.suffix.lower())) is not None:
        return _of_rows(path, role, columns, split, list(read(path, _text(path, role))))
    found = _trn(path, _text(path, role)) if path.suffix.lower() == ".trn" else _kaldi(path, _text(path, role))
    form = "sclite trn" if path.suffix.lower() == ".trn" else KALDI
    speakers, durations = (_beside(path, other) for other in ("utt2spk", "utt2dur"))
    entries: dict[str, Entry] = {}
    for number, identity, text in found:
        _add(entries, identity, _of_kaldi(text, speakers.get(identity), durations.get(identity), path), path, number)
    return TextFile(path, form, _some(entries, path, role), "")


def _file_in(folder: Path, role: str) -> Path:
    """What is read of a folder; itself where it holds audio alone."""
    for name in (PREDICTIONS_FILE, "text", "manifest.jsonl"):
        if (folder / name).is_file():
            return folder / name
    if role == "hypothesis" and next(_audio_files(folder), None) is not None:
        return folder
    audio = "" if role == "reference" else ", nor audio files"
    raise ConfigError(f"{role}: {folder} holds no {PREDICTIONS_FILE}, no Kaldi `text`, no manifest.jsonl{audio}")


def _audio_files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in AUDIO_ENDINGS and path.is_file())


def _audio_folder(folder: Path) -> TextFile:
    """Audio files, each under its name without the ending."""
    entries: dict[str, Entry] = {}
    for path in _audio_files(folder):
        if path.stem in entries:
            raise ConfigError(
                f"hypothesis: {folder} holds two files called {path.stem!r} ({entries[path.stem].audio} and {path}): "
                "an utterance has one; keep one of them there"
            )
        entries[path.stem] = Entry(None, audio=str(path))
    return TextFile(folder, "a folder of audio", entries)


def _text(path: Path, role: str) -> str:
    try:
        return text_of(path)
    except DataError as error:
        raise ConfigError(f"{role}: {error}") from None


def _lines(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.removesuffix("\r")


def _kaldi(path: Path, text: str) -> Iterator[tuple[int, str, str]]:
    for number, line in _lines(text):
        identity, _, words = re.sub(r"[ \t]+", " ", line.strip(" \t"), count=1).partition(" ")
        yield number, identity, words


def _trn(path: Path, text: str) -> Iterator[tuple[int, str, str]]:
    for number, line in _lines(text):
        found = re.fullmatch(r"(.*?)[ \t]*\(([^()]+)\)[ \t]*", line, re.DOTALL)
        if found is None:
            raise ConfigError(f"{path}, line {number}: not `words (id)`, as a .trn file has it")
        yield number, found[2].strip(), found[1]


def _beside(path: Path, name: str) -> dict[str, str]:
    """Kaldi's ``utt2spk`` or ``utt2dur`` of the same folder; empty where there is none."""
    file = path.with_name(name)
    if path.name != "text" or not file.is_file():
        return {}
    return {identity: value for _, identity, value in _kaldi(file, _text(file, "reference"))}


def _of_kaldi(text: str, speaker: str | None, duration: str | None, path: Path) -> Entry:
    try:
        seconds = None if duration is None else float(duration)
    except ValueError:
        raise ConfigError(f"{path.with_name('utt2dur')}: {duration!r} is not a number of seconds") from None
    return Entry(text, speaker or "", seconds)


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in _lines(text):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ConfigError(
                f"{path}, line {number}: holds a {type(row).__name__}, not an object with an id and a text"
            )
        if "\\u" in line and (half := LONE_SURROGATE.search("\0".join(map(str, row.values())))):
            raise ConfigError(f"{path}, line {number}: holds {half[0]!r}, half of a character: correct it")
        yield number, row


def _json(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """A list of objects, or an object of id -> text."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error}); a file of one object a line ends in .jsonl") from None
    if isinstance(found, dict) and all(isinstance(value, str | None) for value in found.values()):
        found = [{"id": key, "text": value} for key, value in found.items()]
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ConfigError(f"{path}: must hold a list of objects with an id and a text, or one object of id -> text")
    yield from enumerate(found, start=1)


def _table(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows of a CSV or TSV under their header."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    # Tab-separated files of the field quote nothing: a quotation mark is one.
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    # Only newlines end lines here; the parser itself keeps those within quotes.
    lines = [f"{line}\n" for line in text.split("\n")]
    reader = csv.DictReader(lines, delimiter=delimiter, quoting=quoting, strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise ConfigError(
                    f"{path}, line {reader.line_num}: {'more' if None in row else 'fewer'} fields than the header's "
                    f"{len(reader.fieldnames or [])}; quote a text that holds a {delimiter!r}"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise ConfigError(f"{path}, line {reader.line_num}: {error}") from None


def _of_rows(
    path: Path, role: str, columns: Columns, split: str | None, rows: Sequence[tuple[int, Mapping[str, Any]]]
) -> TextFile:
    """Utterances from rows that name their columns."""
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    splits = sorted({str(row["split"]) for _, row in rows if row.get("split")})
    if role == "reference" and split is None and len(splits) > 1:
        raise ConfigError(f"reference: {path} holds the splits {', '.join(splits)}: name one, as split={splits[0]}")
    if role == "reference" and split is not None and splits:
        rows = [(number, row) for number, row in rows if row.get("split") == split]
        if not rows:
            raise ConfigError(f"reference: {path} has no split {split!r}; it has {', '.join(splits)}")
    id_column = _column(path, role, "id_column", columns.id, ID_COLUMNS, names)
    audio = next((name for name in AUDIO_COLUMNS if name in names), None)
    column = _text_column(path, role, columns, names, audio)
    entries: dict[str, Entry] = {}
    for number, row in rows:
        identity = str(row.get(id_column) or "")
        identity = Path(identity).stem if id_column in PATH_COLUMNS else identity
        if not identity:
            raise ConfigError(f"{path}, line {number}: {id_column} is empty or missing")
        text = row.get(column) if column is not None else None
        if text is not None and not isinstance(text, str):
            raise ConfigError(f"{path}, line {number}: {column} holds {text!r}, which is no text")
        sound = row.get(audio) if audio is not None else None
        seconds = next((row[name] for name in DURATION_COLUMNS if row.get(name) not in (None, "")), None)
        entry = Entry(
            ("" if text is None else text) if role == "reference" else text,
            str(next((row[name] for name in SPEAKER_COLUMNS if row.get(name)), "")),
            _duration(seconds, f"{path}, line {number}"),
            None if not sound else str(path.parent / str(sound)),
            tuple(row["faults"]) if isinstance(row.get("faults"), list) else None,
        )
        _add(entries, identity, entry, path, number)
    return TextFile(path, path.suffix.lower().lstrip("."), _some(entries, path, role), column or "")


def _text_column(path: Path, role: str, columns: Columns, names: Sequence[str], audio: str | None) -> str | None:
    """Where the texts stand; None where the hypotheses are audio."""
    if role == "reference":
        return _column(path, role, "reference_column", columns.reference, REFERENCE_COLUMNS, names)
    if columns.hypothesis is None and audio is not None:
        # In predictions of synthesised speech `text` is what the system was asked to say.
        spoken = "task" in names and "hypothesis" not in names
        if spoken or not {*HYPOTHESIS_COLUMNS} & {*names}:
            return None
    return _column(path, role, "hypothesis_column", columns.hypothesis, HYPOTHESIS_COLUMNS, names)


def _column(path: Path, role: str, key: str, given: str | None, known: Sequence[str], names: Sequence[str]) -> str:
    found = given if given in names else None if given else next((name for name in known if name in names), None)
    if found is None:
        wanted = repr(given) if given else f"any of {', '.join(known)}"
        raise ConfigError(
            f"{role}: {path} has the columns {', '.join(map(str, names)) or '(none)'}, not {wanted}: name it with "
            f"{key}=..."
        )
    return found


def _duration(value: Any, where: str) -> float | None:
    try:
        return check_duration(float(value) if isinstance(value, str) else value, where)
    except ValueError as error:  # DataError is one
        raise ConfigError(f"{where}: duration {value!r} is not a number of seconds above 0") from error


def _add(entries: dict[str, Entry], identity: str, entry: Entry, path: Path, number: int) -> None:
    if identity in entries:
        by_word = path.suffix.lower() not in (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".trn")
        first = " (the first word of a line is its id, as in Kaldi's files)" if by_word else ""
        raise ConfigError(
            f"{path}, line {number}: id {identity!r} occurs twice{first}, so it is not clear which text counts"
        )
    entries[identity] = entry


def _some(entries: dict[str, Entry], path: Path, role: str) -> dict[str, Entry]:
    if not entries:
        raise ConfigError(f"{role}: {path} holds no utterance")
    return entries
