"""``slm transcribe``: speech to text with a fine-tuned SLM.

Reads your own files (``slm transcribe a.wav b.flac model=RUN/model``), a split of a data source, or of a coded corpus,
which needs no speech tokenizer. A recording longer than the model's training utterances is cut at quiet places, its
pieces transcribed and joined; a coded one has no sound to cut by and goes through whole. Writes ``predictions.jsonl``
and, beside it, ``predictions.json`` with the model, the decoding settings and the real-time factor. A recording that
cannot be used gets an ``error`` and no hypothesis: it is counted, never dropped.

Not here: scores (``slm evaluate``).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from recipes.config import ConfigError, Problems
from recipes.runs.files import atomic_write_text
from recipes.runs.inputs import digest, refuse_other_inputs
from recipes.runs.logs import log
from recipes.runs.machine import resolve_device
from recipes.runs.progress import progress
from recipes.runs.run_folder import RunFolder
from recipes.voices.long_speech import SHORTEST_PIECE_S, UNKNOWN_LONGEST_S, Piece, encode_pieces, longest_piece_s
from slm.corpus import CodedCorpus
from slm.generation import SpeechLM, TranscribeSettings, transcribe_codes
from slm.modeling import DTYPES, ModelError, describe_llm
from slm.vocabulary import SpeechVocabulary
from tokenizer import load_tokenizer
from tokenizer.data.manifest import AudioError, DataSource, Utterance, open_audio, read_sources


@dataclass
class Config:
    """What is transcribed with what."""

    run_dir: str = field(default="", metadata={"help": "where predictions go; may be empty with files"})
    model: str = field(default="", metadata={"help": "folder of a fine-tuned model (RUN_DIR/model of `slm finetune`)"})
    files: list[str] = field(default_factory=list, metadata={"help": "recordings"})
    data: DataSource | None = field(default=None, metadata={"help": "or a data source, e.g. data.path=manifest.jsonl"})
    corpus: str | None = field(default=None, metadata={"help": "or a coded corpus: the run_dir of `slm encode`"})
    split: str = field(default="test", metadata={"help": "split of the data source or corpus"})
    limit: int | None = field(default=None, metadata={"help": "only the first N utterances"})
    tokenizer: str = field(default="", metadata={"help": "speech tokenizer; empty: the one the model was trained with"})
    decoding: TranscribeSettings = field(default_factory=TranscribeSettings, metadata={"help": "how text is decoded"})
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

    former_defaults = {"max_duration_s": 120.0}  # of finished folders; what is long is cut since

    def __post_init__(self) -> None:
        check_inputs(self, self.files, "files")
        if self.piece_s is not None and self.piece_s < SHORTEST_PIECE_S:
            raise ValueError(
                f"piece_s: {self.piece_s:g} is too short for words; {SHORTEST_PIECE_S:g} s or more, or null"
            )


@dataclass
class Item:
    """One utterance on its way: its pieces, or the error why there are none."""

    id: str
    reference: str
    duration_s: float | None
    pieces: list[Piece] = field(default_factory=list)
    error: str | None = None
    wall_s: float = 0.0

    def row(self) -> dict[str, Any]:
        """Its line of predictions.jsonl; ``segments`` where it was cut."""
        row = {
            "id": self.id,
            "task": "asr",
            "reference": self.reference,
            "hypothesis": None if self.error else " ".join(piece.text for piece in self.pieces if piece.text),
            "truncated": any(piece.truncated for piece in self.pieces),
            "error": self.error,
            "duration_s": self.duration_s,
            "wall_s": round(self.wall_s, 4),
        }
        if len(self.pieces) > 1:
            row["segments"] = [
                {
                    "start_s": round(piece.start_s, 3),
                    "end_s": round(piece.end_s, 3),
                    "text": piece.text,
                    "truncated": piece.truncated,
                    "silent": piece.codes is None,
                }
                for piece in self.pieces
            ]
        return row


def check_inputs(config: Any, own: Any, name: str) -> None:
    """Exactly one input, known weights, and a place for what is more than one file. Raises ValueError."""
    given = [key for key, value in ((name, own), ("data", config.data), ("corpus", config.corpus)) if value]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)}: give one of {name}, data, corpus")
    if config.limit is not None and config.limit < 1:
        raise ValueError(f"limit: {config.limit} must be at least 1, or null for all")
    if config.weights not in DTYPES:
        raise ValueError(f"weights: {config.weights!r} is not one of {', '.join(DTYPES)}")
    if given and given != [name] and not config.run_dir:
        raise ValueError(f"run_dir: needed with {given[0]}; that is where the predictions go")


def require_input(config: Any, own: Any, name: str) -> None:
    """Raises ConfigError where nothing was given to work on."""
    if not (own or config.data or config.corpus):
        raise ConfigError(f"nothing to do: give {name}, data.path=... or corpus=...")


def corpus_rows(config: Any, vocabulary: SpeechVocabulary) -> Iterator[dict[str, Any]]:
    """A coded corpus's rows, refused if its codes are not the model's. Raises CorpusError."""
    corpus = CodedCorpus.open(config.corpus)
    corpus.check_fingerprint(vocabulary.fingerprint)
    for number, row in enumerate(corpus.rows(config.split)):
        if config.limit is not None and number >= config.limit:
            return
        yield row


def source_utterances(config: Any) -> list[Utterance]:
    """A data source's split. Raises DataError where it cannot be read, is empty, or has two of one id."""
    return read_sources([config.data], config.split)[: config.limit]


