"""Coded corpora -> the sequences of a fine-tuning, and the speech vocabulary that they are written in."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from eval.text.normalisers import get_normaliser
from recipes.config import ConfigError
from recipes.encoding.books import tokenizer_of_corpus
from recipes.encoding.copies import copies_have_own_times
from recipes.finetuning.config import Config, CorpusSource
from recipes.finetuning.prosody import PROSODY, bins_of, prosody_of
from recipes.finetuning.words import WORDS, words_of
from recipes.runs.logs import log
from slm.corpus import INDEX_NAME, CodedCorpus, CodedRow, CorpusMetadata
from slm.patterns import LATE, resolve_pattern
from slm.tasks import Task, TaskError, get_task
from slm.tasks.registry import UtteranceTokens
from slm.tasks.styles import PromptStyles, language_mark, wording_ids
from slm.tasks.tts_aligned import word_ids
from slm.trained_on import TrainedOn
from slm.training.samples import MixedSamples, Samples, SpeechSamples, TextSamples
from slm.vocabulary import SpeechVocabulary, add_marks, add_prosody, add_speech

SPLITS = ("train", "valid")


@dataclass
class Data:
    """The training and valid sequences, and what they are made of."""

    vocabulary: SpeechVocabulary
    train: SpeechSamples
    valid: SpeechSamples | None
    text: TextSamples | None = None
    valid_text: TextSamples | None = None

    @property
    def all_train(self) -> Samples:
        """Speech and text."""
        return self.train if self.text is None else MixedSamples([self.train, self.text])

    @property
    def all_valid(self) -> Samples | None:
        """What losses are measured on."""
        parts = [part for part in (self.valid, self.valid_text) if part is not None]
        return MixedSamples(parts) if len(parts) > 1 else next(iter(parts), None)


@dataclass
class Corpora:
    """The coded corpora of a training, whose codes are of one tokenizer."""

    opened: list[CodedCorpus]
    weights: list[float]

    @property
    def metadata(self) -> CorpusMetadata:
        """What their codes have in common, of the first one."""
        return self.opened[0].metadata

    @property
    def names(self) -> str:
        """For people and messages."""
        return ", ".join(str(corpus.folder) for corpus in self.opened)

    def count(self, split: str) -> int:
        """Utterances of a split."""
        return sum(corpus.count(split) for corpus in self.opened)

    def rows(self, split: str) -> Iterator[tuple[CodedRow, float]]:
        """Every utterance of a split, with the weight of its corpus."""
        for corpus, weight in zip(self.opened, self.weights, strict=True):
            for row in corpus.rows(split) if corpus.count(split) else ():
                yield row, weight

    @property
    def index_text(self) -> str:
        """What stands for their bytes: their indexes hold the hash of every shard."""
        # One corpus is as it was before there could be several: its runs go on.
        weights = [] if self.weights == [1.0] else [json.dumps(self.weights)]
        return "".join([*((c.folder / INDEX_NAME).read_text(encoding="utf-8") for c in self.opened), *weights])


def open_corpora(config: Config) -> Corpora:
    """The corpora, checked. Raises ConfigError, CorpusError."""
    sources = config.corpora or [CorpusSource(config.corpus)]
    if not all(source.path for source in sources):
        raise ConfigError("corpus: not set; give the run_dir of `slm encode`, e.g. corpus=runs/codes")
    corpora = Corpora([CodedCorpus.open(source.path) for source in sources], [source.weight for source in sources])
    for corpus in corpora.opened:
        if not corpus.count("train"):
            raise ConfigError(f"corpus {corpus.folder}: no train split (it has {', '.join(corpus.splits)})")
        corpus.check_fingerprint(corpora.metadata.fingerprint)
    return corpora


def used_tasks(config: Config) -> list[Task]:
    """The tasks that are trained. Raises ConfigError where one is unknown."""
    try:
        return [get_task(name) for name, weight in config.task_weights.items() if weight > 0]
    except TaskError as error:
        raise ConfigError(f"task_weights: {error}") from error


def columns_of(config: Config, corpora: Corpora) -> list[str]:
    """The corpora's columns, beside codes and text, that the tasks read.

    Raises:
        ConfigError: A corpus lacks one, none has the words' times or prosody that a task reads, or a corpus's varied
            copies have those of their recordings.
    """
    tasks = {task.name: list(task.columns) for task in used_tasks(config)}
    by_word = [task.name for task in used_tasks(config) if task.by_word]
    with_prosody = [task.name for task in used_tasks(config) if task.answer_holds_prosody]
    if by_word and config.pattern in LATE:
        raise ConfigError(f"pattern: {', '.join(by_word)} speaks word by word, which takes semantic or flatten")
    if with_prosody and config.pattern in LATE:
        raise ConfigError(f"pattern: {', '.join(with_prosody)} writes prosody, which takes semantic or flatten")
    _check_columns("task_weights", tasks, corpora)
    for readers, name in ((by_word, WORDS), (with_prosody, PROSODY)):
        # What one corpus cannot give a task, another may: its words are aligned, theirs are not.
        holders = [corpus for corpus in corpora.opened if name in corpus.metadata.columns]
        if not holders:
            _check_columns("task_weights", {task: [name] for task in readers}, corpora)
        if readers:
            _check_times(readers, holders)
    _check_columns("prompts.languages", {task: [name] for task, name in config.prompts.languages.items()}, corpora)
    return list(dict.fromkeys(name for names in tasks.values() for name in names))


def _check_columns(key: str, columns: dict[str, list[str]], corpora: Corpora) -> None:
    """Raises ConfigError where a corpus lacks a column that a task reads."""
    for corpus in corpora.opened:
        lacking = {task: [n for n in names if n not in corpus.metadata.columns] for task, names in columns.items()}
        if missing := list(dict.fromkeys(name for names in lacking.values() for name in names)):
            has = ", ".join(corpus.metadata.columns) or "none beside the text"
            readers = ", ".join(task for task, names in lacking.items() if names)
            raise ConfigError(
                f"{key}: {readers} reads {', '.join(missing)}, and corpus {corpus.folder} has no such column "
                f"(it has {has}); encode it with data.0.columns=[{','.join(missing)}]"
            )


def _check_times(tasks: list[str], holders: list[CodedCorpus]) -> None:
    """Raises ConfigError where a corpus's varied copies have times that are not their own."""
    for corpus in holders:
        if not copies_have_own_times(corpus.metadata):
            raise ConfigError(
                f"task_weights: {', '.join(tasks)} reads times, and in corpus {corpus.folder}, which an earlier "
                "version encoded, those of varied copies are their recordings'; encode it again into a new run_dir"
            )


