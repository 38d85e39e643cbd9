"""``slm measure-prosody``: how long, high and loud each word of an aligned manifest is said, relative to the usual.

It writes a manifest of its own, ``run_dir/manifest.jsonl``: the rows of the data with the column ``prosody``
(``[{word, duration, f0, energy}]``, what each is: ``eval/speech/prosody.py``), which the task `tts-prosody` learns, and
``statistics.json``, what words were measured against: the training split's. What cannot be measured stands by its id
and reason in ``skipped.jsonl``. A killed run goes on where it stopped.

A model's speech is measured with ``statistics`` of its training's recordings, once ``slm align`` has read its
predictions.jsonl. ``reference`` adds ``agreement.json``: how far each feature correlates with what was asked for (those
predictions), or with how the recordings say it (another manifest of this command).

Errors: ConfigError for data without word times, no training split, a missing extra; one utterance that fails stops
nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from eval.speech.measures.pitch import load_praat
from eval.speech.measures.registry import MeasureError
from eval.speech.prosody import ProsodyError, ProsodyStatistics, SpokenWord, agreement, measure_words
from recipes.config import ConfigError, Problems
from recipes.runs.files import atomic_write_text, disk_errors, read_json, text_lines, write_jsonl
from recipes.runs.inputs import digest
from recipes.runs.logs import log, the_first
from recipes.runs.manifests import all_utterances, kept_rows, manifest_row, run_to_manifest
from recipes.runs.progress import Progress
from recipes.runs.run_folder import RunFolder
from tokenizer.data.audio import load_audio
from tokenizer.data.utterances import AudioError, DataSource, Utterance

HZ = 16_000
ALIGNED = ("words", "characters", "phones")  # columns of `slm align`; it writes the first two always


@dataclass
class Config:
    """Whose words are measured, and against what."""

    data: list[DataSource] = field(
        default_factory=list, metadata={"help": "aligned manifests (the result of `slm align`), all their splits"}
    )
    run_dir: str = field(default="runs/prosody", metadata={"help": "where manifest.jsonl and statistics.json go"})
    statistics: str = field(
        default="",
        metadata={"help": "statistics.json of an earlier run to measure against; empty: those of the train split here"},
    )
    speaker: str = field(
        default="", metadata={"help": "whose statistics hold for rows that name no speaker, such as a model's output"}
    )
    reference: str = field(
        default="",
        metadata={
            "help": "what words are held against, by the utterances' ids: predictions.jsonl of `slm synthesize "
            "task=tts-prosody` (what was asked), or another manifest.jsonl of this command: adds agreement.json"
        },
    )
    limit: int | None = field(default=None, metadata={"help": "only the first N utterances of each split"})

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit: {self.limit} must be at least 1, or null for all")

    @property
    def sources(self) -> list[DataSource]:
        """The data with the columns that are read."""
        return [replace(one, columns=list(dict.fromkeys([*one.columns, *ALIGNED]))) for one in self.data]


def read_aligned(config: Config) -> list[Utterance]:
    """The utterances. Raises DataError, ConfigError: there is none, or none has word times."""
    found = all_utterances(config.sources, config.limit)
    if not any(one.columns["words"] for one in found):
        raise ConfigError("data: no utterance has the column words; `slm align` writes a manifest that has it")
    if not config.statistics and not any(one.split == "train" for one in found):
        raise ConfigError("data: no train split to take statistics of; give statistics=RUN_DIR/statistics.json")
    return found


def read_statistics(path: str) -> ProsodyStatistics:
    """Statistics of an earlier run. Raises ConfigError."""
    try:
        return ProsodyStatistics.from_dict(read_json(path))
    except ProsodyError as error:
        raise ConfigError(f"statistics: {path}: {error}; `slm measure-prosody` writes statistics.json") from error


def read_reference(path: str) -> dict[str, list[dict[str, Any]]]:
    """The prosody of each utterance's words by its id, in bins or measured. Raises ConfigError."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"reference: {path}: no such file; give RUN_DIR/predictions.jsonl of `slm synthesize`")
    try:
        rows = [json.loads(line) for line in text_lines(file)]
        found = {str(row["id"]): row["prosody"] for row in rows if row.get("prosody")}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"reference: {path}: no predictions or manifest ({error})") from error
    if not found:
        raise ConfigError(f"reference: {path}: none of its rows has prosody; predictions must be of task=tts-prosody")
    return found


def praat() -> Any:
    """Praat. Raises ConfigError where it is not installed."""
    try:
        return load_praat()
    except ImportError as error:
        raise ConfigError("F0 needs praat-parselmouth: pip install 'lmspt-slm[f0]'") from error


def plan(config: Config) -> dict[str, object]:
    """What would be measured; raises all that would stop it, together."""
    problems = Problems("slm measure-prosody")
    problems.attempt(RunFolder(config.run_dir).check, config)
    problems.attempt(praat)
    found = problems.attempt(read_aligned, config)
    if config.statistics:
        problems.attempt(read_statistics, config.statistics)
    if config.reference:
        problems.attempt(read_reference, config.reference)
    problems.raise_all()
    against = config.statistics or f"the {sum(one.split == 'train' for one in found)} utterances of the train split"
    result = str(RunFolder(config.run_dir).path("manifest.jsonl"))
    return {"utterances": len(found), "measured against": against, "result": result}


