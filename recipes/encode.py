"""``slm encode``: a speech corpus becomes codes in Parquet shards.

Shapes: B items, S samples, K books, F frames; waveforms (S,), codes (K, F).

Utterances are sorted by length into batches over the whole split and the batches dealt out to shards, so that the
shards are the same bytes whatever was interrupted. Files that cannot be used are set aside and counted. A recording
longer than a batch may be is read and encoded in chunks of a batch's length, so memory does not grow with it.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import soundfile

from recipes.config import ConfigError
from recipes.encode_audio import Variation, encode_batch, encode_recording
from recipes.runtime import (
    MAY_CHANGE,
    RunFolder,
    atomic_write_text,
    disk_errors,
    log,
    progress,
    resolve_device,
    resolve_precision,
    seed_everything,
)
from slm.corpus import CodedCorpusWriter, CorpusMetadata
from tokenizer import load_tokenizer
from tokenizer.chunking import can_chunk
from tokenizer.data import AudioError, DataError, DataSource, RowAudio, Utterance, load_audio, read_source
from tokenizer.long_audio import LongAudio

SHOWN = 10


@dataclass
class Config:
    """What is encoded with what."""

    run_dir: str = field(default="runs/codes", metadata={"help": "the coded corpus's folder"})
    tokenizer: str = field(default="", metadata={"help": "folder, preset or hub name of the speech tokenizer"})
    data: list[DataSource] = field(default_factory=list, metadata={"help": "manifest, folder, Parquet file, hub name"})
    splits: list[str] = field(
        default_factory=lambda: ["train", "valid", "test"],
        metadata={"help": "which; one without data is left out"},
    )
    max_duration_s: float | None = field(default=None, metadata={"help": "longer clips are set aside; null: no limit"})
    copies: int = field(default=1, metadata={"help": "train split: the plain copy and copies - 1 varied ones"})
    seed: int = field(default=0, metadata={"help": "of the varied copies and of a preset's random weights"})
    precision: str = field(default="auto", metadata={"help": "auto, fp32, bf16 or fp16; part of the fingerprint"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda"})
    batch_seconds: float = field(
        default=60.0,
        metadata={"help": "seconds of padded audio in a batch; longer recordings go in such chunks"},
    )
    shard_size: int = field(default=2000, metadata={"help": "utterances in a shard, about"})
    strict: bool = field(default=False, metadata={"help": "stop at the first file that cannot be used"})
    allow_untrained: bool = field(default=False, metadata={"help": "accept a preset's random weights"})
    num_workers: int = field(
        default=2, metadata={"help": "threads that read audio meanwhile; 0 reads in line", MAY_CHANGE: True}
    )

    # Of finished folders; memory no longer grows with a recording's length, so the limit went.
    former_defaults = {"max_duration_s": 120.0}

    def __post_init__(self) -> None:
        if self.copies < 1 or self.shard_size < 1 or self.batch_seconds <= 0 or self.num_workers < 0:
            raise ValueError("copies and shard_size must be at least 1, batch_seconds above 0, num_workers 0 or more")
        if len(set(self.splits)) != len(self.splits) or not self.splits:
            raise ValueError(f"splits: {self.splits} must name each split once, and at least one")


@dataclass(frozen=True)
class Item:
    """One thing to encode: an utterance, as recorded or varied."""

    utterance: Utterance
    copy: int
    variation: Variation
    duration_s: float

    @property
    def id(self) -> str:
        return f"{self.utterance.id}#{self.copy}" if self.copy else self.utterance.id


@dataclass(frozen=True)
class Job:
    """All that the encoding needs, checked."""

    tokenizer: Any
    precision: str
    device: str
    shards: dict[str, list[list[list[Item]]]]  # split -> shards -> batches -> items
    data_fingerprint: str

    def items(self, split: str) -> Iterator[Item]:
        return (item for shard in self.shards[split] for batch in shard for item in batch)


def prepare(config: Config) -> Job:
    """Load the tokenizer, read the sources and deal out the work. Raises ConfigError, DataError."""
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ConfigError(f"encode runs in one process, {processes} were started: they would write the same shards")
    RunFolder(config.run_dir).check(config)
    if not config.tokenizer:
        raise ConfigError("tokenizer: missing; name a folder (runs/tokenizer/model), a preset or a hub name")
    if not config.data:
        raise ConfigError("data: missing; give at least one source, e.g. data=[{path: corpus/manifest.jsonl}]")
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    utterances = read_splits(config)
    seed_everything(config.seed)
    tokenizer = load_tokenizer(config.tokenizer)
    if not tokenizer.trained and not config.allow_untrained:
        raise ConfigError(
            f"tokenizer {config.tokenizer} has random weights: its codes would mean nothing. Train one with "
            "`slm train-tokenizer`, name a trained folder, or set allow_untrained=true for a trial of speed or plumbing"
        )
    known = [utterance for split in utterances.values() for utterance in split]
    with ThreadPoolExecutor(max(1, config.num_workers)) as pool:
        durations = dict(zip((u.id for u in known), pool.map(duration_of, known), strict=True))
    shards, digest = {}, hashlib.sha256()
    for split, members in utterances.items():
        items = []
        for copy in range(config.copies if split == "train" else 1):
            for utterance in members:
                variation = Variation.draw(utterance.id, copy, config.seed, tokenizer.config.hop_length)
                shift_s = variation.shift / tokenizer.config.sampling_rate
                items.append(Item(utterance, copy, variation, durations[utterance.id] / variation.speed + shift_s))
        shards[split] = deal(items, config.batch_seconds, config.shard_size)
        for u in members:
            digest.update(json.dumps([split, u.id, u.text, u.speaker, durations[u.id]]).encode())
    longest = max(item.duration_s for split in shards.values() for shard in split for b in shard for item in b)
    if longest > config.batch_seconds and not can_chunk(tokenizer):
        log.warning(
            "%s cannot be cut into chunks: the longest recording (%.0f s) goes through whole, and memory grows with "
            "it; max_duration_s sets longer ones aside",
            config.tokenizer,
            longest,
        )
    return Job(tokenizer.to(device), precision, device, shards, digest.hexdigest())


def read_splits(config: Config) -> dict[str, list[Utterance]]:
    """The utterances of each split that has any. Raises DataError: two of one id, or none at all."""
    found, seen = {}, {}
    for split in config.splits:
        utterances = [utterance for source in config.data for utterance in read_source(source, split)]
        for utterance in utterances:
            if utterance.id in seen:
                raise DataError(
                    f"id {utterance.id!r} stands for both {seen[utterance.id]} and {utterance.name}: ids must differ"
                )
            seen[utterance.id] = utterance.name
        if utterances:
            found[split] = utterances
        else:
            log.info("no utterances in split %s: left out", split)
    if not found:
        raise DataError(f"no utterances in {', '.join(config.splits)} of {', '.join(s.path for s in config.data)}")
    return found


def duration_of(utterance: Utterance) -> float:
    """Seconds as the file's header says (a manifest may err); 0 where there is none, as reading will report."""
    audio = utterance.audio
    try:
        if isinstance(audio, RowAudio):
            content, path = audio.read()
            audio = content if content is not None else path
        return soundfile.info(io.BytesIO(audio) if isinstance(audio, bytes) else audio).duration
    except (soundfile.LibsndfileError, OSError, RuntimeError, TypeError, ValueError):
        return 0.0


