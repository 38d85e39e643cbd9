"""``slm reconstruct-text-aligned``: speech rebuilt from its text and its word codes (TASTE).

The texts and semantic codes of a coded corpus's split become word codes (``slm train-text-aligned``), these and the
text semantic codes again, and these sound, by the tokenizer's semantic reconstruction. ``word_codes=none`` leaves the
text alone, ``word_codes=shuffled`` deals the word codes of the split anew among its words: what each row of
``slm evaluate predictions=[...]`` loses beside ``own`` is what the word codes carried. ``word_codes=slm`` is text to
speech: an SLM (``speech_lm``) writes them from the text. Writes ``audio/*.wav``,
``predictions.jsonl`` with each utterance's word codes, and ``predictions.json`` with their bits a second. A run that
was killed goes on where it was.

Raises: TextAlignedError, CorpusError, ConfigError, all ValueErrors that name the key or the file.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile

from eval.text.normalisers import get_normaliser
from recipes.config import ConfigError, Problems
from recipes.inference.batches import Outcome, Times, begin_together, forget_batches, join_processes, work_through
from recipes.inference.scripts import NON_FINITE_SAMPLES, file_name
from recipes.inference.speech_files import decoded
from recipes.runs.files import disk_errors
from recipes.runs.inputs import digest, refuse_other_inputs
from recipes.runs.logs import log
from recipes.runs.machine import resolve_device
from recipes.runs.run_folder import RunFolder
from recipes.scoring.labels import model_label
from recipes.text_aligned.data import model_of, read_items
from recipes.text_aligned.predictions import prediction_row, write_rebuilt
from recipes.text_aligned.written import load_writer, write_words
from slm.corpus import INDEX_NAME, CodedCorpus
from slm.generation import SpeechLM
from slm.text_aligned.configuration import TextAlignedError
from slm.text_aligned.decoding import RebuildSettings, encode_words, rebuild, shuffle_words
from slm.text_aligned.modeling import TextAlignedModel
from slm.text_aligned.samples import Item
from tokenizer import load_tokenizer

# As tables tell them apart.
WAYS = {"own": "", "none": " (text alone)", "shuffled": " (shuffled word codes)", "slm": " (word codes of an SLM)"}


@dataclass
class Config:
    """What is rebuilt by which model, from what."""

    run_dir: str = field(default="runs/text-aligned-test", metadata={"help": "where audio and predictions go"})
    model: str = field(default="", metadata={"help": "RUN_DIR/model of `slm train-text-aligned`"})
    corpus: str = field(default="", metadata={"help": "coded corpus with texts, of the model's tokenizer"})
    split: str = field(default="test", metadata={"help": "which split of it"})
    limit: int | None = field(default=None, metadata={"help": "only the first N utterances"})
    word_codes: Literal["own", "none", "shuffled", "slm"] = field(
        default="own",
        metadata={
            "help": "own: the utterance's; none: the text alone; shuffled: dealt anew among the split's words; slm: "
            "what `speech_lm` writes from the text"
        },
    )
    speech_lm: str = field(
        default="",
        metadata={"help": "with word_codes=slm: RUN_DIR/model of `slm finetune` on `slm encode-text-aligned`'s corpus"},
    )
    books: int | None = field(default=None, metadata={"help": "only the first N books of the words; null: all"})
    tokenizer: str = field(default="", metadata={"help": "speech tokenizer; empty: the one the model was trained with"})
    decoding: RebuildSettings = field(default_factory=RebuildSettings, metadata={"help": "how codes are drawn"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda"})

    def __post_init__(self) -> None:
        if bool(self.speech_lm) and self.word_codes != "slm":
            raise ValueError(f"speech_lm: would not be asked with word_codes={self.word_codes}; leave one of them")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit: {self.limit} must be at least 1, or null for all")


@dataclass
class Job:
    """All that is needed, checked."""

    model: TextAlignedModel
    tokenizer: Any
    items: dict[str, Item]
    texts: dict[str, str]
    writer: SpeechLM | None = None


def prepare(config: Config) -> Job:
    """Load everything. Raises what would stop the command, together where it can be."""
    problems = Problems("slm reconstruct-text-aligned")
    problems.attempt(RunFolder(config.run_dir).check, config)
    device = problems.attempt(resolve_device, config.device)
    model = problems.attempt(model_of, config.model, device or "cpu")
    corpus = problems.attempt(_corpus, config)
    problems.raise_all()
    corpus.check_fingerprint(model.config.fingerprint)
    if config.books is not None and not 1 <= config.books <= model.config.word_books:
        raise ConfigError(f"books: {config.books} must be 1 to {model.config.word_books}, the model's, or null")
    tokenizer = load_tokenizer(config.tokenizer or model.config.tokenizer, device)
    model.config.check_fingerprint(tokenizer.fingerprint(model.config.precision), f"tokenizer {config.tokenizer}")
    if not tokenizer.decode_paths:
        raise ConfigError(f"tokenizer {config.tokenizer or model.config.tokenizer} has no decoder to make sound")
    normalise = get_normaliser(model.config.normaliser)
    longest = (model.config.max_frames, model.config.max_bytes)
    items = read_items(corpus, config.split, normalise, *longest, limit=config.limit)
    if not items:
        raise TextAlignedError(f"corpus {corpus.folder}: the {config.split} split has no utterance that can be read")
    written = {row["id"]: row["text"] for row in corpus.rows(config.split)}
    texts = {name: written[name] for name in items}
    writer = None
    if config.word_codes == "slm":
        writer = load_writer(config.speech_lm, config.model, model.config.word_books, device)
    return Job(model, tokenizer, items, texts, writer)


def _corpus(config: Config) -> CodedCorpus:
    if not config.corpus:
        raise ConfigError("corpus: not set; give the run_dir of `slm encode`, e.g. corpus=runs/codes")
    return CodedCorpus.open(config.corpus)


def plan(config: Config) -> dict[str, object]:
    """What would be rebuilt; raises all that would stop it."""
    job = prepare(config)
    facts, items = job.model.config, job.items.values()
    words, seconds = sum(len(item.spans) for item in items), sum(len(item.codes) for item in items) / facts.frame_rate
    return {
        "model": config.model,
        "speech tokenizer": config.tokenizer or facts.tokenizer,
        "utterances": len(job.items),
        "words": words,
        "bits a second of word codes": 0 if config.word_codes == "none" else words / seconds * facts.bits_per_word,
        "device": str(job.model.device),
        "result": str(Path(config.run_dir) / "predictions.jsonl"),
    }


def run(config: Config) -> Path:
    """Rebuild, or go on where a killed run stopped; returns predictions.jsonl."""
    done = RunFolder(config.run_dir)
    done.check(config)
    if done.complete:
        _refuse_others(config, done)
        log.info("%s is complete: skipped", config.run_dir)
        return done.path("predictions.jsonl")
    processes = join_processes(config)
    job = prepare(config)
    folder = begin_together(lambda: done.start(config, _refuse_others(config, done)), config, processes)
    done.path("audio").mkdir(parents=True, exist_ok=True)
    names, size = list(job.items), config.decoding.batch_size
    started = time.perf_counter()
    word_codes = chosen_words(config, job)
    encode_s = time.perf_counter() - started
    batches = [list(range(start, min(start + size, len(names)))) for start in range(0, len(names), size)]
    work = functools.partial(rebuild_batch, config, job, names, word_codes)
    outcome = work_through(batches, work, folder, processes, "reconstruct")

    def write() -> Path:
        rows = [row for _, row in sorted(outcome.rows.items())]
        recorded_s = sum(len(item.codes) for item in job.items.values()) / job.model.config.frame_rate
        times, label = outcome.times + Times(encode_s=encode_s), model_label(config.model) + WAYS[config.word_codes]
        path = write_rebuilt(config, job.model.config, label, rows, times, recorded_s)
        n_cut, n_failed = sum(row["truncated"] for row in rows), sum(row["error"] is not None for row in rows)
        log.info("rebuilt %d utterances, %d of them cut off at the longest the model knows", len(rows), n_cut)
        if n_failed:
            log.warning("%d utterances failed: %s", n_failed, NON_FINITE_SAMPLES)
        folder.mark_complete({"n": len(rows), "n_failed": n_failed, "n_truncated": n_cut})
        forget_batches(folder)
        return path

    return processes.together(lambda: write() if processes.is_main else None)[0]


def _refuse_others(config: Config, folder: RunFolder) -> str:
    """The fingerprint of model and corpus. Raises ConfigError where the folder was begun with others."""
    speech_lm = [Path(config.speech_lm)] if config.speech_lm else []
    fingerprint = digest(Path(config.model), *speech_lm, (Path(config.corpus) / INDEX_NAME).read_text(encoding="utf-8"))
    refuse_other_inputs(folder, fingerprint, "model, speech_lm or corpus")
    return fingerprint


def chosen_words(config: Config, job: Job) -> list[np.ndarray] | None:
    """Word codes (k, W) of each utterance, as they are asked for; None: none."""
    if config.word_codes == "none":
        return None
    if job.writer is not None:
        found = write_words(job.writer, list(job.texts.values()), list(job.texts), config.decoding)
    else:
        found = encode_words(job.model, list(job.items.values()), config.decoding.batch_size)
    if config.word_codes == "shuffled":
        found = shuffle_words(found, config.decoding.seed)
    return [codes[: config.books] for codes in found]


def rebuild_batch(
    config: Config, job: Job, names: Sequence[str], word_codes: Sequence[np.ndarray] | None, numbers: Sequence[int]
) -> Outcome:
    """Some utterances, by their numbers: rebuilt, decoded and written."""
    ids = [names[number] for number in numbers]
    words = None if word_codes is None else [word_codes[number] for number in numbers]
    started = time.perf_counter()
    rebuilt = rebuild(job.model, [job.items[name] for name in ids], words, ids, config.decoding)
    drawn = time.perf_counter()
    outcome, rate = Outcome(), job.tokenizer.config.sampling_rate
    waveforms = decoded(job.tokenizer, [found.codes[None] for found in rebuilt], str(job.model.device))
    for place, (number, name, waveform) in enumerate(zip(numbers, ids, waveforms, strict=True)):
        audio = f"audio/{file_name(name)}"
        path = Path(config.run_dir) / audio
        own = None if words is None else words[place]
        row = prediction_row(name, job.texts[name], audio, rebuilt[place], waveform, rate, own)
        if row["error"] is None:
            with disk_errors(path):
                soundfile.write(path, waveform, rate, "PCM_16")
        outcome.rows[number] = row
    n_codes = sum(len(found.codes) for found in rebuilt)
    outcome.times = Times(0.0, drawn - started, time.perf_counter() - drawn, n_codes)
    return outcome
