"""``slm encode-text-aligned``: a coded corpus's utterances as word codes, a corpus that an SLM is fine-tuned on.

The result is a coded corpus whose frames are words: `audio_codes` (K, W), one frame of K word codes per word of the
text (``slm train-text-aligned``), its `frame_rate` the corpus's mean of words a second and no clock, its fingerprint
the text-aligned model's. The column ``words`` gives each word its one frame, so ``slm finetune n_codebooks=K
"task_weights={tts-aligned: 1}"`` learns to write the codes of a word behind the word. What it writes becomes sound by
``slm reconstruct-text-aligned word_codes=slm``. A run that was killed goes on where it was.

Raises: TextAlignedError, CorpusError, ConfigError, all ValueErrors that name the key or the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.text.normalisers import get_normaliser
from recipes.config import ConfigError, Problems
from recipes.finetuning.words import WORDS
from recipes.runs.inputs import digest, refuse_other_inputs
from recipes.runs.logs import log
from recipes.runs.machine import resolve_device
from recipes.runs.progress import progress
from recipes.runs.run_folder import RunFolder
from recipes.text_aligned.data import model_of, read_items
from slm.corpus import INDEX_NAME, CodedCorpus, CodedCorpusWriter, CodedRow, CorpusMetadata
from slm.text_aligned.configuration import TextAlignedError
from slm.text_aligned.decoding import encode_words
from slm.text_aligned.modeling import TextAlignedModel
from slm.text_aligned.samples import Item


@dataclass
class Config:
    """What becomes word codes by which model."""

    run_dir: str = field(default="runs/word-codes", metadata={"help": "the folder of the corpus of word codes"})
    model: str = field(default="", metadata={"help": "RUN_DIR/model of `slm train-text-aligned`"})
    corpus: str = field(default="", metadata={"help": "coded corpus with texts, of the model's tokenizer"})
    batch_size: int = field(default=32, metadata={"help": "utterances that are encoded together"})
    shard_size: int = field(default=2000, metadata={"help": "utterances in a shard"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda"})

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.shard_size < 1:
            raise ValueError("batch_size and shard_size must be at least 1")


@dataclass
class Job:
    """All that is needed, checked: the items of each split by id."""

    model: TextAlignedModel
    corpus: CodedCorpus
    items: dict[str, dict[str, Item]]

    @property
    def words_per_s(self) -> float:
        """Mean over all splits."""
        items = [item for split in self.items.values() for item in split.values()]
        seconds = sum(len(item.codes) for item in items) / self.model.config.frame_rate
        return sum(len(item.spans) for item in items) / seconds


def prepare(config: Config) -> Job:
    """Load and read everything. Raises what would stop the command, together where it can be."""
    problems = Problems("slm encode-text-aligned")
    problems.attempt(RunFolder(config.run_dir).check, config)
    device = problems.attempt(resolve_device, config.device)
    model = problems.attempt(model_of, config.model, device or "cpu")
    if not config.corpus:
        problems.attempt(_no_corpus)
    problems.raise_all()
    corpus = CodedCorpus.open(config.corpus)
    model.config.check_fingerprint(corpus.metadata.fingerprint, f"corpus {corpus.folder}")
    normalise, longest = get_normaliser(model.config.normaliser), (model.config.max_frames, model.config.max_bytes)
    items = {split: read_items(corpus, split, normalise, *longest) for split in corpus.splits}
    items = {split: found for split, found in items.items() if found}
    if not items:
        raise TextAlignedError(f"corpus {corpus.folder}: no utterance has a text and is short enough for the model")
    return Job(model, corpus, items)


def _no_corpus() -> None:
    raise ConfigError("corpus: not set; give the run_dir of `slm encode`, e.g. corpus=runs/codes")


def metadata_of(config: Config, job: Job) -> CorpusMetadata:
    """What the corpus of word codes says of itself."""
    facts = job.model.config
    return CorpusMetadata(
        fingerprint=digest(Path(config.model)),
        codebook_sizes=[facts.word_codebook_size] * facts.word_books,
        frame_rate=round(job.words_per_s, 4),
        sampling_rate=facts.sampling_rate,
        tokenizer=config.model,
        plan={"frames": "words", "codes": facts.fingerprint, "shard_size": config.shard_size},
        columns=[WORDS],
    )


def plan(config: Config) -> dict[str, object]:
    """What would be encoded; raises all that would stop it."""
    job = prepare(config)
    facts = job.model.config
    return {
        "model": config.model,
        "utterances": {split: len(items) for split, items in job.items.items()},
        "words a second": round(job.words_per_s, 2),
        "word codes": f"{facts.word_books} books of {facts.word_codebook_size}",
        "bits a second": round(job.words_per_s * facts.bits_per_word, 1),
        "device": str(job.model.device),
        "result": config.run_dir,
    }


def run(config: Config) -> Path:
    """Encode, or go on where a killed run stopped; returns the corpus's folder."""
    folder = RunFolder(config.run_dir)
    folder.check(config)
    job = prepare(config)
    fingerprint = digest(Path(config.model), (job.corpus.folder / INDEX_NAME).read_text(encoding="utf-8"))
    refuse_other_inputs(folder, fingerprint, "model or corpus")
    if folder.complete:
        log.info("%s is complete: skipped", config.run_dir)
        return folder.folder
    folder.start(config, fingerprint)
    metadata = metadata_of(config, job)
    writer = CodedCorpusWriter(folder.folder, metadata)
    shards = [shard for split in job.items for shard in shards_of(config, job, split)]
    for split, number, n_shards, rows in progress(shards, "encode-text-aligned", len(shards)):
        if not writer.shard_done(split, number):
            writer.write_shard(split, number, n_shards, word_rows(config, job, split, rows, metadata.frame_rate))
    writer.finish()
    folder.mark_complete({"words_per_s": metadata.frame_rate})
    return folder.folder


def shards_of(config: Config, job: Job, split: str) -> Iterator[tuple[str, int, int, list[CodedRow]]]:
    """(split, which shard, of how many, its rows) of a split."""
    rows = [row for row in job.corpus.rows(split) if row["id"] in job.items[split]]
    n_shards = -(-len(rows) // config.shard_size)
    for number in range(n_shards):
        yield split, number, n_shards, rows[number * config.shard_size : (number + 1) * config.shard_size]


def word_rows(
    config: Config, job: Job, split: str, rows: Sequence[CodedRow], frame_rate: float
) -> Iterator[dict[str, Any]]:
    """The rows as word codes; in the column `words` word n lasts from frame n to n + 1."""
    codes = encode_words(job.model, [job.items[split][row["id"]] for row in rows], config.batch_size)
    normalise = get_normaliser(job.model.config.normaliser)
    for row, own in zip(rows, codes, strict=True):
        words = [
            {"word": word, "start": number / frame_rate, "end": (number + 1) / frame_rate}
            for number, word in enumerate(normalise(row["text"]).split())
        ]
        kept = {name: row[name] for name in ("id", "text", "speaker", "duration")}
        yield kept | {"audio_codes": own, "columns": {WORDS: json.dumps(words)}}
