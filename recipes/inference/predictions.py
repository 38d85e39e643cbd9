"""The run folder of ``slm transcribe`` and ``slm synthesize``: when it may go on, and the predictions written there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recipes.config import ConfigError
from recipes.inference.batches import Times, forget_batches
from recipes.inference.named_files import unusable_files
from recipes.inference.setup import model_vocabulary, source_utterances
from recipes.runs.embedded import model_path
from recipes.runs.files import atomic_write_text, text_lines, write_jsonl
from recipes.runs.inputs import digest, refuse_other_inputs
from recipes.runs.logs import log
from recipes.runs.machine import describe_machine, machine_text
from recipes.runs.run_folder import RunFolder
from slm.tasks import Task
from slm.vocabulary import SpeechVocabulary

# What may be wrong with an answer: by its name in the rows, and as a message says it.
FAULTS = {
    "length": "cut off at their budget",
    "loop": "cut off in a loop",
    "silence": "silent",
    "non_finite": "of scores or samples that are not finite",
}
NON_FINITE_SCORES = "the model's scores are not finite (NaN or infinite): try weights=fp32"
MAX_IDS, SHOWN_IDS = 100, 10  # of a fault, in the sidecar and in a message; the rows have all


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
    # Of synthesis alone: what makes sound of the codes.
    voice = [Path(path) for path in (getattr(config, "acoustic", ""), getattr(config, "voice", "")) if path]
    if hasattr(config, "voice"):
        voice.append(model_path(config.tokenizer or model_vocabulary(config).tokenizer))
    fingerprint = digest(Path(config.model), *inputs, *voice)
    refuse_other_inputs(folder, fingerprint, f"model, {'voice, tokenizer, ' if voice else ''}files, data or corpus")
    return folder if folder.complete else folder.start(config, fingerprint)


def finished(config: Any, own: Iterable[str | Path]) -> Path | None:
    """The predictions of a run that is complete, which says so; None where there is still something to do.

    Raises:
        ConfigError: as `begun`.
        UnusableFiles: as when the run was completed.
    """
    if not config.run_dir or not RunFolder(config.run_dir).complete:
        return None
    path = begun(config, own).path("predictions.jsonl")
    log.info("%s is complete: skipped", config.run_dir)
    if config.files:
        refuse_unusable_files(config, [json.loads(line) for line in text_lines(path)], f"the others are in {path}")
    return path


def refuse_unusable_files(config: Any, rows: Sequence[dict[str, Any]], rest: str) -> None:
    """Ends a command, once all is made, where some of the files that it was given could not be used.

    Raises:
        UnusableFiles: of a data source or a corpus never; its rows that cannot be used are counted.
    """
    failed = {row["id"]: row["error"] for row in rows if row["error"]}
    if config.files and failed:
        raise unusable_files(failed, len(rows), rest, told=True)


def refuse_unless_one_was_usable(rows: Sequence[dict[str, Any]], folder: RunFolder, path: Path) -> None:
    """Leaves a run unfinished whose every utterance failed for what was given, such as paths that are all wrong.

    What the model itself got wrong is a result, and counted.

    Raises:
        ConfigError: no utterance got as far as the model.
    """
    if all(row["error"] and not row["faults"] for row in rows):
        forget_batches(folder)  # so that the same command reads what has been mended
        raise ConfigError(f"none of the {len(rows)} utterances could be used; {path} says why: {rows[0]['error']}")


def write_predictions(
    config: Any,
    task: Task,
    rows: Sequence[dict[str, Any]],
    vocabulary: SpeechVocabulary,
    times: Times,
    audio_s: float,
    n_processes: int,
) -> Path:
    """Writes predictions.jsonl and its sidecar, which says what the task answers in; returns the former.

    Args:
        config: the recipe's configuration.
        task: what was asked.
        rows: the utterances' lines, in their order.
        vocabulary: of the model.
        times: seconds of the parts, of all processes together.
        audio_s: seconds of speech that were heard or said.
        n_processes: how many there were.
    """
    path = Path(config.run_dir) / "predictions.jsonl"
    write_jsonl(path, rows)
    wall_s, tokenizer_s = sum(row["wall_s"] for row in rows if row["error"] is None), times.encode_s + times.decode_s
    n_passes = sum(row.get("n_passes", 0) for row in rows)
    expected_s = sum(row["expected_s"] for row in rows if row["error"] is None and "expected_s" in row)
    sidecar = {
        "task": task.name,
        "answers": task.answers,
        "reference": task.reference,
        "scored_by": task.scored_by,
        "model": config.model,
        "trained_steps": RunFolder(Path(config.model).parent).summary.get("steps"),
        "tokenizer": config.tokenizer or vocabulary.tokenizer,
        "fingerprint": vocabulary.fingerprint,
        "frame_rate": vocabulary.frame_rate,
        "n_codebooks": vocabulary.n_codebooks,
        "pattern": vocabulary.pattern.name,
        "positions_per_s": vocabulary.frame_rate * vocabulary.ids_per_frame,
        **({"prosody": asdict(config.prosody)} if task.answer_holds_prosody else {}),
        **({"acoustic": config.acoustic, "voice": config.voice} if getattr(config, "acoustic", "") else {}),
        "normaliser": vocabulary.normaliser,
        "prompt_normaliser": vocabulary.normaliser_of_prompts,
        "decoding": asdict(config.decoding),
        "seed": getattr(config.decoding, "seed", None),
        "source": config.corpus or (config.data.path if config.data else None),
        "split": config.split,
        "n": len(rows),
        "n_failed": sum(row["error"] is not None for row in rows),
        "n_truncated": sum(row["truncated"] for row in rows),
        "n_retried": sum(row.get("attempts", 1) > 1 for row in rows),
        "faults": {name: {"n": len(ids), "ids": ids[:MAX_IDS]} for name, ids in faults_of(rows).items()},
        "wall_s": round(wall_s, 3),
        "audio_s": round(audio_s, 3),
        **({"expected_s": round(expected_s, 3)} if task.continues else {}),
        "timed": "the LLM alone: the codes were there"
        if task.answers == "text" and config.corpus
        else "LLM and tokenizer",
        "real_time_factor": round(wall_s / audio_s, 5) if audio_s else None,
        "encode_s": round(times.encode_s, 3),
        "generate_s": round(times.generate_s, 3),
        "decode_s": round(times.decode_s, 3),
        "llm_real_time_factor": round(times.generate_s / audio_s, 5) if audio_s else None,
        "tokenizer_real_time_factor": round(tokenizer_s / audio_s, 5) if audio_s and tokenizer_s else None,
        "n_tokens": times.n_tokens,
        "generated_tokens_per_s": round(times.n_tokens / times.generate_s, 2) if times.generate_s else None,
        **({"tokens_per_pass": round(times.n_tokens / n_passes, 3)} if n_passes else {}),
        "n_processes": n_processes,
        "machine": machine_text({"machine": describe_machine()}),
    }
    atomic_write_text(path.with_suffix(".json"), json.dumps(sidecar, indent=2, ensure_ascii=False) + "\n")
    return path


def faults_of(rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """The ids of the utterances of each fault."""
    return {name: [row["id"] for row in rows if name in row["faults"]] for name in FAULTS}


def log_faults(rows: Sequence[dict[str, Any]]) -> None:
    """Names the utterances whose answer is not to be trusted as it is, a line for each fault."""
    for name, ids in faults_of(rows).items():
        if ids:
            more = f" and {len(ids) - SHOWN_IDS} more" if len(ids) > SHOWN_IDS else ""
            log.warning("%d %s: %s%s", len(ids), FAULTS[name], ", ".join(ids[:SHOWN_IDS]), more)


def log_speed(times: Times, audio_s: float) -> None:
    """Says how fast the two parts were."""
    if times.generate_s and audio_s:
        log.info(
            "LLM: %.0f tokens/s, real-time factor %.3g; tokenizer: real-time factor %.3g",
            times.n_tokens / times.generate_s,
            times.generate_s / audio_s,
            (times.encode_s + times.decode_s) / audio_s,
        )


def summary_of(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """What complete.json says of a run's rows."""
    return {
        "n": len(rows),
        "n_failed": sum(row["error"] is not None for row in rows),
        "n_truncated": sum(row["truncated"] for row in rows),
    } | {f"n_{name}": len(ids) for name, ids in faults_of(rows).items()}