@dataclass
class Voice:
    """The parts that are needed beside the model's weights, checked: `tokenizer` is None where codes are there."""

    device: str
    vocabulary: SpeechVocabulary
    tokenizer: Any


def prepare(config: Config, with_files: bool = False) -> Voice:
    """Raises all that would stop a transcription, together; `with_files`: and each file that is missing or empty."""
    problems = Problems("slm transcribe")
    problems.attempt(require_input, config, config.files, "FILE...")
    voice = check_voice(problems, config, None if config.corpus else speech_tokenizer)
    for path in config.files if with_files else ():
        problems.attempt(open_audio, Utterance(path, path))
    problems.told()
    return voice


def check_voice(problems: Problems, config: Any, tokenizer_of: Callable[..., Any] | None) -> Voice | None:
    """Notes what is wrong with the folder, the device, the model, its speech tokenizer or what is to be worked on."""
    if config.run_dir:
        problems.attempt(RunFolder(config.run_dir).check, config)
    device = problems.attempt(resolve_device, config.device)
    vocabulary = problems.attempt(model_vocabulary, config)
    tokenizer = None
    if vocabulary is not None and tokenizer_of is not None:
        tokenizer = problems.attempt(tokenizer_of, config, vocabulary, device or "cpu")
    if config.data:
        problems.attempt(source_utterances, config)
    if config.corpus and vocabulary is not None:
        problems.attempt(lambda: next(corpus_rows(config, vocabulary), None))
    elif config.corpus:
        problems.attempt(CodedCorpus.open, config.corpus)
    return Voice(device, vocabulary, tokenizer) if device and vocabulary else None


def speech_tokenizer(config: Any, vocabulary: SpeechVocabulary, device: str) -> Any:
    """The speech tokenizer the model was trained with. Raises VocabularyError where it is another one."""
    name = config.tokenizer or vocabulary.tokenizer
    if not name:
        raise ConfigError("tokenizer: the model does not name its speech tokenizer; give tokenizer=...")
    tokenizer = load_tokenizer(name, device)
    vocabulary.check_fingerprint(tokenizer.fingerprint(vocabulary.precision), f"tokenizer {name}")
    return tokenizer


def model_vocabulary(config: Any) -> SpeechVocabulary:
    """The speech vocabulary of the model folder, checked without reading weights. Raises ModelError."""
    if not config.model:
        raise ConfigError("model: not set; give a model that `slm finetune` made, e.g. model=runs/finetune/model")
    facts = describe_llm(config.model)
    if facts.vocabulary is None:
        raise ModelError(f"model {config.model}: a text LM that has not learnt speech; make it one with `slm finetune`")
    return facts.vocabulary


