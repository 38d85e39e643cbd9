"""The coded corpora of a fine-tuning: opened, and checked for what its tasks read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from recipes.config import ConfigError
from recipes.encoding.copies import copies_have_own_times
from recipes.finetuning.config import Config, CorpusSource
from recipes.finetuning.prosody import PROSODY
from recipes.finetuning.words import WORDS
from recipes.suggestions import did_you_mean
from slm.corpus import INDEX_NAME, CodedCorpus, CodedRow, CorpusMetadata
from slm.patterns import LATE
from slm.tasks import Task, TaskError, get_task
from slm.tasks.styles import language_mark

SPLITS = ("train", "valid")


@dataclass
class Corpora:
    """The coded corpora of a training, whose codes are of one tokenizer."""

    opened: list[CodedCorpus]
    weights: list[float]
    tasks: list[list[str] | None]  # those that each is for; None: all

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

    def rows(self, split: str) -> Iterator[tuple[CodedRow, float, list[str] | None]]:
        """Every utterance of a split, with the weight of its corpus and the tasks that this is for."""
        for corpus, weight, tasks in zip(self.opened, self.weights, self.tasks, strict=True):
            for row in corpus.rows(split) if corpus.count(split) else ():
                yield row, weight, tasks

    def are_for(self, task: str) -> list[CodedCorpus]:
        """Those that a task is learnt from."""
        return [c for c, tasks in zip(self.opened, self.tasks, strict=True) if tasks is None or task in tasks]

    @property
    def index_text(self) -> str:
        """What stands for their bytes: their indexes hold the hash of every shard."""
        # One corpus of weight 1 is its index alone: the runs of `corpus=...` go on under `corpora=[...]`.
        weights = [] if self.weights == [1.0] else [json.dumps(self.weights)]
        tasks = [] if all(some is None for some in self.tasks) else [json.dumps(self.tasks)]
        return "".join([*((c.folder / INDEX_NAME).read_text(encoding="utf-8") for c in self.opened), *weights, *tasks])


def open_corpora(config: Config) -> Corpora:
    """The corpora, checked, and that each is for tasks that are trained. Raises ConfigError, CorpusError."""
    sources = config.corpora or [CorpusSource(config.corpus)]
    if not all(source.path for source in sources):
        raise ConfigError("corpus: not set; give the run_dir of `slm encode`, e.g. corpus=runs/codes")
    corpora = Corpora(
        [CodedCorpus.open(source.path) for source in sources],
        [source.weight for source in sources],
        [source.tasks for source in sources],
    )
    _check_tasks(config, corpora)
    for corpus in corpora.opened:
        if not corpus.count("train"):
            raise ConfigError(f"corpus {corpus.folder}: no train split (it has {', '.join(corpus.splits)})")
        corpus.check_fingerprint(corpora.metadata.fingerprint)
    return corpora


def _check_tasks(config: Config, corpora: Corpora) -> None:
    """Raises ConfigError where a corpus is for a task that is not trained, or a task is learnt from none."""
    used = [task.name for task in used_tasks(config)]
    for corpus, tasks in zip(corpora.opened, corpora.tasks, strict=True):
        if unknown := [name for name in tasks or () if name not in used]:
            guess = did_you_mean(unknown[0], used)
            raise ConfigError(
                f"corpora: tasks of {corpus.folder}: {', '.join(unknown)} is not trained; {guess}task_weights has "
                f"{', '.join(used)}"
            )
    if idle := [name for name in used if not corpora.are_for(name)]:
        raise ConfigError(f"corpora: none is for {', '.join(idle)} of task_weights; add it to the tasks of one")


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
        able = [corpus for corpus in corpora.opened if any(corpus in corpora.are_for(task) for task in readers)]
        holders = [corpus for corpus in able if name in corpus.metadata.columns]
        if not holders:
            _check_columns("task_weights", {task: [name] for task in readers}, corpora)
        if readers:
            _check_times(readers, holders)
    _check_columns("prompts.languages", {task: [name] for task, name in config.prompts.languages.items()}, corpora)
    return list(dict.fromkeys(name for names in tasks.values() for name in names))


def _check_columns(key: str, columns: dict[str, list[str]], corpora: Corpora) -> None:
    """Raises ConfigError where a corpus lacks a column that a task of its reads."""
    for corpus in corpora.opened:
        mine = {task: names for task, names in columns.items() if corpus in corpora.are_for(task)}
        lacking = {task: [n for n in names if n not in corpus.metadata.columns] for task, names in mine.items()}
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