def language_marks(config: Config, corpora: Corpora) -> list[str]:
    """The tags of all languages that the tasks' answers are in. Raises ConfigError where one is no language."""
    found: set[str] = set()
    for column in set(config.prompts.languages.values()):
        found |= {value for corpus in corpora.opened for split in SPLITS for value in corpus.values(split, column)}
    try:
        return [language_mark(language) for language in sorted(found - {""})]
    except TaskError as error:
        raise ConfigError(f"prompts.languages: corpus {corpora.names}: {error}") from error


def make_vocabulary(
    config: Config, corpora: Corpora, tokenizer: PreTrainedTokenizerBase, own: SpeechVocabulary | None
) -> SpeechVocabulary:
    """The model's own speech vocabulary, or a new one added to the text tokenizer.

    Raises:
        VocabularyError: the model already speaks another tokenizer's codes.
        ConfigError: it was made with another number of codebooks, or a row's language is none.
    """
    facts = corpora.metadata
    marks = [mark for task in used_tasks(config) for mark in task.marks] + language_marks(config, corpora)
    if own is not None:
        own.check_fingerprint(facts.fingerprint, f"the corpus {corpora.names}")
        if own.n_codebooks != config.n_codebooks:
            raise ConfigError(
                f"n_codebooks: the model {config.model} was made with {own.n_codebooks}, not {config.n_codebooks}"
            )
        if own.pattern != resolve_pattern(config.pattern, config.n_codebooks):
            raise ConfigError(
                f"pattern: the model {config.model} was made with {own.pattern.name}, not {config.pattern}"
            )
        normalisers = {"normaliser": config.normaliser, "prompt_normaliser": config.prompt_normaliser}
        vocabulary = dataclasses.replace(add_marks(tokenizer, own, marks), **normalisers)
        return _with_prosody(config, corpora, tokenizer, vocabulary)
    vocabulary = add_speech(
        tokenizer,
        facts.codebook_sizes,
        n_codebooks=config.n_codebooks,
        fingerprint=facts.fingerprint,
        frame_rate=facts.frame_rate,
        tokenizer=facts.tokenizer,
        precision=facts.precision,
        normaliser=config.normaliser,
        prompt_normaliser=config.prompt_normaliser,
        marks=marks,
        pattern=config.pattern,
    )
    return _with_prosody(config, corpora, tokenizer, vocabulary)


