"""``slm score``: what another system wrote or said, against references, by the rules and with the report of `evaluate`.

Texts are scored as they are; a folder of audio, or predictions of speech, is read by a judge first. WER and CER with
their intervals, S, D and I, the commonest confusions, rates by speaker and by length where the reference names them,
and the worst utterances with their errors marked. Several hypotheses are scored side by side, each with its difference
from the first. ``results=`` scores texts that results hold already under another normaliser.

Ids join the two sides. An utterance of the reference that a system has no answer for counts as all its words deleted,
and is counted as failed; what a system has beyond the reference is not scored. Both stand in the notes, and
``--strict`` refuses them. An id that occurs twice is an error, and so is a hypothesis that has none of the reference's
ids.

With ``-o FOLDER`` the results, the page, the tables and one error listing for each row are written there, and what
judges heard is kept; without it the tables are printed alone.

Errors: ConfigError for files and settings that do not fit together; JudgeError for a judge that is missing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from eval.judges.config import JudgeConfig
from eval.report.documents import write_documents
from eval.report.errors import format_errors
from eval.report.page import write_report
from eval.report.terminal import format_table
from eval.rescoring import rescored
from eval.results_file import RESULTS_FILE, load_results, save_results
from eval.schema import Results
from eval.stats import ENOUGH_SPEAKERS
from eval.text.lengths import LENGTHS_HELP, LengthBin, in_order
from recipes.config import ConfigError
from recipes.runs.logs import log
from recipes.runs.own_folders import is_run_folder, refuse_foreign, refuse_unwritable
from recipes.runs.run_folder import command_text
from recipes.scoring.audio_pass import write_listings
from recipes.scoring.protocols import DEFAULT_NORMALISER, made_with, settle
from recipes.scoring.text_files import Columns
from recipes.scoring.text_scores import prepare, score
from tokenizer.precision import exact_fp32


@dataclass
class Config:
    """What is scored against what, and by which rules."""

    own_files: ClassVar[tuple[str, ...]] = (RESULTS_FILE,)  # by it `--restart` knows a folder of this command

    reference: str | None = field(
        default=None,
        metadata={
            "help": "what was said: Kaldi text, .jsonl, .json, .csv, .tsv, .trn, a manifest, or a folder with one of "
            "these; null: the column of the hypothesis's own file"
        },
    )
    hypothesis: list[str] | str = field(
        default_factory=list,
        metadata={"help": "what a system wrote, in any of these forms, or a folder of audio; one or [several,of,them]"},
    )
    names: list[str] | str = field(
        default_factory=list, metadata={"help": "of the hypotheses, in tables; none: those of the files"}
    )
    results: str | None = field(
        default=None,
        metadata={"help": "a results.json: score the texts that it holds again, by this normaliser; no files besides"},
    )
    output: str | None = field(
        default=None, metadata={"help": "folder for results.json, .md, .tex, tables as CSV, report.html, listings (-o)"}
    )
    title: str = field(default="Scores", metadata={"help": "heading of the report"})
    protocol: str | None = field(
        default=None,
        metadata={"help": "judge, normaliser and rules by name, as in slm evaluate (eval/protocol_presets.py)"},
    )
    normaliser: str = field(
        default=DEFAULT_NORMALISER,
        metadata={
            "help": "basic (basic:de, ...; basic:zh and basic:ja take characters as words), whisper-english (read "
            "speech only), seed-tts-eval, f5-tts or none"
        },
    )
    alignment: Literal["jiwer", "sclite"] = field(
        default="jiwer",
        metadata={
            "help": "how S, D and I are told apart: the fewest errors, or NIST's weights (a substitution 4, a deletion "
            "or an insertion 3)"
        },
    )
    judges: list[JudgeConfig] = field(
        default_factory=list, metadata={"help": "recognisers that read hypotheses which are audio"}
    )
    split: str | None = field(default=None, metadata={"help": "the reference's lines of this split alone"})
    id_column: str | None = field(default=None, metadata={"help": "null: id, utt_id, key, audio_filepath and the like"})
    reference_column: str | None = field(
        default=None, metadata={"help": "null: reference, text, transcript, sentence and the like"}
    )
    hypothesis_column: str | None = field(
        default=None, metadata={"help": "null: hypothesis, pred_text, prediction, text and the like"}
    )
    top: int = field(default=10, metadata={"help": "lines of the table of the commonest errors"})
    worst: int = field(default=5, metadata={"help": "utterances printed with their errors marked"})
    text_lengths: list[LengthBin] = field(default_factory=list, metadata={"help": LENGTHS_HELP})
    seed: int = field(default=0, metadata={"help": "of the bootstrap"})
    bootstrap_samples: int = field(default=10_000, metadata={"help": "resamples of the bootstrap"})
    resample: Literal["auto", "utterances", "speakers"] = field(
        default="auto",
        metadata={"help": f"what the bootstrap draws; auto: speakers where there are {ENOUGH_SPEAKERS} or more"},
    )
    batch_seconds: float = field(default=60.0, metadata={"help": "seconds of audio that are held at a time"})
    device: str = field(default="auto", metadata={"help": "of the judges: auto, cpu, cuda"})
    strict: bool = field(default=False, metadata={"help": "refuse hypotheses whose ids are not those of the reference"})

    def __post_init__(self) -> None:
        self.hypothesis = [self.hypothesis] if isinstance(self.hypothesis, str) else self.hypothesis
        self.names = [self.names] if isinstance(self.names, str) else self.names
        if self.bootstrap_samples < 1 or self.batch_seconds <= 0 or self.top < 1 or self.worst < 0:
            raise ValueError("bootstrap_samples and top must be at least 1, batch_seconds above 0, worst 0 or more")
        in_order(self.text_lengths)
        if self.names and len(self.names) != len(self.hypothesis):
            raise ValueError(f"names: {len(self.names)} for {len(self.hypothesis)} hypotheses; give one for each")
        if self.results and (self.hypothesis or self.reference):
            raise ValueError("results: scores the texts that it holds; leave reference and hypothesis out")
        if not (self.results or self.hypothesis):
            raise ValueError("hypothesis: nothing to score; give hypothesis=FILE and reference=FILE, or results=FILE")

    @property
    def columns(self) -> Columns:
        """The columns that were named."""
        return Columns(self.id_column, self.reference_column, self.hypothesis_column)

    @property
    def run_dir(self) -> str | None:
        """The folder that is written; what `--restart` sets aside."""
        return self.output

    @run_dir.setter
    def run_dir(self, folder: str) -> None:
        self.output = folder


def plan(config: Config) -> dict[str, object]:
    """What would be scored; raises all that would stop it."""
    _check_output(config)
    if config.results:
        found = _stored(config)
        return {"rows": [row.label for row in found.rows], "normaliser": config.normaliser, "result": config.output}
    return prepare(config).facts(config)


@exact_fp32()  # judges whose protocol says fp32
def run(config: Config) -> Path | None:
    """Score, print, and write where a folder was named; returns it."""
    _check_output(config)
    if config.results:
        results = _stored(config)
        results.title, results.versions = config.title, made_with(config)
    else:
        results = score(config, prepare(config))
    if config.text_lengths:
        results.text_lengths = in_order(config.text_lengths)
    results.created, results.command = time.strftime("%Y-%m-%d %H:%M"), command_text()
    if config.output is not None:  # first: whoever reads what is printed may close the pipe
        save_results(results, config.output)
        write_report(results, config.output)
        write_documents(results, config.output)
        write_listings(Path(config.output), results.rows)
    print(format_table(results), flush=True)
    print(format_errors(results.rows, config.top, config.worst), flush=True)
    for note in results.notes:
        print(f"note: {note}", flush=True)
    if config.output is None:
        return None
    log.info("report: %s", Path(config.output) / "report.html")
    return Path(config.output)


def _stored(config: Config) -> Results:
    """Results under another normaliser. Raises ConfigError where they do not hold their texts."""
    settled = settle(config.protocol, config.judges, config.normaliser)
    if config.protocol is not None or config.judges:
        raise ConfigError(
            "results: its texts were read already, so no protocol or judge can be asked; name a normaliser"
        )
    if config.output is not None and Path(config.output).resolve() == _folder_of(config.results).resolve():
        raise ConfigError(
            f"results: {config.results} lies in {config.output}, which would be written over: name another"
        )
    return rescored(load_results(config.results), settled.normaliser)


def _folder_of(name: str) -> Path:
    return Path(name) if Path(name).is_dir() else Path(name).parent


def _check_output(config: Config) -> None:
    """Raises ConfigError where the folder holds what is not this command's."""
    if config.output is None:
        return
    folder = Path(config.output)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output: {folder} is a file; name a folder")
    refuse_unwritable(folder, "output")
    if is_run_folder(folder):
        raise ConfigError(f"output: {folder} is the folder of a run, whose results would be overwritten: name another")
    if not (folder / RESULTS_FILE).is_file() and not (folder / "transcripts").is_dir():
        refuse_foreign(folder)