def deal(items: list[Item], batch_seconds: float, shard_size: int) -> list[list[list[Item]]]:
    """Batches of like length (shortest first), dealt to shards in turn, so that every shard has short and long ones."""
    batches: list[list[Item]] = []
    for item in sorted(items, key=lambda item: (item.duration_s, item.id)):
        # Sorted, so the newest is the longest: the batch would be padded to it.
        if batches and (len(batches[-1]) + 1) * item.duration_s <= batch_seconds and len(batches[-1]) < shard_size:
            batches[-1].append(item)
        else:
            batches.append([item])
    n_shards = min(math.ceil(len(items) / shard_size), len(batches))
    return [batches[index::n_shards] for index in range(n_shards)]


def read_batch(config: Config, items: list[Item], sampling_rate: int, chunks: bool) -> list[Any]:
    """The waveform (S,) of each item, a LongAudio where it is to be cut in chunks, or the AudioError why not."""
    limit, strict = config.max_duration_s, config.strict
    found: list[Any] = []
    for item in items:
        try:
            if chunks and item.duration_s > config.batch_seconds:
                found.append(LongAudio(item.utterance, sampling_rate, limit))
                continue
            found.append(item.variation.apply(load_audio(item.utterance, sampling_rate, limit), sampling_rate))
        except AudioError as error:
            if strict:
                raise
            found.append(error)
    return found


