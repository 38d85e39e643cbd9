"""Manifests beside the recordings of others, the same recordings with further columns; the runs that make them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from recipes.config import ConfigError
from recipes.runs.files import text_lines, write_jsonl
from recipes.runs.inputs import refuse_other_inputs
from recipes.runs.logs import log
from recipes.runs.run_folder import RunFolder
from tokenizer.data.manifest import check_utterances, read_source
from tokenizer.data.utterances import SPLITS, DataSource, Utterance

Rows = TypeVar("Rows")


def run_to_manifest(
    config: Any,
    read: Callable[[Any], Rows],
    fingerprint_of: Callable[[Any, Rows], str],
    inputs: str,
    make: Callable[[Any, Rows, RunFolder], tuple[Iterable[Mapping[str, Any]], dict[str, Any]]],
) -> Path:
    """A run whose result is `run_dir/manifest.jsonl`; one that is complete is skipped. Returns the manifest.

    Args:
        config: Of the command; with `run_dir`.
        read: What is read, of the configuration.
        fingerprint_of: A hash of the configuration's inputs and of what was read.
        inputs: What these are, for the message where they have changed.
        make: The manifest's rows and what complete.json says of them, made in the run folder, where it may keep what
            it goes on from.

    Raises:
        ConfigError: The folder is of other settings or other inputs; and what `read` and `make` raise.
    """
    folder = RunFolder(config.run_dir)
    folder.check(config)
    found = read(config)
    fingerprint = fingerprint_of(config, found)
    refuse_other_inputs(folder, fingerprint, inputs)
    manifest = folder.path("manifest.jsonl")
    if folder.complete:
        log.info("%s is complete: skipped", config.run_dir)
        return manifest
    folder.start(config, fingerprint)
    rows, summary = make(config, found, folder)
    write_jsonl(manifest, rows)
    folder.mark_complete(summary)
    return manifest


def all_utterances(sources: Sequence[DataSource], limit: int | None = None) -> list[Utterance]:
    """Every split of several sources, in their order; of each split the first `limit`.

    Raises:
        DataError: as of `read_source`; ConfigError: there is nothing, or audio that is no file of its own.
    """
    check_utterances([Utterance("", "")], sources, "train")  # that there is a source at all
    found: list[Utterance] = []
    for split in SPLITS:
        own = [utterance for source in sources for utterance in read_source(source, split)][:limit]
        if own:
            check_utterances(own, sources, split)
        found += own
    if not found:
        raise ConfigError(f"data: no utterances in {', '.join(source.path for source in sources)}")
    ids: set[str] = set()
    for utterance in found:
        if not isinstance(utterance.audio, str):
            raise ConfigError(
                f"data: the audio of {utterance.name} stands in a table, and a manifest names files; give a "
                "manifest.jsonl or a folder of recordings"
            )
        if utterance.id in ids:
            raise ConfigError(
                f"data: {utterance.name}: the id {utterance.id!r} stands in two splits; give each its own"
            )
        ids.add(utterance.id)
    return found


def manifest_row(utterance: Utterance, folder: Path, columns: Mapping[str, Any]) -> dict[str, Any]:
    """One line of a manifest in `folder`, with the utterance's own columns and further ones.

    The audio's path is relative to the folder, as `read_source` reads it.
    """
    audio = os.path.relpath(os.path.abspath(str(utterance.audio)), os.path.abspath(folder))
    row = {"id": utterance.id, "audio": audio, "text": utterance.text, "speaker": utterance.speaker}
    return row | {"duration": utterance.duration, "split": utterance.split} | dict(utterance.columns) | dict(columns)


def kept_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Rows of an earlier start by id; a last line that a kill tore is dropped from the file."""
    rows = {}
    for line in text_lines(path) if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows[row["id"]] = row
    if path.is_file():
        write_jsonl(path, list(rows.values()))
    return rows