def run(config: Config) -> Path:
    """Measure, or go on where a killed run stopped; returns the manifest."""
    plan(config)
    return run_to_manifest(config, read_aligned, fingerprint_of, "data, statistics or reference", measured_rows)


def fingerprint_of(config: Config, utterances: list[Utterance]) -> str:
    """A hash of the words' times and of the files that they are measured against."""
    own = [json.dumps([one.id, one.split, one.speaker, *one.columns.values()]) for one in utterances]
    return digest(own, *(Path(path) for path in (config.statistics, config.reference) if path))


def measured_rows(
    config: Config, utterances: list[Utterance], folder: RunFolder
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The manifest's rows and their summary; statistics, what was skipped and the agreement are written."""
    measured = measure_all(utterances, folder.checkpoints / "rows.jsonl")
    rows, skipped, statistics = relative_rows(config, utterances, measured, folder.folder)
    atomic_write_text(folder.path("statistics.json"), json.dumps(statistics.as_dict(), indent=1) + "\n")
    for line in the_first(f"{row['id']}: not measured: {row['error']}" for row in skipped):
        log.warning("%s", line)
    write_jsonl(folder.path("skipped.jsonl"), skipped)
    summary = summary_of(rows, measured)
    log.info("%(utterances)d utterances, %(words)d words, %(without_f0)d without F0, %(word_s).3f s a word", summary)
    if config.reference:
        write_agreement(rows, read_reference(config.reference), folder.path("agreement.json"))
    return rows, summary | {"skipped": len(skipped)}


def measure_all(utterances: list[Utterance], parts: Path) -> dict[str, list[SpokenWord] | str]:
    """The words of each utterance by its id, or why there are none; what an earlier start measured is read."""
    module, done = praat(), kept_rows(parts)
    progress = Progress("measure-prosody", len(utterances), len(done))
    with disk_errors(parts), parts.open("a", encoding="utf-8") as stream:
        for utterance in utterances:
            if utterance.id in done:
                continue
            row: dict[str, Any] = {"id": utterance.id}
            try:
                words, phones = (json.loads(utterance.columns[name] or "[]") for name in ("words", "phones"))
                audio = load_audio(utterance, HZ)
                row["words"] = [asdict(one) for one in measure_words(module, audio, words, phones)]
            except (AudioError, MeasureError, ProsodyError, ValueError, KeyError, TypeError) as error:
                row["error"] = str(error) or type(error).__name__
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            stream.flush()
            done[utterance.id] = row
            progress.update()
    progress.close()
    return {name: row.get("error") or [_spoken_word(one) for one in row["words"]] for name, row in done.items()}


def _spoken_word(values: Mapping[str, Any]) -> SpokenWord:
    return SpokenWord(**{**values, "units": tuple(values["units"])})


def relative_rows(
    config: Config, utterances: list[Utterance], measured: Mapping[str, list[SpokenWord] | str], folder: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], ProsodyStatistics]:
    """The manifest's rows, those that are left out with their reasons, and what the words were measured against."""
    spoken = [(one.speaker or config.speaker, measured[one.id], one) for one in utterances]
    good = [(speaker, words, one) for speaker, words, one in spoken if not isinstance(words, str)]
    if config.statistics:
        statistics = read_statistics(config.statistics)
    else:
        try:
            statistics = ProsodyStatistics.of((who, words) for who, words, one in good if one.split == "train")
        except ProsodyError as error:
            raise ConfigError(f"data: {error}") from error
    if unknown := sorted({speaker for speaker, _, _ in good} - set(statistics.f0)):
        log.warning(
            "F0 is measured against their own words here, of speakers that the training split does not have: %s "
            "(speaker=NAME says whose statistics hold where a row names none)",
            ", ".join(map(repr, unknown[:10])),
        )
        statistics = statistics.with_speakers((speaker, words) for speaker, words, _ in good)
    rows = []
    for speaker, words, one in good:
        columns = {name: json.loads(one.columns[name]) for name in ALIGNED if one.columns[name]}
        rows.append(manifest_row(one, folder, columns | {"prosody": statistics.relative(words, speaker)}))
    skipped = [{"id": one.id, "error": words} for _, words, one in spoken if isinstance(words, str)]
    return rows, skipped, statistics


def summary_of(rows: list[dict[str, Any]], measured: Mapping[str, list[SpokenWord] | str]) -> dict[str, Any]:
    """What complete.json says: how many words, how long a word is."""
    words = [word for row in rows for word in measured[row["id"]]]
    return {
        "utterances": len(rows),
        "words": len(words),
        "without_f0": sum(word.log_f0 is None for word in words),
        "word_s": round(float(np.mean([word.duration_s for word in words])), 4) if words else 0.0,
    }


def write_agreement(rows: list[dict[str, Any]], reference: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """Correlates the words with those of a reference, and says so; utterances of other words are left out, and told."""
    pairs, n_other = [], 0
    for row in rows:
        own = reference.get(row["id"], [])
        if [one["word"].lower() for one in own] == [one["word"].lower() for one in row["prosody"]]:
            pairs.append((own, row["prosody"]))
        else:
            n_other += 1
    found = agreement(pairs)
    atomic_write_text(path, json.dumps({"utterances": len(pairs), "left_out": n_other, **found}, indent=1) + "\n")
    if n_other:
        log.warning("%d utterances are not in the reference, or have other words there: left out", n_other)
    for feature, values in found.items():
        if values["correlation"] is not None:
            log.info("%s: correlation with the reference %s %s", feature, values["correlation"], values["interval"])
