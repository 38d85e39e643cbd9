"""The run folder of ``slm transcribe`` and ``slm synthesize``: when it may go on, and the predictions written there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recipes.inference.setup import source_utterances
from recipes.runs.files import atomic_write_text
from recipes.runs.inputs import digest, refuse_other_inputs
from recipes.runs.logs import log
from recipes.runs.progress import progress
from recipes.runs.run_folder import RunFolder
from slm.tasks import Task
from slm.vocabulary import SpeechVocabulary


def begun(config: Any, own: Iterable[str | Path]) -> RunFolder | None:
    """The run folder, refused if it was begun with another model or other inputs; None where none is set.

    Args:
        config: the recipe's configuration.
        own: what it works on where neither a data source nor a corpus is given: texts, or paths of files, whose
            contents count.

    Raises:
        ConfigError: the folder belongs to another configuration or to other inputs.
    """
    if not config.run_dir:
        return None
    folder = RunFolder(config.run_dir)
    folder.check(config)
    inputs: list[Any] = list(own)
    if config.corpus:
        inputs = [Path(config.corpus)]
    elif config.data:
        inputs = [[" ".join([u.id, u.text, *u.columns.values()]) for u in source_utterances(config)]]
    fingerprint = digest(Path(config.model), *inputs)
    refuse_other_inputs(folder, fingerprint, "model, files, data or corpus")
    return folder if folder.complete else folder.start(config, fingerprint)


def finished(config: Any, own: Iterable[str | Path]) -> Path | None:
    """The predictions of a run that is complete, which says so; None where there is still something to do.

    Raises:
        ConfigError: as `begun`.
    """
    if not config.run_dir or not RunFolder(config.run_dir).complete:
        return None
    folder = begun(config, own)
    log.info("%s is complete: skipped", config.run_dir)
    return folder.path("predictions.jsonl")


def write_predictions(
    config: Any, task: Task, rows: Sequence[dict[str, Any]], vocabulary: SpeechVocabulary, wall_s: float, audio_s: float
) -> Path:
    """Writes predictions.jsonl and its sidecar, which says what the task answers in; returns the former."""
    path = Path(config.run_dir) / "predictions.jsonl"
    atomic_write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    sidecar = {
        "task": task.name,
        "answers": task.answers,
        "reference": task.reference,
        "model": config.model,
        "trained_steps": RunFolder(Path(config.model).parent).summary.get("steps"),
        "tokenizer": config.tokenizer or vocabulary.tokenizer,
        "fingerprint": vocabulary.fingerprint,
        "frame_rate": vocabulary.frame_rate,
        "n_codebooks": vocabulary.n_codebooks,
        "normaliser": vocabulary.normaliser,
        "prompt_normaliser": vocabulary.normaliser_of_prompts,
        "decoding": asdict(config.decoding),
        "seed": getattr(config.decoding, "seed", None),
        "source": config.corpus or (config.data.path if config.data else None),
        "split": config.split,
        "n": len(rows),
        "n_failed": sum(row["error"] is not None for row in rows),
        "n_truncated": sum(row["truncated"] for row in rows),
        "wall_s": round(wall_s, 3),
        "audio_s": round(audio_s, 3),
        "timed": "the LLM alone: the codes were there"
        if task.answers == "text" and config.corpus
        else "LLM and tokenizer",
        "real_time_factor": round(wall_s / audio_s, 5) if audio_s else None,
    }
    atomic_write_text(path.with_suffix(".json"), json.dumps(sidecar, indent=2, ensure_ascii=False) + "\n")
    return path


def in_chunks(items: Sequence[Any], size: int, batch_size: int, description: str) -> Iterator[Sequence[Any]]:
    """Slices of some batches each, under a progress bar."""
    if not items:
        return
    step = size * batch_size
    for start in progress(range(0, len(items), step), description, -(-len(items) // step)):
        yield items[start : start + step]
