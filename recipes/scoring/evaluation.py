"""What ``slm evaluate`` is asked to score, checked and read before any audio."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from eval.codes import CodeStatistics
from eval.judges.config import JudgeConfig
from eval.judges.judge import check_judge
from eval.protocol import Protocol, TestSet, test_set_sha256
from eval.speech.measures.registry import chosen_measures
from eval.stats import ENOUGH_SPEAKERS
from eval.text.lengths import LENGTHS_HELP, LengthBin, in_order
from eval.text.normalisers import Normaliser
from recipes.config import ConfigError, Problems
from recipes.plugins import plugins_key
from recipes.runs.embedded import resolve_judge
from recipes.runs.inputs import check_sources, digest, source_name
from recipes.runs.machine import resolve_device, resolve_precision
from recipes.runs.run_folder import ADJUSTABLE, RunFolder
from recipes.scoring.code_use import corpus_code_statistics
from recipes.scoring.codec_systems import precision_of
from recipes.scoring.labels import model_label
from recipes.scoring.predictions import Predictions, predictions_sha256, read_predictions
from recipes.scoring.protocols import DEFAULT_NORMALISER, Settled, resampled, settle
from recipes.scoring.systems import System
from recipes.scoring.versa import VersaScores, read_versa
from slm.acoustic.pieces import AcousticDecoding
from slm.acoustic.stages import load_acoustic_model
from slm.corpus import CodedCorpus
from tokenizer import load_tokenizer
from tokenizer.data.manifest import read_sources
from tokenizer.data.utterances import DataSource, Utterance


@dataclass
class Config:
    """What is scored, by whom, and under which protocol."""

    run_dir: str = field(default="runs/evaluate", metadata={"help": "where results.json and report.html go"})
    title: str = field(default="Evaluation", metadata={"help": "heading of the report"})
    judges: list[JudgeConfig] = field(
        default_factory=list,
        metadata={"help": "recognisers that read the audio; none: only predictions in text are scored"},
    )
    protocol: str | None = field(
        default=None,
        metadata={
            "help": "judge, normaliser and rules by name: librispeech-hubert, whisper-large-v3, whisper-base, "
            "dwer-whisper-small, seed-tts-eval, seed-tts-eval-zh, f5-tts, embedded (eval/protocol_presets.py); then "
            "`judges` says at most where the judge's files are"
        },
    )
    normaliser: str = field(
        default=DEFAULT_NORMALISER,
        metadata={"help": "basic (basic:de, basic:zh, ...), whisper-english (read speech only) or none"},
    )
    data: list[DataSource] = field(
        default_factory=list, metadata={"help": "recordings and transcripts of the test set; none: predictions alone"}
    )
    split: str = field(default="test", metadata={"help": "split of the data"})
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "embedded-12.5hz and so on, folder, preset or hub name: adds its rows and codes' statistics"},
    )
    acoustic: str = field(
        default="",
        metadata={
            "help": "acoustic stage (RUN_DIR/model of `slm train-acoustic`) of this tokenizer: adds its row, in which "
            "another recording of the speaker is the voice"
        },
    )
    acoustic_decoding: AcousticDecoding = field(
        default_factory=AcousticDecoding, metadata={"help": "how the acoustic stage draws"}
    )
    predictions: list[str] = field(
        default_factory=list, metadata={"help": "folders (or predictions.jsonl) of slm transcribe / slm synthesize"}
    )
    versa: list[str] = field(
        default_factory=list,
        metadata={
            "help": "folders of slm export-versa in which VERSA left its scores.jsonl: more measures of the audio"
        },
    )
    codes: list[str] = field(
        default_factory=list,
        metadata={"help": "coded corpora (slm encode): how much of the tokenizer's books a whole split uses"},
    )
    codes_split: str = field(default="train", metadata={"help": "split of `codes`; varied copies do not count"})
    limit: int | None = field(default=None, metadata={"help": "score the first N utterances only"})
    samples: int = field(default=4, metadata={"help": "utterances to listen to in the report"})
    quality: bool = field(default=True, metadata={"help": "whether audio is measured"})
    measures: list[str] = field(
        default_factory=list,
        metadata={"help": "[names,of,measures] of the audio; none: log-mel distance, STOI, PESQ and level"},
    )
    measure_models: dict[str, str] = field(
        default_factory=dict,
        metadata={
            "help": "{measure: model} where another one or a folder of yours is to be used: of wavlm_similarity an "
            "x-vector model of transformers, of utmos a repository for torch.hub"
        },
    )
    text_lengths: list[LengthBin] = field(default_factory=list, metadata={"help": LENGTHS_HELP})
    seed: int = field(default=0, metadata={"help": "of the bootstrap"})
    bootstrap_samples: int = field(default=10_000, metadata={"help": "resamples of the bootstrap"})
    batch_seconds: float = field(
        default=60.0,
        metadata={"help": "padded audio that is held and encoded at a time; longer recordings go in such chunks"},
    )
    transcripts_dir: str | None = field(
        default=None,
        metadata={
            "help": "where what the judges heard is kept; evaluations that share it read no audio twice (those of a "
            "comparison do); null: run_dir/transcripts",
            **ADJUSTABLE,
        },
    )
    resample: Literal["auto", "utterances", "speakers"] = field(
        default="auto",
        metadata={"help": f"what the bootstrap draws; auto: speakers where there are {ENOUGH_SPEAKERS} or more"},
    )
    precision: str = field(
        default="auto",
        metadata={"help": "of the tokenizer: fp32, bf16 or fp16; auto: that of `codes` and `predictions`, else fp32"},
    )
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda"})
    strict: bool = field(default=False, metadata={"help": "stop at the first recording that we or a judge cannot read"})
    allow_untrained: bool = field(default=False, metadata={"help": "accept a preset's random weights"})
    plugins: list[str] = plugins_key()

    recipe = "evaluate"  # what run.json calls the command

    def __post_init__(self) -> None:
        if self.bootstrap_samples < 1 or self.batch_seconds <= 0 or self.samples < 0:
            raise ValueError("bootstrap_samples must be at least 1, batch_seconds above 0, samples 0 or more")
        in_order(self.text_lengths)
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit}: must be at least 1, or null for all")


@dataclass
class Job:
    """Everything checked and read, but no audio yet."""

    utterances: list[Utterance]  # empty where predictions alone are scored
    texts: dict[str, str]
    predictions: list[Predictions]
    identities: list[dict[str, Any]]
    tokenizer: Any
    test_set: TestSet
    column: str  # what the test set's texts are; predictions with another reference bring their own texts
    settled: Settled  # judges, normaliser and rules
    precision: str
    device: str
    code_use: list[CodeStatistics]
    speakers: dict[str, str]  # id -> speaker, empty where unknown
    durations: dict[str, float | None]  # id -> seconds
    acoustic: str  # a digest of the acoustic stage; empty where there is none
    n_speakers: int | None  # None: not known of every utterance
    resampled: str  # by the bootstrap: utterances or speakers
    versa: list[VersaScores] = field(default_factory=list)

    @property
    def ids(self) -> list[str]:
        return list(self.texts)

    @property
    def normaliser(self) -> Normaliser:
        return self.settled.normaliser

    def fingerprint(self) -> str:
        """Digest of the inputs: the same configuration over other inputs is another evaluation."""
        # A hub judge's revision says what `source` does, and folders without that key stay the same evaluation.
        judges = [{key: value for key, value in one.items() if key != "source"} for one in self.identities]
        inputs = [self.test_set.sha256, *map(predictions_sha256, self.predictions), judges]
        if self.tokenizer is not None:
            inputs.append(self.tokenizer.fingerprint(self.precision, sound=True))
        if self.resampled == "speakers":
            inputs.append(self.speakers)
        if self.versa:
            inputs.append([scores.sha256 for scores in self.versa])
        if self.acoustic:
            inputs.append(self.acoustic)
        if self.code_use:
            inputs.append([asdict(item) for item in self.code_use])
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def test_set_of(self, system: System) -> TestSet:
        """What a system is scored on: the test set, or its utterances with the system's own references."""
        if not system.references:
            return self.test_set
        return self.test_set_with(system.references, f"{self.test_set.name}, {system.column or 'no reference'}")

    def test_set_with(self, references: dict[str, str], name: str) -> TestSet:
        """The same recordings with other references."""
        pairs = list(references.items())
        return TestSet(name, test_set_sha256(pairs), len(pairs), self.test_set.audio_sha256)

    def protocol(
        self, config: Config, task: str, judge: dict[str, Any], test_set: TestSet | None = None, reference: str = "text"
    ) -> Protocol:
        return Protocol(
            task=task,
            judge=judge,
            test_set=test_set or self.test_set,
            reference=reference,
            **self.settled.rules(bool(judge)),
            seed=config.seed,
            bootstrap_samples=config.bootstrap_samples,
            resampled=self.resampled,
            n_speakers=self.n_speakers,
        )


