"""From manifests, folders, Parquet files and hub data sets to utterances."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tokenizer.data.columns import columns_of
from tokenizer.data.layouts import read_folder
from tokenizer.data.tables import read_table
from tokenizer.data.utterances import (
    LONE_SURROGATE,
    SPLITS,
    DataError,
    DataSource,
    Utterance,
    check_duration,
    split_of,
    text_of,
)


def read_sources(sources: Sequence[DataSource], split: str, needs_text: bool = True) -> list[Utterance]:
    """Reads one split of several sources, in their order.

    Args:
        sources: what to read.
        split: train, valid or test.
        needs_text: as of `read_source`.

    Raises:
        DataError: if a source is missing or malformed, if two utterances share an id, or if nothing is left.
    """
    utterances = [utterance for source in sources for utterance in read_source(source, split, needs_text)]
    check_utterances(utterances, sources, split)
    return utterances


def check_utterances(utterances: Sequence[Utterance], sources: Sequence[DataSource], split: str) -> None:
    """Raises DataError if there are none, or if two share an id."""
    if not sources:
        raise DataError("no data: give at least one source, e.g. data.0.path=corpus/manifest.jsonl")
    if not utterances:
        raise DataError(no_utterances([split], sources))
    seen: set[str] = set()
    for utterance in utterances:
        if utterance.id in seen:
            raise DataError(
                f"two utterances are called {utterance.id!r} (second: {utterance.name}): ids must differ; where "
                "they are of two sources, give one of these an id_prefix (data.1.id_prefix=b-)"
            )
        seen.add(utterance.id)


def no_utterances(splits: Sequence[str], sources: Sequence[DataSource]) -> str:
    """What is said where sources have nothing of some splits: which splits they have, and how to take one for them.

    Hub sets are not asked, as each of their splits would be fetched; they name theirs when one is missing.
    """
    local = [source for source in sources if not source.stream and Path(source.path).expanduser().exists()]
    counts = {one: sum(len(read_source(source, one, needs_text=False)) for source in local) for one in SPLITS}
    there = ", ".join(f"{one} ({count})" for one, count in counts.items() if count)
    if not there and len(local) == len(sources):
        return f"no utterances in {', '.join(source.path for source in sources)}, in no split: correct the path"
    return (
        f"no utterances in split {', '.join(map(repr, splits))} of {', '.join(source.path for source in sources)}"
        f"{f'; there are {there}' if there else ''}: a manifest's lines and a Parquet file's column `split` carry it, "
        f"a hub set's own name for it is given by `hub_splits: {{{splits[0]}: NAME}}`, other sources take "
        f"`split: {splits[0]}`"
    )


def read_source(source: DataSource, split: str, needs_text: bool = True) -> list[Utterance]:
    """Reads one split of one source; an empty list where the source has none of it.

    Args:
        source: what to read.
        split: train, valid or test.
        needs_text: refuse a Parquet file or hub set without the text column; else texts are empty there.
    """
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
    if source.own_splits and not (path.suffix in (".jsonl", ".parquet") or (path / "manifest.jsonl").is_file()):
        raise DataError(f"{source.path}: own_splits reads a manifest or a Parquet file; this is none")
    if path.suffix == ".jsonl" or (path.is_dir() and (path / "manifest.jsonl").is_file()):
        utterances = _read_manifest(path if path.suffix == ".jsonl" else path / "manifest.jsonl", source, split)
    elif path.is_dir():
        utterances = read_folder(path, split, source.split)
    elif path.suffix == ".parquet":
        utterances = read_table(source, split, path, needs_text)
    elif source.path.count("/") <= 1 and not path.exists() and not path.suffix:
        utterances = read_table(source, split, None, needs_text)
    elif path.is_file():
        raise DataError(
            f"{source.path}: a file, but no manifest.jsonl and no .parquet; of recordings give their folder"
        )
    else:
        raise DataError(f"{source.path}: no such manifest, folder or Parquet file (a hub name looks like owner/name)")
    utterances = utterances[: source.limit]
    if not source.id_prefix:
        return utterances
    return [replace(utterance, id=source.id_prefix + utterance.id) for utterance in utterances]


def _read_manifest(path: Path, source: DataSource, split: str) -> list[Utterance]:
    if not path.is_file():
        raise DataError(
            f"{path}: no such manifest; correct the path, or make it first (what writes one, such as `slm "
            "prepare-corpus` or `slm align`, writes RUN_DIR/manifest.jsonl)"
        )
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
        own_split = split_of(source, row.get("split", "train"))
        if own_split is not None and own_split not in SPLITS:
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
                columns=columns_of(row, source.columns, f"{path}, line {number}"),
            )
        )
    return utterances