def begun(config: Any, own: Iterable[str | Path]) -> RunFolder | None:
    """The run folder, refused if it was begun with another model or other inputs; None where none is set.

    Args:
        config: the recipe's configuration.
        own: what it works on where neither a data source nor a corpus is given: texts, or paths of files, whose
            contents count.

    Raises:
        ConfigError: the folder belongs to another configuration or to other inputs.
    """
    if not config.run_dir:
        return None
    folder = RunFolder(config.run_dir)
    folder.check(config)
    inputs: list[Any] = list(own)
    if config.corpus:
        inputs = [Path(config.corpus)]
    elif config.data:
        inputs = [[f"{utterance.id} {utterance.text}" for utterance in source_utterances(config)]]
    fingerprint = digest(Path(config.model), *inputs)
    refuse_other_inputs(folder, fingerprint, "model, files, data or corpus")
    return folder if folder.complete else folder.start(config, fingerprint)


def finished(config: Any, own: Iterable[str | Path]) -> Path | None:
    """The predictions of a run that is complete, which says so; None where there is still something to do.

    Raises:
        ConfigError: as `begun`.
    """
    if not config.run_dir or not RunFolder(config.run_dir).complete:
        return None
    folder = begun(config, own)
    log.info("%s is complete: skipped", config.run_dir)
    return folder.path("predictions.jsonl")


def read_items(config: Config, voice: Voice) -> list[Item]:
    """Everything to transcribe, as codes."""
    tokenizer, vocabulary, device = voice.tokenizer, voice.vocabulary, voice.device
    if config.corpus:
        return [
            Item(row["id"], row["text"], row["duration"], [Piece(0.0, row["duration"], row["audio_codes"])])
            for row in corpus_rows(config, vocabulary)
        ]
    utterances: Sequence[Utterance]
    if config.data:
        utterances = source_utterances(config)
    else:
        utterances = [Utterance(id=str(path), audio=str(path), split="test") for path in config.files]
    longest_s = longest_piece_s(vocabulary, config.piece_s)
    items = []
    for utterance in progress(utterances, "encode", len(utterances)):
        started = time.perf_counter()
        item = Item(utterance.id, utterance.text, utterance.duration)
        try:
            for piece in encode_pieces(
                tokenizer, utterance, longest_s, config.max_duration_s, vocabulary.precision, device
            ):
                item.pieces.append(piece)
            item.duration_s = item.pieces[-1].end_s
            if len(item.pieces) > 1:
                tell_cuts(item, longest_s)
        except AudioError as error:
            item.pieces, item.error = [], str(error)
            if not config.files:  # of those the result is printed, or the error raised
                log.warning("%s", error)
        item.wall_s = time.perf_counter() - started
        items.append(item)
    return items


def tell_cuts(item: Item, longest_s: float) -> None:
    """Says in one line that a recording was cut, and how much of it is silence."""
    silent = sum(piece.codes is None for piece in item.pieces)
    log.info(
        "%s: %.1f s, cut at quiet places into %d pieces of at most %.1f s%s",
        item.id,
        item.duration_s,
        len(item.pieces),
        longest_s,
        f"; silent and without text: {silent}" if silent else "",
    )


def plan(config: Config) -> dict[str, object]:
    """What would be transcribed; raises all that would stop it, together."""
    voice = prepare(config, with_files=True)
    vocabulary = voice.vocabulary
    facts: dict[str, object] = {"model": config.model, "speech tokenizer": config.tokenizer or vocabulary.tokenizer}
    if config.corpus:
        rows = list(corpus_rows(config, vocabulary))
        facts |= {"utterances": len(rows), "seconds of speech": round(sum(row["duration"] for row in rows), 1)}
        facts["speech tokens"] = sum(row["audio_codes"].shape[1] for row in rows) * vocabulary.n_codebooks
    else:
        facts["utterances"] = len(source_utterances(config)) if config.data else len(config.files)
        facts["cut into pieces of at most (s)"] = longest_piece_s(vocabulary, config.piece_s)
    facts |= {"device": voice.device, "beams": config.decoding.num_beams}
    return facts | {"result": config.run_dir or "the terminal"}


