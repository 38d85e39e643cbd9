"""The SLM's predictions: ``predictions.jsonl`` with its sidecar, read, checked and made into systems to score."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from eval.systems import system_name, task_system
from recipes.config import ConfigError
from recipes.inference.predictions import FAULTS
from recipes.runs.files import text_lines
from recipes.runs.logs import log
from recipes.scoring.labels import model_label
from recipes.scoring.systems import System, SystemAudio
from tokenizer.data.audio import load_audio
from tokenizer.data.utterances import AudioError

PREDICTIONS_FILE, SIDECAR_FILE = "predictions.jsonl", "predictions.json"
ANSWERS = {"asr": "text", "tts": "speech"}  # of predictions that do not say it
ANSWER_KEYS = {"text": ("reference", "hypothesis"), "speech": ("text", "audio")}  # of a line
GENERATION_ONLY = "generation only"  # a real-time factor that leaves the tokenizer's part out


@dataclass
class Predictions:
    """The lines of one ``predictions.jsonl`` and what its sidecar says of how they were made.

    ``answers`` is what the task answers in, ``column`` what its reference is: the utterance's text, or another column
    of the corpus; empty where it has none.
    """

    path: Path
    task: str
    answers: Literal["text", "speech"]
    lines: dict[str, dict[str, Any]]
    sidecar: dict[str, Any]

    @property
    def column(self) -> str:
        return str(self.sidecar.get("reference", "text") or "")

    @property
    def model(self) -> str:
        return model_label(str(self.sidecar.get("model", self.path.parent.name)))

    def reference(self, utterance_id: str) -> str:
        """The text that the answer is scored against."""
        return str(self.lines[utterance_id][ANSWER_KEYS[self.answers][0]])


def read_predictions(name: str) -> Predictions:
    """Read what ``slm transcribe`` or ``slm synthesize`` wrote, from its folder or the file itself.

    Raises:
        ConfigError: the file is missing, empty or torn, has an id twice, or is of several tasks or of one that does not
            say what it answers in.
    """
    path = Path(name) / PREDICTIONS_FILE if Path(name).is_dir() else Path(name)
    if not path.is_file():
        raise ConfigError(f"predictions: {path} does not exist; `slm transcribe` and `slm synthesize` write it")
    sidecar = _read_sidecar(path.with_name(SIDECAR_FILE))
    lines: dict[str, dict[str, Any]] = {}
    for number, text in enumerate(text_lines(path), start=1):
        try:
            line = json.loads(text)
            utterance_id, task = str(line["id"]), line["task"]
            answers = ANSWERS.get(task) or sidecar.get("answers")
            missing = [key for key in ANSWER_KEYS.get(answers, ()) if key not in line]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"predictions: {path}, line {number}: not a prediction ({error!r})") from error
        if missing:
            raise ConfigError(f"predictions: {path}, line {number}: {', '.join(missing)} is missing")
        if answers not in ANSWER_KEYS:
            raise ConfigError(
                f"predictions: {path}, line {number}: whether task {task!r} answers in text or speech is not known; "
                f"`answers` in {SIDECAR_FILE} beside it says so, which `slm transcribe` and `slm synthesize` write"
            )
        if utterance_id in lines:
            raise ConfigError(f"predictions: {path}, line {number}: id {utterance_id!r} occurs twice")
        lines[utterance_id] = line
    tasks = {line["task"] for line in lines.values()}
    if len(tasks) != 1:
        raise ConfigError(f"predictions: {path} holds {len(tasks)} tasks; write one file for each, such as asr and tts")
    return Predictions(path, task, answers, lines, sidecar)


def _read_sidecar(path: Path) -> dict[str, Any]:
    """How predictions were made; empty where nothing says it. Raises ConfigError where the file is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ConfigError(f"predictions: {path}: not readable as JSON ({error}); make the predictions anew") from error


def predictions_sha256(predictions: Predictions) -> str:
    """Digest of the file, to notice that it was made anew."""
    return hashlib.sha256(predictions.path.read_bytes()).hexdigest()


