"""``slm evaluate``: scores for recordings, a tokenizer and an SLM's predictions, in ``results.json`` and a report.

Each judge reads every system's audio: the recordings (ground truth), the tokenizer's reconstruction, semantic
reconstruction and resynthesis, and synthesised speech. The SLM's own transcripts are scored text against text. Every
row has S, D, I, N, its interval and its protocol; whatever fails is counted and scored as all words missed. Audio is
made once, however many judges read it.

Errors: ConfigError for settings, predictions or data that do not fit together; JudgeError for a judge that is missing.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from eval.codes import CodeStatistics, code_statistics
from eval.judge import Judge, JudgeConfig, check_judge, load_judge
from eval.markdown import write_markdown
from eval.report import format_table, write_report
from eval.schema import (
    Difference,
    Protocol,
    Results,
    Row,
    TestSet,
    compare_rows,
    make_row,
    save_results,
    test_set_sha256,
)
from eval.text import Normaliser, get_normaliser
from eval.wer import score_pairs
from recipes.code_use import corpus_code_statistics
from recipes.config import ConfigError
from recipes.embedded import resolve_judge
from recipes.listening import listening_samples, quality_of, write_listings
from recipes.runtime import (
    RunFolder,
    describe_run,
    log,
    read_json,
    resolve_device,
    resolve_precision,
)
from recipes.systems import (
    Predictions,
    System,
    codec_systems,
    load_recordings,
    model_label,
    precision_of,
    predicted_system,
    predictions_sha256,
    read_predictions,
)
from slm.corpus import CodedCorpus
from tokenizer import load_tokenizer
from tokenizer.data import DataSource, Utterance, read_sources
from tokenizer.precision import exact_fp32

AUDIO_HZ = 16_000  # recordings, where no tokenizer asks for another rate, and synthesised speech
# Row kinds against which a row's difference is drawn, the first that there is.
BASELINES = {
    "reconstruction": ("ground_truth",),
    "semantic_reconstruction": ("ground_truth",),
    "resynthesis": ("ground_truth",),
    "tts": ("semantic_reconstruction", "reconstruction", "ground_truth"),
}


@dataclass
class Config:
    """What is scored, by whom, and under which protocol."""

    run_dir: str = field(default="runs/evaluate", metadata={"help": "where results.json and report.html go"})
    title: str = field(default="Evaluation", metadata={"help": "heading of the report"})
    judges: list[JudgeConfig] = field(
        default_factory=list,
        metadata={"help": "recognisers that read the audio; none: only ASR predictions are scored"},
    )
    normaliser: str = field(default="basic", metadata={"help": "basic, whisper-english (read speech only) or none"})
    data: list[DataSource] = field(
        default_factory=list, metadata={"help": "recordings and transcripts of the test set; none: predictions alone"}
    )
    split: str = field(default="test", metadata={"help": "split of the data"})
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "embedded-12.5hz and so on, folder, preset or hub name: adds its rows and codes' statistics"},
    )
    predictions: list[str] = field(
        default_factory=list, metadata={"help": "folders (or predictions.jsonl) of slm transcribe / slm synthesize"}
    )
    codes: list[str] = field(
        default_factory=list,
        metadata={"help": "coded corpora (slm encode): how much of the tokenizer's books a whole split uses"},
    )
    codes_split: str = field(default="train", metadata={"help": "split of `codes`; varied copies do not count"})
    limit: int | None = field(default=None, metadata={"help": "score the first N utterances only"})
    samples: int = field(default=4, metadata={"help": "utterances to listen to in the report"})
    quality: bool = field(default=True, metadata={"help": "log-mel distance, STOI and PESQ of the tokenizer's audio"})
    seed: int = field(default=0, metadata={"help": "of the bootstrap"})
    bootstrap_samples: int = field(default=10_000, metadata={"help": "resamples of the bootstrap"})
    batch_seconds: float = field(default=60.0, metadata={"help": "padded audio that the tokenizer takes at a time"})
    precision: str = field(
        default="auto",
        metadata={"help": "of the tokenizer: fp32, bf16 or fp16; auto: that of `codes` and `predictions`, else fp32"},
    )
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda"})
    strict: bool = field(default=False, metadata={"help": "stop at the first recording that cannot be read"})
    allow_untrained: bool = field(default=False, metadata={"help": "accept a preset's random weights"})

    def __post_init__(self) -> None:
        if self.bootstrap_samples < 1 or self.batch_seconds <= 0 or self.samples < 0:
            raise ValueError("bootstrap_samples must be at least 1, batch_seconds above 0, samples 0 or more")
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
    normaliser: Normaliser
    precision: str
    device: str
    code_use: list[CodeStatistics]

    @property
    def ids(self) -> list[str]:
        return list(self.texts)

    def fingerprint(self) -> str:
        """Digest of the inputs: the same configuration over other inputs is another evaluation."""
        inputs = [self.test_set.sha256, *map(predictions_sha256, self.predictions), self.identities]
        if self.tokenizer is not None:
            inputs.append(self.tokenizer.fingerprint(self.precision))
        if self.code_use:
            inputs.append([asdict(item) for item in self.code_use])
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def protocol(self, config: Config, task: str, judge: dict[str, Any]) -> Protocol:
        return Protocol(
            task=task,
            judge=judge,
            normaliser=self.normaliser.name,
            normaliser_version=self.normaliser.version,
            test_set=self.test_set,
            seed=config.seed,
            bootstrap_samples=config.bootstrap_samples,
        )


def prepare(config: Config) -> Job:
    """Check every setting against every other. Raises ConfigError, DataError, JudgeError."""
    if not config.data and not config.predictions:
        raise ConfigError("nothing to score: give data (a test set), predictions, or both")
    if config.tokenizer and not config.data:
        raise ConfigError("tokenizer needs recordings to encode: give data as well")
    normaliser = get_normaliser(config.normaliser)
    predictions = [read_predictions(name) for name in config.predictions]
    if not config.judges and (config.data and not predictions or any(p.task == "tts" for p in predictions)):
        raise ConfigError("judges: audio needs a reader; give at least one, e.g. judges=[{name: pocketsphinx}]")
    identities = [check_judge(resolve_judge(judge)) for judge in config.judges]
    names = [identity["name"] for identity in identities]
    if len(set(names)) != len(names):
        raise ConfigError(f"judges: two are called the same ({', '.join(names)}); set `label` to tell them apart")
    utterances = read_sources(config.data, config.split)[: config.limit] if config.data else []
    texts, name = _test_texts(config, utterances, predictions, normaliser)
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
    return Job(
        utterances=utterances,
        texts=texts,
        predictions=predictions,
        identities=identities,
        tokenizer=tokenizer,
        test_set=TestSet(name, test_set_sha256(list(texts.items())), len(texts)),
        normaliser=normaliser,
        precision=precision,
        device=device,
        code_use=_code_use(config, tokenizer, precision),
    )


def _code_use(config: Config, tokenizer: Any, precision: str) -> list[CodeStatistics]:
    """How the coded corpora use the books. Raises CorpusError, ConfigError: missing, or of another tokenizer."""
    if not config.codes:
        return []
    if tokenizer is None:
        raise ConfigError("codes: give the tokenizer that they were encoded with as well")
    label, own = model_label(config.tokenizer), tokenizer.fingerprint(precision)
    return [corpus_code_statistics(folder, config.codes_split, label, own) for folder in config.codes]


def _test_texts(
    config: Config, utterances: Sequence[Utterance], predictions: Sequence[Predictions], normaliser: Normaliser
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
        folders = [Path(s.path).parent if Path(s.path).suffix else Path(s.path) for s in config.data]
        name = f"{' + '.join(dict.fromkeys(folder.name for folder in folders))} {config.split}"
    if not any(normaliser(text) for text in texts.values()):
        raise ConfigError(f"{name}: no utterance has a transcript, so there is nothing to score against")
    for found in predictions:
        shared = [i for i in texts if i in found.lines]
        if not shared:
            raise ConfigError(f"predictions: {found.path} has none of the {len(texts)} utterances of {name}")
        for i in shared:
            if normaliser(found.reference(i)) != normaliser(texts[i]):
                raise ConfigError(
                    f"predictions: {found.path}: utterance {i!r} was {found.reference(i)!r}, the test set says "
                    f"{texts[i]!r}; score predictions on the data they were made from"
                )
    return texts, name


def plan(config: Config) -> dict[str, object]:
    """What an evaluation would do; raises what would stop it."""
    RunFolder(config.run_dir).check(config)
    job = prepare(config)
    seconds = [u.duration for u in job.utterances if u.duration is not None]
    facts: dict[str, object] = {
        "test set": job.test_set.name,
        "utterances": job.test_set.n,
        "reference words": sum(len(job.normaliser(text).split()) for text in job.texts.values()),
        "minutes of recordings": round(sum(seconds) / 60, 2),
        "normaliser": f"{job.normaliser.name} {job.normaliser.version}",
        "judges": {identity["name"]: f"{identity['kind']}, {identity['decoding']}" for identity in job.identities},
        "device": job.device,
        "result": str(RunFolder(config.run_dir).path("report.html")),
    }
    if job.tokenizer is not None:
        tokenizer = job.tokenizer.config
        facts["tokenizer"] = {
            "name": model_label(config.tokenizer),
            "frame rate (Hz)": tokenizer.frame_rate,
            "codebooks": tokenizer.codebook_sizes,
            "speech tokens (about)": round(sum(seconds) * tokenizer.frame_rate),
        }
    for found in job.predictions:
        facts[f"predictions {found.path.parent}"] = f"{found.task}, {sum(i in found.lines for i in job.ids)} utterances"
    return facts


@exact_fp32()  # judges and tokenizers whose protocol says fp32
def run(config: Config) -> Path:
    """Score everything and write the run folder; returns it."""
    folder = RunFolder(config.run_dir)
    folder.check(config)
    job = prepare(config)
    if folder.complete:
        if read_json(folder.path("run.json")).get("data_fingerprint") != job.fingerprint():
            raise ConfigError(
                f"{config.run_dir} holds the scores of other inputs (predictions, texts, judge or tokenizer have "
                "changed since): choose another run_dir, or start over with --restart"
            )
        log.info("%s is complete: skipped", config.run_dir)
        return folder.folder
    folder.start(config, job.fingerprint())
    systems, codes, notes = _gather(config, job)
    rows: list[Row] = []
    heard: list[dict[str, dict[str, str | None]]] = [{} for _ in systems]  # judge -> id -> text
    for settings in config.judges:
        judge = load_judge(resolve_judge(settings), job.device)
        mine = [(i, system) for i, system in enumerate(systems) if system.kind != "asr"]
        for i, system in mine:
            heard[i][judge.name] = _read(judge, system)
        protocol = job.protocol(config, "speech", judge.identity)
        judged = [_row(job, protocol, system, heard[i][judge.name]) for i, system in mine]
        _add_differences(judged, [system for _, system in mine])
        rows += judged
    for i, system in enumerate(systems):
        if system.kind == "asr":
            heard[i][system.name] = system.texts
            rows.append(_row(job, job.protocol(config, "asr", {}), system, system.texts))
    results = Results(
        title=config.title,
        rows=rows,
        codes=codes,
        quality=quality_of(systems, job.test_set.name, config.bootstrap_samples, config.seed) if config.quality else [],
        samples=listening_samples(folder.path("samples"), config.samples, job.texts, systems, heard),
        notes=notes,
        created=time.strftime("%Y-%m-%d %H:%M"),
        versions=describe_run(config)["versions"],
    )
    save_results(results, folder.folder)
    write_report(results, folder.folder)
    write_markdown(results, folder.folder)
    write_listings(folder.folder, rows)
    print(format_table(results), flush=True)
    folder.mark_complete({f"{row.protocol.judge.get('name', 'asr')}: {row.name}": row.wer for row in rows})
    log.info("report: %s", folder.path("report.html"))
    return folder.folder


def _gather(config: Config, job: Job) -> tuple[list[System], list[CodeStatistics], list[str]]:
    """Every system with its audio or texts, the codes' statistics, and notes on what failed."""
    systems: list[System] = []
    codes: list[CodeStatistics] = []
    notes: list[str] = []
    if job.utterances and (config.judges or job.tokenizer is not None):
        rate = job.tokenizer.config.sampling_rate if job.tokenizer is not None else AUDIO_HZ
        recordings, notes = load_recordings(job.utterances, rate, config.strict)
        if not any(audio is not None for audio in recordings.audios.values()):
            raise ConfigError(f"{job.test_set.name}: no recording can be read; the first: {notes[0]}")
        systems.append(recordings)
        if job.tokenizer is not None:
            label = model_label(config.tokenizer)
            tokenizer = job.tokenizer.to(job.device)
            found, arrays = codec_systems(tokenizer, label, recordings, config.batch_seconds, job.precision, job.device)
            systems += found
            sizes, frame_rate = tokenizer.config.codebook_sizes, tokenizer.config.frame_rate
            codes.append(code_statistics(arrays, sizes, frame_rate, label, job.test_set.name))
    codes += job.code_use
    for predictions in job.predictions:
        system, more = predicted_system(predictions, job.ids, AUDIO_HZ)
        systems.append(system)
        notes += more
        own = job.tokenizer.fingerprint(job.precision) if job.tokenizer is not None else None
        if own and system.fingerprint and system.fingerprint != own:
            notes.append(
                f"{predictions.path}: made with other codes than those of tokenizer {config.tokenizer} at "
                f"{job.precision}, so none of its rows is their topline"
            )
    names = [system.name for system in systems]
    for position, system in enumerate(systems):
        if names.count(names[position]) > 1:  # several models at one task: a row's name tells them apart
            number = names[: position + 1].count(names[position])
            same = [s.model for s in systems if s.kind == system.kind].count(system.model) > 1
            system.name = f"{names[position]} ({system.model}{f' {number}' if same else ''})"
    return systems, codes, notes


