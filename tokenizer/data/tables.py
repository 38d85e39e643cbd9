"""Parquet files and hub data sets through `datasets`, listed: one utterance a row, its audio read when it is needed."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from tokenizer.data.columns import columns_of
from tokenizer.data.utterances import DataError, DataSource, RowAudio, Utterance, check_duration, split_of
from tokenizer.hub import ask_hub

logger = logging.getLogger(__name__)


class NoSplitError(DataError):
    """A hub set has no split of the name asked for."""


def no_split_error(source: DataSource, split: str, error: Exception) -> NoSplitError | None:
    """The NoSplitError that an error of `datasets` stands for, with the set's splits; None where it is another."""
    found = re.search(r"(?:Unknown|Bad) split\b.*\[(.*)\]", str(error), re.DOTALL)
    if found is None:
        return None
    names = [name.strip(" '\"") for name in found[1].split(",")]
    beginnings = {"valid": ("val", "dev")}.get(split, (split,))
    likely = next((name for name in names if name.startswith(beginnings)), "NAME")
    remedy = f"data.N.hub_splits.{split}={likely}"
    if may_lack(source, split):
        remedy = f"nothing of it is taken for {split!r}. If one of them is meant, name it: {remedy}"
    else:
        remedy = f"name the one to take for {split!r}: {remedy}"
        remedy += "; a source that is for validation alone takes data.N.split=valid" if split == "train" else ""
    return NoSplitError(
        f"{source.path}: no split {source.hub_splits.get(split, split)!r} among {', '.join(names)}: {remedy}"
    )


def may_lack(source: DataSource, split: str) -> bool:
    """Whether a hub set may be without `split`: not without training data, nor without what the source names."""
    return split != "train" and source.split is None and split not in source.hub_splits


def read_table(source: DataSource, split: str, local: Path | None, needs_text: bool) -> list[Utterance]:
    """Reads one split of a Parquet file or a hub data set, its audio left undecoded (soundfile decodes it here).

    Args:
        source: with the names of its columns.
        split: train, valid or test; of a hub set without valid or test nothing is read for it, with a warning.
        local: the Parquet file; None for a hub set.
        needs_text: refuse a table without the text column; else its texts are empty.

    Raises:
        NoSplitError: if it is a hub set without the training split, or without one that the source names.
        DataError: if it cannot be loaded here or lacks a column.
    """
    from datasets import Audio, load_dataset

    if local is not None and not local.is_file():
        raise DataError(f"{source.path}: no such Parquet file: correct the path")
    try:
        if local is not None:
            table = load_dataset("parquet", data_files=str(local), split="train")
        else:
            ask_hub(source.path, dataset=True)
            table = load_dataset(source.path, source.subset, split=source.hub_splits.get(split, split))
    except Exception as error:  # datasets raises a dozen kinds: offline, unknown name, unknown split
        if local is None and (missing := no_split_error(source, split, error)):
            if not may_lack(source, split):
                raise missing from None
            logger.warning("%s", missing)
            return []
        reason = f"{type(error).__name__}: {error}"
        raise DataError(
            f"{source.path}: neither a local source nor a data set that can be loaded here ({reason}). Give a "
            "manifest.jsonl, a folder or a .parquet file, or go online for a hub name"
        ) from None
    for column in (source.audio_column, source.text_column)[: 2 if needs_text else 1]:
        if column not in table.column_names:
            raise DataError(
                f"{source.path}: no column {column!r} among {table.column_names}: set audio_column, text_column"
            )
    table = table.cast_column(source.audio_column, Audio(decode=False))
    names = table.column_names
    light = table.remove_columns([source.audio_column])
    utterances = []
    for index, row in enumerate(light):
        own_split = split_of(source, row.get("split", "train")) if local is not None else split
        if own_split != split:
            continue
        utterances.append(
            Utterance(
                id=str(row["id"]) if "id" in names else f"{Path(source.path).stem}-{index:06d}",
                audio=RowAudio(table, index, source.audio_column),
                text=str(row.get(source.text_column) or ""),
                speaker=str(row.get("speaker") or row.get("speaker_id") or ""),
                duration=check_duration(row.get("duration"), f"{source.path}, row {index}"),
                split=split,
                columns=columns_of(row, source.columns, f"{source.path}, row {index}"),
            )
        )
    return utterances