def _with_prosody(
    config: Config, corpora: Corpora, tokenizer: PreTrainedTokenizerBase, vocabulary: SpeechVocabulary
) -> SpeechVocabulary:
    """The same with tokens of prosody, where a task needs them; a model that has some keeps its bins.

    Raises:
        ConfigError: the model has another number of bins, or a corpus has no prosody.
    """
    if not any(task.answer_holds_prosody for task in used_tasks(config)):
        return vocabulary
    columns_of(config, corpora)  # raises where the column is not there
    if vocabulary.prosody is None:
        holders = [corpus for corpus in corpora.opened if PROSODY in corpus.metadata.columns]
        columns = sorted(set().union(*(corpus.values("train", PROSODY) for corpus in holders)))
        bins = bins_of(columns, config.prosody_bins, f"corpus {corpora.names}")
        return add_prosody(tokenizer, vocabulary, bins)
    if vocabulary.prosody.n != config.prosody_bins:
        raise ConfigError(
            f"prosody_bins: the model {config.model} was made with {vocabulary.prosody.n}, not {config.prosody_bins}"
        )
    return vocabulary


def codebooks(config: Config, corpora: Corpora) -> list[torch.Tensor] | None:
    """The vectors of the codebooks used, (size, D) each; None where speech tokens start from noise.

    Raises:
        ConfigError: the corpus's tokenizer has no such books, or is another by now.
    """
    if config.speech_rows == "noise":
        return None
    tokenizer = tokenizer_of_corpus(corpora.metadata, corpora.names, "speech_rows", "or take speech_rows=noise")
    return tokenizer.quantizer.entries(config.n_codebooks)