def plan(config: Config) -> dict[str, object]:
    """What an encoding would do; raises what would stop it."""
    job = prepare(config)
    model = job.tokenizer
    facts: dict[str, object] = {
        "tokenizer": f"{config.tokenizer} ({sum(p.numel() for p in model.parameters()):,} parameters)",
        "fingerprint": model.fingerprint(job.precision),
        "frame rate (Hz)": model.config.frame_rate,
        "codebooks": model.config.codebook_sizes,
        "precision": job.precision,
        "device": job.device,
    }
    for split in job.shards:
        seconds = sum(item.duration_s for item in job.items(split))
        frames = sum(math.ceil(item.duration_s * model.config.frame_rate) for item in job.items(split))
        facts[split] = {
            "utterances": sum(1 for _ in job.items(split)),
            "hours": round(seconds / 3600, 3),
            "frames (speech tokens of book 0)": frames,
            "codes": frames * len(model.config.codebook_sizes),
            "shards": len(job.shards[split]),
            "headers that cannot be read": sum(duration_of(item.utterance) == 0 for item in job.items(split)),
        }
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    audio = config.batch_seconds * model.config.sampling_rate * 4 / 2**20
    facts["memory of weights and a batch's audio (MiB)"] = round(weights + audio, 1)
    facts["result"] = config.run_dir
    return facts


def run(config: Config) -> Path:
    """Encode, or go on where a killed run stopped; returns the coded corpus's folder."""
    folder = RunFolder(config.run_dir)
    folder.check(config)
    if folder.complete:
        log.info("%s is complete: skipped", config.run_dir)
        return folder.folder
    job = prepare(config)
    folder.start(config, job.data_fingerprint)
    model = job.tokenizer
    settings = {"splits", "max_duration_s", "copies", "seed", "batch_seconds", "shard_size"}
    metadata = CorpusMetadata(
        fingerprint=model.fingerprint(job.precision),
        codebook_sizes=list(model.config.codebook_sizes),
        frame_rate=model.config.frame_rate,
        sampling_rate=model.config.sampling_rate,
        tokenizer=config.tokenizer,
        precision=job.precision,
        plan={"data": job.data_fingerprint} | {key: value for key, value in asdict(config).items() if key in settings},
    )
    writer = CodedCorpusWriter(folder.folder, metadata)
    started, seconds = time.perf_counter(), 0.0
    for split, shards in job.shards.items():
        for index, batches in enumerate(shards):
            if writer.shard_done(split, index):
                continue
            name = f"{split} {index + 1}/{len(shards)}"
            rows, skipped = _encode_shard(config, job, batches, name)
            seconds += sum(row["duration"] for row in rows)
            # First what was set aside, then the shard: a shard that is there has its list.
            _write_lines(_skipped_path(folder, split, index), skipped)
            with disk_errors(folder.folder):
                writer.write_shard(split, index, len(shards), rows)
    skipped = _gather_skipped(folder, job)
    total = sum(1 for split in job.shards for _ in job.items(split))
    if len(skipped) == total:
        raise AudioError(f"none of the {total} recordings could be used; {folder.path('skipped.jsonl')} says why")
    with disk_errors(folder.folder):
        writer.finish({"n_skipped": len(skipped), "n_encoded": total - len(skipped)})
    _report_skipped(folder, skipped, total)
    wall = time.perf_counter() - started
    if seconds:
        log.info("encoded %.0f s of speech in %.0f s (real-time factor %.4f)", seconds, wall, wall / seconds)
    folder.mark_complete({"n_encoded": total - len(skipped), "n_skipped": len(skipped)})
    return folder.folder