def write_predictions(
    config: Any, task: str, rows: Sequence[dict[str, Any]], vocabulary: SpeechVocabulary, wall_s: float, audio_s: float
) -> Path:
    """Writes predictions.jsonl and its sidecar; returns the former."""
    path = Path(config.run_dir) / "predictions.jsonl"
    atomic_write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    sidecar = {
        "task": task,
        "model": config.model,
        "trained_steps": RunFolder(Path(config.model).parent).summary.get("steps"),
        "tokenizer": config.tokenizer or vocabulary.tokenizer,
        "fingerprint": vocabulary.fingerprint,
        "frame_rate": vocabulary.frame_rate,
        "n_codebooks": vocabulary.n_codebooks,
        "normaliser": vocabulary.normaliser,
        "decoding": asdict(config.decoding),
        "seed": getattr(config.decoding, "seed", None),
        "source": config.corpus or (config.data.path if config.data else None),
        "split": config.split,
        "n": len(rows),
        "n_failed": sum(row["error"] is not None for row in rows),
        "n_truncated": sum(row["truncated"] for row in rows),
        "wall_s": round(wall_s, 3),
        "audio_s": round(audio_s, 3),
        "timed": "the LLM alone: the codes were there" if task == "asr" and config.corpus else "LLM and tokenizer",
        "real_time_factor": round(wall_s / audio_s, 5) if audio_s else None,
    }
    atomic_write_text(path.with_suffix(".json"), json.dumps(sidecar, indent=2, ensure_ascii=False) + "\n")
    return path


def in_chunks(items: Sequence[Any], size: int, batch_size: int, description: str) -> Iterator[Sequence[Any]]:
    """Slices of some batches each, under a progress bar."""
    if not items:
        return
    step = size * batch_size
    for start in progress(range(0, len(items), step), description, -(-len(items) // step)):
        yield items[start : start + step]


def run(config: Config) -> Path | dict[str, str]:
    """Transcribe; returns predictions.jsonl, or {file: text} where no run_dir is set."""
    inputs = [Path(path) for path in config.files]
    if (done := finished(config, inputs)) is not None:
        return done
    voice = prepare(config)
    vocabulary, device = voice.vocabulary, voice.device
    folder = begun(config, inputs)
    items = read_items(config, voice)
    good = [item for item in items if item.error is None]
    if config.files and not good:
        raise AudioError("\n".join(item.error for item in items))
    speech_lm = SpeechLM.load(config.model, device, config.weights)
    heard = [(item, piece) for item in good for piece in item.pieces if piece.codes is not None]
    heard.sort(key=lambda pair: pair[1].codes.shape[1])
    for chunk in in_chunks(heard, 4, config.decoding.batch_size, "transcribe"):
        started = time.perf_counter()
        texts = transcribe_codes(speech_lm, [piece.codes for _, piece in chunk], config.decoding)
        share = (time.perf_counter() - started) / len(chunk)
        for (item, piece), output in zip(chunk, texts, strict=True):
            piece.text, piece.truncated = output.text, output.truncated
            item.wall_s += share
    rows = [item.row() for item in items]
    for row in rows if config.files else ():
        text = (row["hypothesis"] or "") + ("  [cut off]" if row["truncated"] else "")
        print(row["error"] or (text if len(rows) == 1 else f"{row['id']}: {text}"))
    if folder is None:
        return {row["id"]: row["hypothesis"] for row in rows}
    wall, audio = sum(item.wall_s for item in good), sum(item.duration_s or 0 for item in good)
    path = write_predictions(config, "asr", rows, vocabulary, wall, audio)
    truncated = sum(row["truncated"] for row in rows)
    log.info("transcribed %d of %d utterances, %d cut off", len(good), len(rows), truncated)
    folder.mark_complete({"n": len(rows), "n_failed": len(rows) - len(good), "n_truncated": truncated})
    return path