def make_data(
    config: Config, corpora: Corpora, tokenizer: PreTrainedTokenizerBase, vocabulary: SpeechVocabulary, longest: int
) -> Data:
    """The sequences of the train and valid splits, and the vocabulary that tells what those with a text are like.

    Utterances whose text, or a column that a task reads, normalises to nothing are left out, and told; unless no task
    holds any text. Those that are not aligned are left out of tasks by word, those not measured of tasks with prosody.
    """
    columns, tasks = columns_of(config, corpora), used_tasks(config)
    needed = ["text", *columns] if any(task.holds_text for task in tasks) else []
    word_columns = _word_columns(config)
    write, read = get_normaliser(vocabulary.normaliser), get_normaliser(vocabulary.normaliser_of_prompts)
    as_written = vocabulary.normaliser == vocabulary.normaliser_of_prompts
    encode = functools.partial(vocabulary.encode_text, tokenizer)
    spoken: dict[str, list[tuple[str, float]]] = {}
    asked_in = config.prompts
    wordings = {
        task: [wording_ids(vocabulary, tokenizer, wording) for wording in found]
        for task, found in asked_in.wordings.items()
    }

    def samples(split: str) -> SpeechSamples | None:
        written, prompts, weights, n_empty = [], [], [], 0
        n_without = dict.fromkeys((task.name for task in tasks), 0)
        languages: dict[str, list[str | None]] = {task: [] for task in asked_in.languages}
        chosen = evaluated(corpora.count(split), config.eval_utterances) if split == "valid" else None
        spoken[split] = []
        for number, (row, weight) in enumerate(corpora.rows(split)):
            if chosen is not None and number not in chosen:
                continue
            plain = {"text": row["text"]} | {name: row["columns"][name] for name in columns}
            texts = {name: write(text) for name, text in plain.items()}
            asked = texts if as_written else {name: read(text) for name, text in plain.items()}
            if not all(texts[name] and asked[name] for name in needed):
                n_empty += 1
                continue
            codes = row["audio_codes"].astype(np.int32)
            place = f"corpus {corpora.names}: {row['id']}"
            words = _words(word_columns, row, asked["text"], vocabulary, read, place)
            if word_columns:
                words["words"] = word_ids(encode, asked["text"])
            tokens = _tokens(codes, {name: encode(text) for name, text in texts.items()}, words)
            without = [task.name for task in tasks if not task.answers_from(tokens)]
            n_without |= {name: n_without[name] + 1 for name in without}
            if len(without) == len(tasks):
                continue
            written.append(tokens)
            same = asked == texts
            ids = {} if same else {name: encode(text) for name, text in asked.items()}
            prompts.append(written[-1] if same else _tokens(codes, ids, words))
            weights.append(weight)
            for task, column in asked_in.languages.items():
                language = row["columns"][column]
                languages[task].append(language_mark(language) if language else None)
            spoken[split].append((asked["text"], codes.shape[1] / vocabulary.frame_rate))
        if n_empty:
            log.warning("%s: %d utterances without %s are left out", split, n_empty, " or ".join(needed))
        for task, n in n_without.items():
            if n:
                log.warning(
                    "%s: %d utterances whose column %s does not say their text, or has more words than they have "
                    "frames, are left out of %s",
                    split,
                    n,
                    " or ".join(word_columns),
                    task,
                )
        if not written:
            return None
        repeats = weights if set(weights) != {1.0} and split == "train" else None
        styles = PromptStyles(wordings, languages, asked_in.share)
        made = SpeechSamples(vocabulary, written, config.task_weights, config.noise, longest, prompts, repeats, styles)
        if made.n_too_long:
            log.warning("%s: %d utterances longer than %d tokens are left out", split, made.n_too_long, longest)
        return made

    training = samples("train")
    if training is None:
        named = " and ".join(["a text", *columns, *(f"{name} that says it" for name in word_columns)])
        raise ConfigError(f"corpus {corpora.names}: none of the train split's utterances has {named}")
    members = [i for i in np.unique(training.members) if spoken["train"][i][0]]
    if not members:  # recordings without transcripts: nothing is known of their texts, nor of their rate of speech
        if asked_in.wordings or asked_in.languages:
            log.warning(
                "no utterance has a transcript, without which the model keeps nothing of its training: ask it with "
                "wording=... and language=..."
            )
        return Data(vocabulary, training, samples("valid"), *_replayed(config, tokenizer, vocabulary, longest))
    texts, seconds = zip(*(spoken["train"][i] for i in members), strict=True)
    codes, text_ids = zip(*((u.codes, u.text) for u in (training.utterances[i] for i in members)), strict=True)
    codes = [one[: vocabulary.ids_per_frame] for one in codes]  # a loop is told by the books whose codes are ids
    trained_on = TrainedOn.of(texts, seconds, codes, text_ids, vocabulary.frame_rate)
    trained_on = dataclasses.replace(
        trained_on,
        tasks=tuple(task.name for task in tasks),
        bare_prompts=config.noise.drop_prompt,
        wordings=tuple(asked_in.wordings.items()),
        languages=tuple(asked_in.languages.items()),
    )
    vocabulary = dataclasses.replace(vocabulary, trained_on=trained_on.after(vocabulary.trained_on))
    return Data(vocabulary, training, samples("valid"), *_replayed(config, tokenizer, vocabulary, longest))