def _encode_shard(config: Config, job: Job, batches: list[list[Item]], name: str) -> tuple[list[dict], list[dict]]:
    rows: list[dict] = []
    skipped: list[dict] = []
    rate = job.tokenizer.config.sampling_rate
    for items, waveforms in progress(_read_ahead(config, job, batches), f"encode {name}", len(batches)):
        good = [(i, w) for i, w in zip(items, waveforms, strict=True) if not isinstance(w, AudioError)]
        for item, error in zip(items, waveforms, strict=True):
            if isinstance(error, AudioError):
                skipped.append({"id": item.id, "file": item.utterance.name, "reason": str(error)})
        if not good:
            continue
        if isinstance(good[0][1], LongAudio):  # longer than a batch, so alone in it
            (item, recording), model = good[0], job.tokenizer
            blocks = item.variation.blocks(recording)
            codes, duration = encode_recording(model, blocks, config.batch_seconds, job.precision, job.device)
            encoded = [(item, codes, duration)]
        else:
            waveforms = [waveform for _, waveform in good]
            codes = encode_batch(job.tokenizer, waveforms, job.precision, job.device)
            encoded = [(i, c, len(w) / rate) for (i, w), c in zip(good, codes, strict=True)]
        for item, item_codes, duration in encoded:
            utterance = item.utterance
            row = {"id": item.id, "text": utterance.text, "speaker": utterance.speaker, "duration": duration}
            rows.append(row | {"audio_codes": item_codes})
    return rows, skipped


def _read_ahead(config: Config, job: Job, batches: list[list[Item]]) -> Iterator[tuple[list[Item], list[Any]]]:
    """Batches with their waveforms, in order; threads read the next ones while this one is encoded."""
    rate, chunks = job.tokenizer.config.sampling_rate, can_chunk(job.tokenizer)
    if config.num_workers == 0:
        for items in batches:
            yield items, read_batch(config, items, rate, chunks)
        return
    ahead = config.num_workers + 1
    with ThreadPoolExecutor(config.num_workers) as pool:
        waiting = []
        try:
            for position, items in enumerate(batches):
                while len(waiting) < ahead and position + len(waiting) < len(batches):
                    coming = batches[position + len(waiting)]
                    waiting.append(pool.submit(read_batch, config, coming, rate, chunks))
                yield items, waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


def _skipped_path(folder: RunFolder, split: str, index: int) -> Path:
    return folder.path("checkpoints", f"skipped-{split}-{index:05d}.jsonl")


def _write_lines(path: Path, rows: list[dict]) -> None:
    atomic_write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _gather_skipped(folder: RunFolder, job: Job) -> list[dict]:
    """All that was set aside, in the shards' order, written to skipped.jsonl."""
    skipped = []
    for split, shards in job.shards.items():
        for index in range(len(shards)):
            lines = _skipped_path(folder, split, index).read_text(encoding="utf-8").splitlines()
            skipped += [json.loads(line) | {"split": split} for line in lines]
    _write_lines(folder.path("skipped.jsonl"), skipped)
    return skipped


def _report_skipped(folder: RunFolder, skipped: list[dict], total: int) -> None:
    if not skipped:
        log.info("all %d recordings were encoded", total)
        return
    log.warning("encoded %d of %d; set aside %d:", total - len(skipped), total, len(skipped))
    for row in skipped[:SHOWN]:
        log.warning("  %s", row["reason"])
    if len(skipped) > SHOWN:
        log.warning("  and %d more", len(skipped) - SHOWN)
    log.warning("all of them: %s (--strict stops at the first)", folder.path("skipped.jsonl"))
