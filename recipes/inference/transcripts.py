"""What becomes of transcripts: printed where files were given, written where there is a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.inference.batches import Times, forget_batches
from recipes.inference.named_files import unusable_files
from recipes.inference.predictions import (
    log_faults,
    log_speed,
    refuse_unless_one_was_usable,
    refuse_unusable_files,
    summary_of,
    write_predictions,
)
from recipes.runs.logs import log
from recipes.runs.run_folder import RunFolder
from slm.tasks import Task


def give_transcripts(
    config: Any,
    task: Task,
    rows: Sequence[dict[str, Any]],
    heard: Any,
    times: Times,
    folder: RunFolder | None,
    n_processes: int,
) -> Path | None:
    """Prints the texts of files, writes the predictions where there is a run folder, and says how it went.

    Args:
        config: of the command.
        task: what was asked.
        rows: the utterances' lines, in their order.
        heard: the model's vocabulary, or what says as much of continuous features.
        times: seconds of the parts.
        folder: None where nothing is to be kept.
        n_processes: how many there were.

    Returns:
        predictions.jsonl, or None without a folder.

    Raises:
        UnusableFiles: some of the files could not be used; what was made of the others is printed and written.
        ConfigError: no utterance of a data source or corpus could be used.
    """
    if config.files and all(row["error"] for row in rows):
        raise unusable_files({row["id"]: row["error"] for row in rows}, len(rows), "nothing was transcribed")
    for row in rows if config.files else ():
        text = (row["hypothesis"] or "") + ("  [cut off]" if row["truncated"] else "")
        print(row["error"] or (text if len(rows) == 1 else f"{row['id']}: {text}"))
    if folder is None:
        refuse_unusable_files(config, rows, "the others are above")
        return None
    audio_s = sum(row["duration_s"] or 0 for row in rows if row["error"] is None)
    path = write_predictions(config, task, rows, heard, times, audio_s, n_processes)
    summary = summary_of(rows)
    good, truncated = summary["n"] - summary["n_failed"], summary["n_truncated"]
    log.info("transcribed %d of %d utterances, %d cut off", good, summary["n"], truncated)
    log_faults(rows)
    log_speed(times, audio_s)
    refuse_unless_one_was_usable(rows, folder, path)
    folder.mark_complete(summary)
    forget_batches(folder)
    refuse_unusable_files(config, rows, f"the others are in {path}")
    return path