def _read(judge: Judge, system: System) -> dict[str, str | None]:
    """What a judge hears in each utterance; None where there is no audio."""
    there = [(i, audio) for i, audio in system.audios.items() if audio is not None and audio.size]
    started = time.perf_counter()
    texts = judge.transcribe([audio for _, audio in there], system.sampling_rate)
    log.info("%s read %s %s in %.1f s", judge.name, system.name, system.model, time.perf_counter() - started)
    return dict.fromkeys(system.audios) | dict(zip((i for i, _ in there), texts, strict=True))


def _row(job: Job, protocol: Protocol, system: System, texts: dict[str, str | None]) -> Row:
    rates = score_pairs(list(job.texts.values()), [texts.get(i) for i in job.ids], job.normaliser, job.ids)
    return make_row(system.name, system.kind, system.model, protocol, rates, **system.facts)


def _add_differences(rows: list[Row], systems: list[System]) -> None:
    """Draw each row's difference from its topline.

    A TTS row's is the decoder it speaks with (same tokenizer, as many books), if that was scored.
    """
    for row, system in zip(rows, systems, strict=True):
        for kind in BASELINES.get(row.system, ()):
            against = next(
                (
                    other
                    for other, source in zip(rows, systems, strict=True)
                    if other.system == kind
                    and (
                        kind == "ground_truth"
                        or (source.fingerprint, other.tokens_per_second) == (system.fingerprint, row.tokens_per_second)
                    )
                ),
                None,
            )
            if against is not None and len(row.utterances) > 1:
                found = compare_rows(row, against)
                row.difference = Difference(against.name, found.difference, found.interval, found.p_value)
                break