def _check_parts(config: Config) -> None:
    """Whether each part is there by itself; raises all that is not, together."""
    problems = Problems("slm evaluate")
    problems.attempt(RunFolder(config.run_dir).check, config)
    settled = problems.attempt(settle, config.protocol, config.judges, config.normaliser)
    problems.attempt(chosen_measures, config.measures, config.measure_models)
    device = problems.attempt(resolve_device, config.device)
    problems.attempt(resolve_precision, config.precision, device or "cpu")
    for name in config.predictions:
        problems.attempt(read_predictions, name)
    for judge in _judges_needed(config, settled) if settled else config.judges:
        problems.attempt(lambda judge=judge: check_judge(resolve_judge(judge)))
    for name in config.versa:
        problems.attempt(read_versa, name)
    if config.acoustic:
        problems.attempt(load_acoustic_model, config.acoustic)
    for folder in config.codes:
        problems.attempt(CodedCorpus.open, folder)
    if config.data:
        check_sources(problems, config.data, [config.split], needs_text=settled is None or settled.needs_text)
    if problems.errors and config.tokenizer:
        problems.attempt(load_tokenizer, config.tokenizer)
    problems.raise_all()


def _judges_needed(config: Config, settled: Settled) -> list[JudgeConfig]:
    """A protocol's judge only where there is audio to read; judges that were asked for one by one in any case."""
    audio = config.data or not config.predictions
    for name in config.predictions:
        try:
            audio = audio or read_predictions(name).answers == "speech"
        except ConfigError:  # told elsewhere
            continue
    return settled.judges if audio or config.protocol is None else []


