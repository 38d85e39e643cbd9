"""``slm export-versa``: an SLM's speech as the input of VERSA, whose measures `slm evaluate versa=[FOLDER]` reads back.

VERSA (Shi et al. 2025, arXiv 2412.17667) has some ninety measures of speech, each with packages and models of its own;
it runs beside this framework, in an environment of its own. Written are, in Kaldi's form, ``pred.scp`` (id and file of
what was said), ``text`` (id and reference) and, where ``data`` gives the recordings, ``gt.scp``; ``versa.json`` says
what they are of. VERSA's result goes to ``scores.jsonl`` beside them: the command to run is printed.

An utterance without an answer stands in no file, since VERSA stops at one; `slm evaluate` counts it as failed.

Errors: ConfigError for predictions in text, ids that Kaldi's form cannot hold, and recordings of other utterances.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from recipes.config import ConfigError
from recipes.exporting.versa import GT_FILE, PRED_FILE, SCORES_FILE, TEXT_FILE, Export, plan_export, write_export
from recipes.runs.logs import log
from recipes.runs.run_folder import RunFolder
from recipes.scoring.predictions import Predictions, predictions_sha256, read_predictions
from tokenizer.data.manifest import read_sources
from tokenizer.data.utterances import DataSource, Utterance


@dataclass
class Config:
    """What is exported, and where to."""

    run_dir: str = field(default="runs/versa", metadata={"help": "folder of the files (-o)"})
    predictions: str = field(default="", metadata={"help": "folder (or predictions.jsonl) of slm synthesize"})
    data: list[DataSource] = field(
        default_factory=list,
        metadata={"help": "the test set's recordings, for measures that compare with them; none: no gt.scp"},
    )
    split: str = field(default="test", metadata={"help": "split of the data"})
    sampling_rate: int = field(
        default=24_000, metadata={"help": "Hz of recordings that are copied, as they are no files of their own"}
    )

    def __post_init__(self) -> None:
        if self.sampling_rate < 1:
            raise ValueError(f"sampling_rate: {self.sampling_rate} must be at least 1")


def _prepare(config: Config) -> tuple[Predictions, dict[str, Utterance], Export]:
    """Everything read and checked. Raises ConfigError, DataError."""
    RunFolder(config.run_dir).check(config)
    if not config.predictions:
        raise ConfigError("predictions: not set; give the run_dir of `slm synthesize`: predictions=runs/synthesize")
    predictions = read_predictions(config.predictions)
    recordings = {}
    if config.data:
        recordings = {u.id: u for u in read_sources(config.data, config.split, needs_text=False)}
    return predictions, recordings, plan_export(predictions, recordings)


def plan(config: Config) -> dict[str, object]:
    """What would be written; raises what would stop it."""
    predictions, recordings, export = _prepare(config)
    return {
        "predictions": f"{predictions.path} ({predictions.task})",
        "utterances": len(export.audio),
        "left out": len(export.left_out),
        "recordings": len(recordings.keys() & export.audio.keys()) if config.data else "none given",
        "result": config.run_dir,
    }


def run(config: Config) -> Path:
    """Write the files and print VERSA's command; returns the folder."""
    predictions, recordings, export = _prepare(config)
    folder = RunFolder(config.run_dir)
    if folder.complete:
        log.info("%s is complete: skipped", config.run_dir)
    else:
        folder.start(config, predictions_sha256(predictions))
        write_export(folder.folder, predictions, export, recordings, config.sampling_rate)
        folder.mark_complete({"utterances": len(export.audio), "left out": len(export.left_out)})
    if export.left_out:
        example = next(iter(export.left_out.items()))
        log.warning("%d utterances are left out, such as %s: %s", len(export.left_out), *example)
    place = folder.folder
    gt = f" --gt {place / GT_FILE}" if config.data else ""
    print(
        f"versa-score --score_config YOUR_MEASURES.yaml --io soundfile --pred {place / PRED_FILE}{gt} "
        f"--text {place / TEXT_FILE} --output_file {place / SCORES_FILE}",
        flush=True,
    )
    return place