def predicted_audio(
    predictions: Predictions, system: System, ids: Sequence[str], batch_seconds: float, notes: list[str]
) -> Iterator[SystemAudio]:
    """The waveforms that the SLM answered with, some seconds at a time; one that cannot be read is noted and counts as
    failed.
    """
    audios: dict[str, np.ndarray] = {}
    for utterance_id in ids:
        line = predictions.lines.get(utterance_id, {})
        if line.get("error") or not line.get("audio"):
            continue
        try:
            audios[utterance_id] = load_audio(predictions.path.parent / line["audio"], system.sampling_rate)
        except AudioError as error:
            log.warning("counted as failed: %s", error)
            notes.append(f"counted as failed: {error}")
        if sum(map(len, audios.values())) >= batch_seconds * system.sampling_rate:
            yield SystemAudio(system, audios)
            audios = {}
    if audios:
        yield SystemAudio(system, audios)


def count_faults(found: Iterable[Sequence[str]]) -> dict[str, int]:
    """How many of these answers have each fault."""
    found = list(found)
    return {name: sum(name in faults for faults in found) for name in FAULTS}


def predicted_system(
    predictions: Predictions, ids: Sequence[str], sampling_rate: int, column: str = "text"
) -> tuple[System, list[str]]:
    """The SLM's answers for the test set; an utterance without an answer counts as failed.

    Args:
        predictions: what it answered.
        ids: the utterances of the test set.
        sampling_rate: to read speech at, in Hz.
        column: what the test set's texts are; predictions with another reference bring their own.

    Returns:
        The system, with its texts where it answers in text (`predicted_audio` reads speech); and notes on what failed.
    """
    facts, notes = predictions.sidecar, []
    kind = task_system(predictions.task)
    system = System(system_name(kind), kind, predictions.model, sampling_rate, predictions.answers)
    system.fingerprint = facts.get("fingerprint")
    system.translates = facts.get("scored_by") == "bleu"
    system.column = predictions.column
    if predictions.column != column:
        system.references = {i: predictions.reference(i) for i in ids if i in predictions.lines}
    times = ("encode_s", "generate_s", "decode_s", "audio_s", "wall_s", "real_time_factor", "timed", "machine")
    system.facts = {key: facts[key] for key in times if facts.get(key) is not None}
    if str(facts.get("timed", "")).startswith("the LLM alone"):  # as earlier predictions say it
        system.facts["timed"] = GENERATION_ONLY
    if facts.get("frame_rate") is not None:
        system.facts["frame_rate_hz"] = facts["frame_rate"]
        codes_per_s = facts["frame_rate"] * facts.get("n_codebooks", 1)
        system.facts["tokens_per_second"] = facts.get("positions_per_s", codes_per_s)
    system.facts["generation"] = {key: value for key, value in facts.items() if key not in times}
    system.facts["n_truncated"] = sum(
        bool(predictions.lines[i].get("truncated")) for i in ids if i in predictions.lines
    )
    found = [predictions.lines[i]["faults"] for i in ids if "faults" in predictions.lines.get(i, {})]
    if found:
        system.facts["faults"] = count_faults(found)
    absent = [i for i in ids if i not in predictions.lines]
    if absent:
        what = "not scored" if system.references else "counted as failed"
        notes.append(f"{predictions.path}: no prediction for {len(absent)} of {len(ids)} utterances, {what}")
    if outside := len(predictions.lines) - (len(ids) - len(absent)):
        notes.append(f"{predictions.path}: {outside} further predictions are not of these utterances, not scored")
    if predictions.answers == "text":
        lines = {i: predictions.lines.get(i, {}) for i in ids}
        system.texts = {i: None if line.get("error") else line.get("hypothesis") for i, line in lines.items()}
    errors = [i for i in ids if predictions.lines.get(i, {}).get("error")]
    if errors:
        example = f"{errors[0]}: {predictions.lines[errors[0]]['error']}"
        notes.append(
            f"{predictions.path}: {len(errors)} of {len(ids)} utterances have no answer, counted as failed ({example})"
        )
    for note in notes:
        log.warning("%s", note)
    return system, notes
