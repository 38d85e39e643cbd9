"""``slm transcribe``: speech to text with a fine-tuned SLM: its transcript, or what another task answers in text.

Reads your own files (``slm transcribe a.wav b.flac model=RUN/model``), a split of a data source, or of a coded corpus,
which needs no speech tokenizer. A recording longer than the model's training utterances is cut at quiet places, its
pieces transcribed and joined; a coded one has no sound to cut by and goes through whole, and so does one that stands in
the prompt beside a text. Writes ``predictions.jsonl``
and, beside it, ``predictions.json`` with the model, the decoding settings and the real-time factors. A recording that
cannot be used gets an ``error`` and no hypothesis: it is counted, never dropped. So is what was cut off, at its budget
or in a loop.

`torchrun --nproc_per_node N -m recipes.cli transcribe ...` starts N processes, each with its own part of the
utterances; a run that was killed goes on where it was. Either way the result is that of one process.

Not here: scores (``slm evaluate``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from eval.text.normalisers import get_normaliser
from recipes.config import ConfigError, Problems
from recipes.continuous import transcription
from recipes.encoding.plan import HEADER_THREADS, durations_of
from recipes.inference.batches import (
    Outcome,
    Times,
    answers_together,
    begin_together,
    join_processes,
    make_batches,
    work_through,
)
from recipes.inference.keys import language_key, model_key, wording_key
from recipes.inference.long_recordings import (
    SHORTEST_PIECE_S,
    UNKNOWN_LONGEST_S,
    Piece,
    encode_pieces,
    encode_short,
    longest_piece_s,
    read_short,
)
from recipes.inference.named_files import check_named_files
from recipes.inference.predictions import NON_FINITE_SCORES, begun, finished
from recipes.inference.setup import (
    Setup,
    check_inputs,
    check_setup,
    corpus_rows,
    require_input,
    source_utterances,
    speech_tokenizer,
    tell_default_model,
)
from recipes.inference.tasks import Style, prompt_utterance, reference_of, style_of, warn_of_no_language
from recipes.inference.transcripts import give_transcripts
from recipes.plugins import plugins_key
from recipes.runs.logs import log
from slm.generation import SpeechLM, generate_text
from slm.model.continuous import is_continuous
from slm.settings import TranscribeSettings
from slm.tasks import Task, TaskError
from slm.tasks.registry import UtteranceTokens
from slm.vocabulary import SpeechVocabulary
from tokenizer.data.utterances import AudioError, DataSource, Utterance


@dataclass
class Config:
    """What is transcribed with what."""

    run_dir: str = field(default="", metadata={"help": "where predictions go; may be empty with files"})
    model: str = model_key()
    task: str = field(default="asr", metadata={"help": "what is asked of the model: a task that answers in text"})
    files: list[str] = field(default_factory=list, metadata={"help": "recordings"})
    data: DataSource | None = field(default=None, metadata={"help": "or a data source, e.g. data.path=manifest.jsonl"})
    corpus: str | None = field(default=None, metadata={"help": "or a coded corpus: the run_dir of `slm encode`"})
    split: str = field(default="test", metadata={"help": "split of the data source or corpus"})
    limit: int | None = field(default=None, metadata={"help": "only the first N utterances"})
    tokenizer: str = field(default="", metadata={"help": "speech tokenizer; empty: the one the model was trained with"})
    decoding: TranscribeSettings = field(default_factory=TranscribeSettings, metadata={"help": "how text is decoded"})
    wording: str | None = wording_key()
    language: str = language_key()
    piece_s: float | None = field(
        default=None,
        metadata={
            "help": "what is longer is cut at quiet places into pieces of at most so many seconds; null: the length "
            f"of all but 1 % of the training's utterances, {UNKNOWN_LONGEST_S:g} s where the model does not tell it"
        },
    )
    max_duration_s: float | None = field(default=None, metadata={"help": "longer recordings are refused; null: none"})
    weights: str = field(default="fp32", metadata={"help": "how the model is held: fp32, bf16, fp16"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda"})
    plugins: list[str] = plugins_key()

    former_defaults = {"max_duration_s": 120.0}  # of older folders: nobody asked for it

    def __post_init__(self) -> None:
        check_inputs(self, "files")
        if self.piece_s is not None and self.piece_s < SHORTEST_PIECE_S:
            raise ValueError(
                f"piece_s: {self.piece_s:g} is too short for words; {SHORTEST_PIECE_S:g} s or more, or null"
            )


@dataclass
class Item:
    """One utterance on its way: a recording to be encoded, or its pieces, or the error why there are none."""

    id: str
    text: str
    columns: Mapping[str, str]
    duration_s: float | None
    utterance: Utterance | None = None
    pieces: list[Piece] = field(default_factory=list)
    error: str | None = None
    wall_s: float = 0.0

    def row(self, task: Task) -> dict[str, Any]:
        """Its line of predictions.jsonl; ``segments`` where it was cut, ``n_best`` where several were asked for."""
        reasons = {piece.finish_reason for piece in self.pieces if piece.codes is not None}
        if "non_finite" in reasons:
            self.error = f"{self.id}: {NON_FINITE_SCORES}"
        row = {
            "id": self.id,
            "task": task.name,
            "reference": reference_of(task, self.text, self.columns),
            "hypothesis": None if self.error else " ".join(piece.text for piece in self.pieces if piece.text),
            "truncated": bool(reasons & {"length", "loop"}),
            "faults": sorted(reasons - {"stop"}),
            "error": self.error,
            "duration_s": self.duration_s,
            "wall_s": round(self.wall_s, 4),
        }
        if len(self.pieces) == 1 and self.pieces[0].n_best:
            row["n_best"] = list(self.pieces[0].n_best)
        if len(self.pieces) > 1:
            row["segments"] = [
                {
                    "start_s": round(piece.start_s, 3),
                    "end_s": round(piece.end_s, 3),
                    "text": piece.text,
                    "truncated": piece.finish_reason in ("length", "loop"),
                    "silent": piece.codes is None,
                }
                | ({"n_best": list(piece.n_best)} if piece.n_best else {})
                for piece in self.pieces
            ]
        return row


def prepare(config: Config, with_files: bool = False) -> Setup:
    """Raises all that would stop a transcription, together; `with_files`: and each file that cannot be used."""
    problems = Problems("slm transcribe")
    problems.attempt(require_input, config, config.files, "FILE...")
    setup = check_setup(problems, config, "text", None if config.corpus else speech_tokenizer)
    if setup is not None and setup.task.prompt_holds_text and config.files:
        problems.attempt(refuse_files, setup.task)
    problems.attempt(check_named_files, config.files if with_files else (), config.max_duration_s)
    problems.raise_all()
    return setup


def refuse_files(task: Task) -> None:
    """Raises ConfigError: a recording by itself has no text."""
    raise ConfigError(
        f"task: a prompt of {task.name} holds a text, which FILE has not; give data.path=... or corpus=..."
    )


def longest_s_of(config: Config, setup: Setup) -> float:
    """The most seconds of a recording that are asked about at once: all, where a text in the prompt is about it."""
    return math.inf if setup.task.prompt_holds_text else longest_piece_s(setup.vocabulary, config.piece_s)


def read_items(config: Config, setup: Setup) -> list[Item]:
    """Everything to transcribe, recordings not encoded yet."""
    if config.corpus:
        return [
            Item(
                row["id"],
                row["text"],
                row["columns"],
                row["duration"],
                pieces=[Piece(0.0, row["duration"], row["audio_codes"])],
            )
            for row in corpus_rows(config, setup.vocabulary)
        ]
    utterances: Sequence[Utterance]
    if config.data:
        utterances = source_utterances(config)
    else:
        utterances = [Utterance(id=str(path), audio=str(path), split="test") for path in config.files]
    return [Item(one.id, one.text, one.columns, one.duration, utterance=one) for one in utterances]


def lengths_of(items: Sequence[Item]) -> list[float]:
    """Seconds of each, by which they are put into batches; of recordings as their headers say."""
    found = iter(durations_of([item.utterance for item in items if item.utterance is not None], HEADER_THREADS))
    return [item.duration_s or 0.0 if item.utterance is None else next(found) for item in items]


def encode_items(config: Config, setup: Setup, items: Sequence[Item]) -> None:
    """Encodes recordings: the short ones together, the long ones cut into pieces.

    One that cannot be used gets the error that says so.
    """
    if not items:  # coded ones, and no tokenizer
        return
    tokenizer, precision, device = setup.tokenizer, setup.vocabulary.precision, setup.device
    rate, longest_s = tokenizer.config.sampling_rate, longest_s_of(config, setup)
    short: list[tuple[Item, np.ndarray]] = []
    for item in items:
        started = time.perf_counter()
        try:
            waveform = read_short(item.utterance, rate, longest_s, config.max_duration_s)
            if waveform is not None:
                short.append((item, waveform))
            else:
                limits = (longest_s, config.max_duration_s, precision, device)
                item.pieces += encode_pieces(tokenizer, item.utterance, *limits)
                if len(item.pieces) > 1:
                    log_cuts(item, longest_s)
        except AudioError as error:
            item.pieces, item.error = [], str(error)
            if not config.files:  # of those the result is printed, or the error raised
                log.warning("%s", error)
        item.wall_s = time.perf_counter() - started
    started = time.perf_counter()
    for number, piece in encode_short(tokenizer, [waveform for _, waveform in short], precision, device):
        short[number][0].pieces = [piece]
    for item, _ in short:
        item.wall_s += (time.perf_counter() - started) / len(short)
    for item in items:
        if item.pieces:
            item.duration_s = item.pieces[-1].end_s


def make_requests(
    task: Task,
    items: Sequence[Item],
    vocabulary: SpeechVocabulary,
    text_tokenizer: PreTrainedTokenizerBase,
    style: Style,
) -> list[tuple[Item, Piece, UtteranceTokens]]:
    """What the model is asked: each piece that is not silent, and what its prompt is made of.

    An utterance that lacks what the prompt is made of gets the error that says so.
    """
    normalise = get_normaliser(vocabulary.normaliser_of_prompts)

    def encode(text: str) -> np.ndarray:
        return vocabulary.encode_text(text_tokenizer, normalise(text))

    found = []
    for item in items:
        audible = [piece for piece in item.pieces if piece.codes is not None]
        try:
            prompts = [prompt_utterance(task, piece.codes, item.text, item.columns, encode) for piece in audible]
            asked = style.of(item.columns)
            found += [(item, piece, replace(one, **asked)) for piece, one in zip(audible, prompts, strict=True)]
        except TaskError as error:
            item.pieces, item.error = [], f"{item.id}: {error}"
            log.warning("%s", item.error)
    return found


def log_cuts(item: Item, longest_s: float) -> None:
    """Says in one line that a recording was cut, and how much of it is silence."""
    silent = sum(piece.codes is None for piece in item.pieces)
    log.info(
        "%s: %.1f s, cut at quiet places into %d pieces of at most %.1f s%s",
        item.id,
        item.pieces[-1].end_s,
        len(item.pieces),
        longest_s,
        f"; silent and without text: {silent}" if silent else "",
    )


def plan(config: Config) -> dict[str, object]:
    """What would be transcribed; raises all that would stop it, together."""
    if is_continuous(config.model):
        return transcription.plan(config)
    setup = prepare(config, with_files=True)
    vocabulary = setup.vocabulary
    facts: dict[str, object] = {"model": config.model, "speech tokenizer": config.tokenizer or vocabulary.tokenizer}
    if config.corpus:
        rows = list(corpus_rows(config, vocabulary))
        facts |= {"utterances": len(rows), "seconds of speech": round(sum(row["duration"] for row in rows), 1)}
        facts["speech tokens"] = sum(row["audio_codes"].shape[1] for row in rows) * vocabulary.n_codebooks
    else:
        facts["utterances"] = len(source_utterances(config)) if config.data else len(config.files)
        facts["cut into pieces of at most (s)"] = longest_s_of(config, setup)
    facts |= {"device": setup.device, "beams": config.decoding.num_beams}
    return facts | {"result": config.run_dir or "the terminal"}


def transcribe_items(config: Config, setup: Setup, speech_lm: SpeechLM, items: Mapping[int, Item]) -> Outcome:
    """Encodes some utterances, where they are recordings, and writes their texts; they are given by their numbers."""
    recordings = [item for item in items.values() if item.utterance is not None]
    for start in range(0, len(recordings), config.decoding.batch_size):  # no more waveforms are held at once
        encode_items(config, setup, recordings[start : start + config.decoding.batch_size])
    times = Times(encode_s=sum(item.wall_s for item in items.values()))
    style = style_of(config, setup.task, setup.vocabulary, speech_lm.text_tokenizer)
    requests = make_requests(setup.task, list(items.values()), setup.vocabulary, speech_lm.text_tokenizer, style)
    started = time.perf_counter()
    keys = [f"{item.id} {piece.start_s}" for item, piece, _ in requests]
    texts = generate_text(speech_lm, setup.task, [utterance for *_, utterance in requests], config.decoding, keys)
    times.generate_s = time.perf_counter() - started
    for (item, piece, _), output in zip(requests, texts, strict=True):
        piece.text, piece.finish_reason, piece.n_best = output.text, output.finish_reason, output.n_best
        item.wall_s += times.generate_s / len(requests)
        times.n_tokens += output.n_tokens
    rows = {number: item.row(setup.task) for number, item in items.items()}
    for item in items.values():
        item.pieces = []  # the codes of a whole corpus are not held longer than they are needed
    return Outcome(rows, times)


def run(config: Config) -> Path | dict[str, str]:
    """Transcribe, or go on where a killed run stopped.

    Returns:
        predictions.jsonl, or {file: text} where no run_dir is set.

    Raises:
        ConfigError, DataError, CorpusError: something cannot be used; the message says what to do.
        UnusableFiles: some of the files could not be used; the others are transcribed.
        ProcessError: another process failed; the message is its own.
    """
    if is_continuous(config.model):
        return transcription.run(config, join_processes(config))
    inputs = [Path(path) for path in config.files]
    if (done := finished(config, inputs)) is not None:
        return done
    processes = join_processes(config)
    setup = prepare(config)
    if processes.is_main:
        tell_default_model(config)
        warn_of_no_language(config, style_of(config, setup.task, setup.vocabulary))
    folder = begin_together(lambda: begun(config, inputs), config, processes)
    items = read_items(config, setup)
    together = answers_together(len(items), config.decoding.batch_size)
    batches = make_batches(lengths_of(items), [1] * len(items), together)
    speech_lm = SpeechLM.load(config.model, setup.device, config.weights)

    def work(numbers: Sequence[int]) -> Outcome:
        return transcribe_items(config, setup, speech_lm, {number: items[number] for number in numbers})

    outcome = work_through(batches, work, folder, processes, "transcribe")
    rows = [row for _, row in sorted(outcome.rows.items())]

    def give() -> Path | None:
        return give_transcripts(config, setup.task, rows, setup.vocabulary, outcome.times, folder, processes.count)

    path = processes.together(lambda: give() if processes.is_main else None)[0]
    return {row["id"]: row["hypothesis"] for row in rows} if folder is None else path
