"""``slm encode``: a speech corpus becomes codes in Parquet shards.

Utterances are sorted by length into batches over the whole split and the batches dealt out to shards, and a batch is
encoded in the same arithmetic wherever it goes: the shards are the same bytes whatever was interrupted, and whatever
the number of processes or threads. `torchrun --nproc_per_node N -m recipes.cli encode ...` starts N processes (on
several machines too, with a run_dir that all see); each encodes whole shards, on its own GPU where there are any, and
the first writes index.json when all are done. Without torchrun one process uses one GPU, or as many CPU threads as
OMP_NUM_THREADS says (all cores where it is not set), a batch to each.

Files that cannot be used are set aside and counted. A recording longer than a batch may be is read and encoded in
chunks of a batch's length, so memory does not grow with it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from recipes.config import ConfigError, Problems
from recipes.encoding.copies import OWN_TIMES
from recipes.encoding.encoder import Encoder, measure_agreement, return_free_memory
from recipes.encoding.plan import (
    LENGTHS_PER_OCTAVE,
    Item,
    Shard,
    assign_shards,
    data_fingerprint,
    deal,
    durations_of,
    interleaved,
    make_items,
    read_splits,
    refuse_unreadable,
)
from recipes.encoding.skipped import gather_skipped, report_skipped, skipped_path
from recipes.plugins import plugins_key
from recipes.runs.files import atomic_write_text, disk_errors, write_jsonl
from recipes.runs.inputs import check_sources
from recipes.runs.logs import log
from recipes.runs.machine import resolve_precision, seed_everything
from recipes.runs.processes import Processes
from recipes.runs.progress import progress
from recipes.runs.run_folder import ADJUSTABLE, RunFolder
from slm.corpus import CodedCorpusWriter, CorpusMetadata, begun_metadata
from tokenizer import load_tokenizer
from tokenizer.data.utterances import AudioError, DataError, DataSource, Utterance
from tokenizer.long_form.chunking import can_chunk
from tokenizer.precision import MIN_AGREEMENT

INTERLEAVED_SHARDS = 4  # shards of a process in the works, which a kill loses


@dataclass
class Config:
    """What is encoded with what."""

    run_dir: str = field(default="runs/codes", metadata={"help": "the coded corpus's folder"})
    tokenizer: str = field(default="", metadata={"help": "embedded-12.5hz and so on, a folder, a preset or a hub name"})
    data: list[DataSource] = field(default_factory=list, metadata={"help": "manifest, folder, Parquet file, hub name"})
    splits: list[str] = field(
        default_factory=lambda: ["train", "valid", "test"],
        metadata={"help": "which; one without data is left out"},
    )
    max_duration_s: float | None = field(default=None, metadata={"help": "longer clips are set aside; null: no limit"})
    copies: int = field(
        default=1,
        metadata={
            "help": "train split: the plain copy and copies - 1 varied ones; columns of times follow a copy's speed"
        },
    )
    seed: int = field(default=0, metadata={"help": "of the varied copies and of a preset's random weights"})
    precision: str = field(
        default="auto",
        metadata={
            "help": "auto, fp32, bf16 or fp16; part of the fingerprint. auto: bf16 where the hardware multiplies it "
            "fast and book 0 of a sample batch agrees with fp32 in at least 99 % of frames"
        },
    )
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda; each process takes its own GPU"})
    batch_seconds: float = field(
        default=60.0,
        metadata={"help": "seconds of padded audio in a batch; longer recordings go in such chunks"},
    )
    shard_size: int = field(
        default=500, metadata={"help": "utterances in a shard, about; each process encodes whole shards"}
    )
    strict: bool = field(default=False, metadata={"help": "stop at the first file that cannot be used"})
    allow_untrained: bool = field(default=False, metadata={"help": "accept a preset's random weights"})
    num_workers: int = field(
        default=2,
        metadata={
            "help": "threads of a process that read audio meanwhile (more beside a fast GPU); 0 reads in line. "
            "Processes: torchrun --nproc_per_node N -m recipes.cli encode ...",
            **ADJUSTABLE,
        },
    )
    plugins: list[str] = plugins_key()

    # Of older folders: nobody asked for them, so that these alone are no other configuration.
    former_defaults = {"max_duration_s": 120.0, "shard_size": 2000}

    def __post_init__(self) -> None:
        if self.copies < 1 or self.shard_size < 1 or self.batch_seconds <= 0 or self.num_workers < 0:
            raise ValueError("copies and shard_size must be at least 1, batch_seconds above 0, num_workers 0 or more")
        if len(set(self.splits)) != len(self.splits) or not self.splits:
            raise ValueError(f"splits: {self.splits} must name each split once, and at least one")


@dataclass(frozen=True)
class Job:
    """All that the encoding needs, checked."""

    encoder: Encoder
    metadata: CorpusMetadata
    shards: dict[str, list[Shard]]
    n_unreadable: dict[str, int]  # headers, by split
    agreement: list[float] | None  # with fp32, by book; None where it was not measured

    @property
    def n_shards(self) -> int:
        return sum(map(len, self.shards.values()))

    def items(self, split: str) -> Iterator[Item]:
        return (item for shard in self.shards[split] for batch in shard for item in batch)


def _trained_tokenizer(config: Config) -> Any:
    """Raises ConfigError where none is named, or its weights are random; and what `load_tokenizer` raises."""
    if not config.tokenizer:
        raise ConfigError("tokenizer: missing; name a folder (runs/tokenizer/model), a preset or a hub name")
    tokenizer = load_tokenizer(config.tokenizer)
    if not tokenizer.trained and not config.allow_untrained:
        raise ConfigError(
            f"tokenizer {config.tokenizer} has random weights: its codes would mean nothing. Train one with "
            "`slm train-tokenizer`, name a trained folder, or set allow_untrained=true for a trial of speed or plumbing"
        )
    return tokenizer


def _utterances(config: Config) -> dict[str, list[Utterance]]:
    if not config.data:
        raise ConfigError("data: missing; give at least one source, e.g. data.0.path=corpus/manifest.jsonl")
    found = read_splits(config.data, config.splits)
    for name in further_columns(config):
        if not any(utterance.columns.get(name) for members in found.values() for utterance in members):
            raise ConfigError(f"data: no utterance has a column {name!r}, which `columns` of a source asks for")
    return found


def further_columns(config: Config) -> list[str]:
    """The columns of text that the corpus holds beside the transcript."""
    return list(dict.fromkeys(name for source in config.data for name in source.columns))


def prepare(config: Config, processes: Processes) -> Job:
    """Load the tokenizer, read the sources and deal out the work. Raises ConfigError, DataError."""
    problems = Problems("slm encode")
    problems.attempt(RunFolder(config.run_dir).check, config)
    fastest = problems.attempt(resolve_precision, config.precision, processes.device)
    seed_everything(config.seed)
    tokenizer = problems.attempt(_trained_tokenizer, config)
    utterances = problems.attempt(_utterances, config)
    if utterances is None and config.data:
        check_sources(problems, config.data, config.splits)
    problems.raise_all()
    begun = begun_metadata(config.run_dir)
    known = [utterance for split in utterances.values() for utterance in split]
    mine = known[processes.rank :: processes.count]
    found = processes.together(lambda: durations_of(mine, config.num_workers))
    durations = [0.0] * len(known)
    for rank, part in enumerate(found):
        durations[rank :: processes.count] = part
    fingerprint, rest = data_fingerprint(utterances, durations), iter(durations)
    shards, n_unreadable = {}, {}
    for split, members in utterances.items():
        own = list(itertools.islice(rest, len(members)))
        copies = config.copies if split == "train" else 1
        facts = tokenizer.config
        items = make_items(members, own, copies, config.seed, facts.hop_length, facts.sampling_rate)
        shards[split], n_unreadable[split] = deal(items, config.batch_seconds, config.shard_size), own.count(0.0)
    longest = max(item.duration_s for split in shards.values() for shard in split for b in shard for item in b)
    if longest > config.batch_seconds and not can_chunk(tokenizer) and processes.is_main:
        log.warning(
            "%s cannot be cut into chunks: the longest recording (%.0f s) goes through whole, and memory grows with "
            "it; max_duration_s sets longer ones aside",
            config.tokenizer,
            longest,
        )
    limits = (config.batch_seconds, config.max_duration_s, config.strict, config.num_workers)
    encoder = Encoder(tokenizer.to(processes.device), fastest, processes.device, *limits)
    agreement = None
    if config.precision == "auto" and "precision" in begun:
        encoder = Encoder(tokenizer, begun["precision"], processes.device, *limits)
    elif config.precision == "auto" and fastest != "fp32":
        # One process decides for all; a resumed run keeps what was decided.
        agreement = processes.together(lambda: measure_agreement(encoder, shards) if processes.is_main else None)[0]
        if agreement is not None and agreement[0] < MIN_AGREEMENT:
            encoder = Encoder(tokenizer, "fp32", processes.device, *limits)
            if processes.is_main:
                log.warning(
                    "precision: in %s book 0 has fp32's code in %.2f %% of frames, under %.0f %%: fp32 is used "
                    "(precision=%s encodes in it all the same)",
                    fastest, 100 * agreement[0], 100 * MIN_AGREEMENT, fastest,
                )  # fmt: skip
    settings = {"splits", "max_duration_s", "copies", "seed", "batch_seconds", "shard_size"}
    plan = {"data": fingerprint, "lengths_per_octave": LENGTHS_PER_OCTAVE}
    if config.copies > 1 and further_columns(config):
        plan |= OWN_TIMES
    metadata = CorpusMetadata(
        fingerprint=tokenizer.fingerprint(encoder.precision),
        codebook_sizes=list(tokenizer.config.codebook_sizes),
        frame_rate=tokenizer.config.frame_rate,
        sampling_rate=tokenizer.config.sampling_rate,
        tokenizer=config.tokenizer,
        precision=encoder.precision,
        plan=plan | {key: value for key, value in asdict(config).items() if key in settings},
        columns=further_columns(config),
    )
    if hasattr(tokenizer, "fold_weight_norm"):
        tokenizer.fold_weight_norm()  # after the fingerprint, which is that of the weights as they are loaded
    return Job(encoder, metadata, shards, n_unreadable, agreement)


def plan(config: Config) -> dict[str, object]:
    """What an encoding would do; raises all that would stop it, together."""
    job = prepare(config, Processes(config.device, Path(config.run_dir)))
    items = [item for split in job.shards for item in job.items(split)]
    refuse_unreadable([item.utterance for item in items], [item.duration_s for item in items], config.strict)
    model, facts_of = job.encoder.tokenizer, job.metadata
    facts: dict[str, object] = {
        "tokenizer": f"{config.tokenizer} ({sum(p.numel() for p in model.parameters()):,} parameters)",
        "fingerprint": facts_of.fingerprint,
        "frame rate (Hz)": facts_of.frame_rate,
        "codebooks": facts_of.codebook_sizes,
        "precision": facts_of.precision,
        "device": job.encoder.device,
    }
    if job.agreement is not None:
        facts["frames as in fp32, by book (%)"] = [round(100 * share, 2) for share in job.agreement]
    for split in job.shards:
        seconds = sum(item.duration_s for item in job.items(split))
        frames = sum(math.ceil(item.duration_s * facts_of.frame_rate) for item in job.items(split))
        facts[split] = {
            "utterances": sum(1 for _ in job.items(split)),
            "hours": round(seconds / 3600, 3),
            "frames (speech tokens of book 0)": frames,
            "codes": frames * len(facts_of.codebook_sizes),
            "shards": len(job.shards[split]),
            "headers that cannot be read": job.n_unreadable[split],
        }
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    audio = config.batch_seconds * facts_of.sampling_rate * 4 / 2**20
    facts["memory of weights and a batch's audio (MiB)"] = round(weights + audio, 1)
    facts["result"] = config.run_dir
    return facts


def run(config: Config) -> Path:
    """Encode, or go on where a killed run stopped; returns the coded corpus's folder.

    Raises:
        ConfigError, DataError, AudioError, CorpusError: something cannot be used; the message says what to do.
        ProcessError: another process failed; the message is its own.
    """
    folder = RunFolder(config.run_dir)
    folder.check(config)
    if folder.complete:
        _refuse_other_inputs(config)
        log.info("%s is complete: skipped", config.run_dir)
        return folder.folder
    processes = Processes(config.device, folder.folder)
    job = prepare(config, processes)
    started = time.perf_counter()
    todo = processes.together(lambda: _begin(config, job, folder, processes))[0]
    total = sum(1 for split in job.shards for _ in job.items(split))
    places = [(split, index) for split, shards in job.shards.items() for index in range(len(shards))]
    weights = [sum(item.duration_s for batch in job.shards[s][i] for item in batch) for s, i in todo]
    mine = [todo[place] for place in assign_shards(weights, processes.count)[processes.rank]]
    n_shards = {split: len(shards) for split, shards in job.shards.items()}
    work = {(split, index): job.shards[split][index] for split, index in mine}
    job.shards.clear()  # what the others do need not be held
    writer = CodedCorpusWriter(folder.folder, job.metadata)
    seconds = sum(processes.together(lambda: _encode_shards(job.encoder, work, n_shards, folder, writer, processes)))
    processes.together(lambda: _finish(folder, places, total, writer) if processes.is_main else None)
    wall = time.perf_counter() - started
    if seconds and processes.is_main:
        log.info("encoded %.0f s of speech in %.0f s (real-time factor %.4f)", seconds, wall, wall / seconds)
    return folder.folder


def _refuse_other_inputs(config: Config) -> None:
    """Raises ConfigError where a finished corpus is of other recordings or another tokenizer than there are now."""
    made = begun_metadata(config.run_dir)
    changed = []
    if load_tokenizer(config.tokenizer).fingerprint(made.get("precision", "fp32")) != made["fingerprint"]:
        changed.append(f"tokenizer {config.tokenizer}")
    if "lengths_per_octave" in made["plan"]:  # corpora without it count their data in another way
        try:
            splits = read_splits(config.data, config.splits)
        except (DataError, OSError) as error:
            log.info("the recordings of %s are not here any more (%s): not compared", config.run_dir, error)
        else:
            every = [utterance for split in splits.values() for utterance in split]
            if data_fingerprint(splits, durations_of(every, config.num_workers)) != made["plan"]["data"]:
                changed.append("data")
    if changed:
        raise ConfigError(
            f"{config.run_dir} was encoded before the last change of {' and '.join(changed)}: choose another "
            "run_dir=..., or start over with --restart (sets the old folder aside)"
        )


def _begin(config: Config, job: Job, folder: RunFolder, processes: Processes) -> list[tuple[str, int]]:
    """Opens the folder, in the main process; returns the shards (split, index) that are not there yet."""
    if not processes.is_main:
        return []
    folder.start(config, job.metadata.plan["data"])
    folder.checkpoints  # noqa: B018 - makes the folder
    processes.forget_failures()
    writer = CodedCorpusWriter(folder.folder, job.metadata)
    if job.agreement is not None:
        shares = [round(share, 5) for share in job.agreement]
        record = {"precision": job.metadata.precision, "frames_as_in_fp32_by_book": shares}
        atomic_write_text(folder.path("precision.json"), json.dumps(record) + "\n")
    if job.n_shards < processes.count:
        log.warning(
            "%d processes, but %d shards: %d have nothing to encode (shard_size=%d is what decides the shards)",
            processes.count,
            job.n_shards,
            processes.count - job.n_shards,
            config.shard_size,
        )
    return [
        (split, index)
        for split, shards in job.shards.items()
        for index in range(len(shards))
        if not writer.shard_done(split, index)
    ]


def _encode_shards(
    encoder: Encoder,
    work: dict[tuple[str, int], Shard],
    n_shards: dict[str, int],
    folder: RunFolder,
    writer: CodedCorpusWriter,
    processes: Processes,
) -> float:
    """Encodes and writes this process's shards; returns their seconds of audio. Writing goes on beside encoding."""
    order = list(interleaved(work, INTERLEAVED_SHARDS))
    rows: dict[tuple[str, int], list[dict]] = {key: [] for key in work}
    skipped: dict[tuple[str, int], list[dict]] = {key: [] for key in work}
    left = {key: len(shard) for key, shard in work.items()}
    seconds, pending = 0.0, Future()
    pending.set_result(None)

    def write(split: str, index: int, rows: list[dict], skipped: list[dict]) -> None:
        # First what was set aside, then the shard: a shard that is there has its list.
        write_jsonl(skipped_path(folder, split, index), skipped)
        with disk_errors(folder.folder):
            writer.write_shard(split, index, n_shards[split], rows)
        return_free_memory()

    with ThreadPoolExecutor(1) as disk, contextlib.closing(encoder.stream(batch for _, batch in order)) as stream:
        coded = progress(stream, "encode", len(order))
        for (key, _), (more, set_aside) in zip(order, coded, strict=False):
            rows[key] += more
            skipped[key] += set_aside
            seconds += sum(row["duration"] for row in more)
            left[key] -= 1
            if not left[key]:
                pending.result()
                pending = disk.submit(write, *key, rows.pop(key), skipped.pop(key))
            processes.halt_if_one_failed()
        next(coded, None)  # the last batch is told too
        pending.result()
    return seconds


def _finish(folder: RunFolder, places: list[tuple[str, int]], total: int, writer: CodedCorpusWriter) -> None:
    """Writes skipped.jsonl and then the index, when all shards are there."""
    skipped = gather_skipped(folder, places)
    if len(skipped) == total:
        raise AudioError(f"none of the {total} recordings could be used; {folder.path('skipped.jsonl')} says why")
    counts = {"n_encoded": total - len(skipped), "n_skipped": len(skipped)}
    with disk_errors(folder.folder):
        writer.finish(counts)
    report_skipped(folder, skipped, total)
    folder.mark_complete(counts)