def _word_columns(config: Config) -> list[str]:
    """The columns that tell of the text's words, of those that a task needs."""
    tasks = used_tasks(config)
    needed = {WORDS: any(task.by_word for task in tasks), PROSODY: any(task.answer_holds_prosody for task in tasks)}
    return [name for name, is_needed in needed.items() if is_needed]


def _words(
    columns: list[str],
    row: CodedRow,
    text: str,
    vocabulary: SpeechVocabulary,
    read: Callable[[str], str],
    place: str,
) -> dict[str, Any]:
    """The fields of :class:`UtteranceTokens` that come of columns of words; None where its words are not the text's.

    Raises:
        ConfigError: a column holds something else.
    """
    fields: dict[str, Any] = {}
    if WORDS in columns:
        n_frames = row["audio_codes"].shape[1]
        column = row["columns"].get(WORDS, "")
        fields["word_frames"] = words_of(column, text, n_frames, vocabulary.frame_rate, read, place)
    if PROSODY in columns:
        values = prosody_of(row["columns"].get(PROSODY, ""), text, read, place)
        fields["prosody"] = None if values is None else vocabulary.prosody.cut(values)
    return fields


HELD_OUT = 50  # every fiftieth line of replayed text is for the valid loss
LONGEST_TEXT = 512  # tokens of a piece of it, where rows have no length


def _replayed(
    config: Config, tokenizer: PreTrainedTokenizerBase, vocabulary: SpeechVocabulary, longest: int
) -> tuple[TextSamples | None, TextSamples | None]:
    """The texts of `replay` for training and for the valid loss. Raises ConfigError."""
    if config.replay is None:
        return None, None
    path = Path(config.replay.path).expanduser()
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"replay.path: {path} cannot be read as text ({error})") from error
    lines = [line for line in lines if line]
    if len(lines) < HELD_OUT:
        raise ConfigError(f"replay.path: {path} has {len(lines)} lines; {HELD_OUT} are the least, one of them held out")
    end = vocabulary.end_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    size = min(longest, config.training.pack_length or LONGEST_TEXT) - 2  # beside bos and eos

    def samples(chosen: list[str], repeat: float | None) -> TextSamples:
        ids = [vocabulary.encode_text(tokenizer, line) for line in chosen]
        pieces = [text[start : start + size] for text in ids for start in range(0, len(text), size)]
        return TextSamples(pieces, tokenizer.bos_token_id, end, config.replay.loss_weight, repeat)

    held_out = samples(lines[HELD_OUT - 1 :: HELD_OUT], None)
    kept = [line for number, line in enumerate(lines, start=1) if number % HELD_OUT]
    return samples(kept, config.replay.weight) if config.replay.loss_weight else None, held_out


def _tokens(codes: np.ndarray, ids: dict[str, np.ndarray], words: dict[str, Any]) -> UtteranceTokens:
    return UtteranceTokens(codes, ids.pop("text"), ids, **words)


def evaluated(n: int, most: int | None) -> set[int] | None:
    """Which of n utterances the losses are measured on: the same in every run; None: all."""
    if most is None or n <= most:
        return None
    return set(np.random.default_rng(0).choice(n, most, replace=False).tolist())


def longest_sequence(config: Config, model_config: Any) -> int:
    """The longest sequence that is kept. Raises ConfigError where the model cannot take that many."""
    limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if config.max_length and limit and config.max_length > limit:
        raise ConfigError(f"max_length: {config.max_length} is more than the model's {limit} positions")
    return config.max_length or limit or 2**31