def prepare(config: Config) -> Job:
    """Check every setting against every other. Raises ConfigError, DataError, JudgeError."""
    _check_parts(config)
    if not config.data and not config.predictions:
        raise ConfigError("nothing to score: give data (a test set), predictions, or both")
    if config.tokenizer and not config.data:
        raise ConfigError("tokenizer needs recordings to encode: give data as well")
    if config.acoustic and not config.tokenizer:
        raise ConfigError("acoustic: needs the tokenizer whose codes the stage fills: give tokenizer as well")
    settled = settle(config.protocol, config.judges, config.normaliser)
    settled = replace(settled, judges=_judges_needed(config, settled))
    normaliser = settled.normaliser
    predictions = [read_predictions(name) for name in config.predictions]
    if settled.reference == "judge" and not config.data:
        raise ConfigError(f"protocol {settled.name} scores against what its judge hears in the recordings: give data")
    if not settled.judges and (config.data and not predictions or any(p.answers == "speech" for p in predictions)):
        raise ConfigError("judges: audio needs a reader; give at least one, e.g. judges=[{name: pocketsphinx}]")
    identities = [check_judge(resolve_judge(judge)) for judge in settled.judges]
    names = [identity["name"] for identity in identities]
    if len(set(names)) != len(names):
        raise ConfigError(f"judges: two are called the same ({', '.join(names)}); set `label` to tell them apart")
    utterances = read_sources(config.data, config.split, settled.needs_text)[: config.limit] if config.data else []
    column = _column(config, predictions)
    same = [found for found in predictions if found.column == column]
    texts, name = _test_texts(config, utterances, same, normaliser, settled.needs_text and column != "")
    _check_references(texts, name, predictions, column)
    versa = [read_versa(folder) for folder in config.versa]
    for scores in versa:
        if not any(i in scores.exported for i in texts):
            raise ConfigError(f"versa: {scores.folder} has none of the {len(texts)} utterances of {name}")
    tokenizer = None
    device = resolve_device(config.device)
    if config.tokenizer:
        tokenizer = load_tokenizer(config.tokenizer)
        if not tokenizer.trained and not config.allow_untrained:
            raise ConfigError(
                f"tokenizer {config.tokenizer} has random weights: its rows would mean nothing. Name a trained folder, "
                "or set allow_untrained=true for a trial of the plumbing"
            )
    precision = resolve_precision(config.precision, device)
    if config.precision == "auto" and tokenizer is not None:
        coded = [CodedCorpus.open(folder).metadata.fingerprint for folder in config.codes]
        precision = precision_of(tokenizer, [*coded, *(found.sidecar.get("fingerprint") for found in predictions)])
    if config.acoustic:
        stage = load_acoustic_model(config.acoustic).config
        stage.check_fingerprint(tokenizer.fingerprint(precision), f"tokenizer {config.tokenizer} at {precision}")
    speakers = {u.id: u.speaker for u in utterances}
    n_speakers = len(set(speakers.values())) if speakers and all(speakers.values()) else None
    return Job(
        utterances=utterances,
        texts=texts,
        predictions=predictions,
        identities=identities,
        tokenizer=tokenizer,
        test_set=TestSet(name, test_set_sha256(list(texts.items())), len(texts)),
        column=column,
        settled=settled,
        precision=precision,
        device=device,
        code_use=_code_use(config, tokenizer, precision),
        speakers=speakers,
        durations={u.id: u.duration for u in utterances},
        acoustic=digest(Path(config.acoustic)) if config.acoustic else "",
        n_speakers=n_speakers,
        resampled=resampled(config.resample, n_speakers, "name speakers in its manifest"),
        versa=versa,
    )


def _code_use(config: Config, tokenizer: Any, precision: str) -> list[CodeStatistics]:
    """How the coded corpora use the books. Raises CorpusError, ConfigError: missing, or of another tokenizer."""
    if not config.codes:
        return []
    if tokenizer is None:
        raise ConfigError("codes: give the tokenizer that they were encoded with as well")
    label, own = model_label(config.tokenizer), tokenizer.fingerprint(precision)
    return [corpus_code_statistics(folder, config.codes_split, label, own) for folder in config.codes]


def _column(config: Config, predictions: Sequence[Predictions]) -> str:
    """What the test set's texts are: the utterances' own, or what all the predictions have as their reference."""
    columns = list(dict.fromkeys(found.column for found in predictions))
    return "text" if config.data or "text" in columns else columns[0]


def _check_references(texts: dict[str, str], name: str, predictions: Sequence[Predictions], column: str) -> None:
    """Raises ConfigError where predictions are of no utterance of the test set, or bring no texts of their own."""
    for found in predictions:
        shared = [i for i in texts if i in found.lines]
        if not shared:
            raise ConfigError(f"predictions: {found.path} has none of the {len(texts)} utterances of {name}")
        if found.column not in ("", column) and not any(found.reference(i) for i in shared):
            raise ConfigError(
                f"predictions: {found.path}: task {found.task} is scored against {found.column!r}, which no utterance "
                "has; make the predictions from a corpus or data source that has that column"
            )


def _test_texts(
    config: Config,
    utterances: Sequence[Utterance],
    predictions: Sequence[Predictions],
    normaliser: Normaliser,
    needs_text: bool,
) -> tuple[dict[str, str], str]:
    """Reference texts by id, and the test set's name; with data, predictions must speak of the same texts."""
    if not utterances:
        # All that any of them speaks of: what one of them has no line for counts as failed there.
        every = {i: found.reference(i) for found in reversed(predictions) for i in found.lines}
        order = dict.fromkeys(i for found in predictions for i in found.lines)
        texts = {i: every[i] for i in list(order)[: config.limit]}
        name = predictions[0].path.parent.name
    else:
        texts = {u.id: u.text for u in utterances}
        name = f"{' + '.join(dict.fromkeys(source_name(source.path) for source in config.data))} {config.split}"
    if needs_text and not any(normaliser(text) for text in texts.values()):
        raise ConfigError(f"{name}: no utterance has a transcript, so there is nothing to score against")
    for found in predictions:
        for i in (i for i in texts if i in found.lines):
            if normaliser(found.reference(i)) != normaliser(texts[i]):
                raise ConfigError(
                    f"predictions: {found.path}: utterance {i!r} was {found.reference(i)!r}, the test set says "
                    f"{texts[i]!r}; score predictions on the data they were made from"
                )
    return texts, name
