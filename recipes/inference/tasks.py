"""The task that ``slm transcribe`` and ``slm synthesize`` run, and what its prompts are made of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from recipes.config import ConfigError
from recipes.runs.logs import log
from slm.corpus import CodedCorpus
from slm.embedded import EmbeddedError, embedded_folder
from slm.settings import SynthesizeSettings
from slm.tasks import Task, TaskError, get_task, tasks
from slm.tasks.registry import Modality, UtteranceTokens
from slm.tasks.sequences import prompt_size
from slm.tasks.styles import language_mark, trained_wording, wording_ids
from slm.tasks.tts import TTS
from slm.tasks.tts_aligned import TTS_ALIGNED, word_ids
from slm.vocabulary import SpeechVocabulary, VocabularyError

COMMANDS: dict[Modality, str] = {"text": "slm transcribe", "speech": "slm synthesize"}


def resolve_task(name: str, answers: Modality) -> Task:
    """The task of a name that answers in text or speech.

    Raises:
        ConfigError: there is none, or it answers in the other; the message says what there is.
    """
    fitting = ", ".join(task.name for task in tasks().values() if task.answers == answers)
    try:
        task = get_task(name)
    except TaskError as error:
        raise ConfigError(
            f"task: {error}; {COMMANDS[answers]} takes those that answer in {answers}: {fitting} (a task of your own "
            "comes from plugins=[MODULE])"
        ) from error
    if task.answers != answers:
        raise ConfigError(
            f"task: {name} answers in {task.answers}: `{COMMANDS[task.answers]} task={name}` asks it. "
            f"{COMMANDS[answers]} takes those that answer in {answers}: {fitting}"
        )
    return task


def task_name(config: Any) -> str:
    """The task that is run: the one named, else the aligned one where the model has learnt it and can do what is asked.

    Given word by word, no word is skipped and none said for ever. Guidance needs the text in the prompt.
    The configuration keeps what was named: what follows from the model, which a run folder knows, is no part of it.
    """
    if config.task or not isinstance(config.decoding, SynthesizeSettings):
        return config.task
    with contextlib.suppress(EmbeddedError, VocabularyError):  # told with all else that is wrong
        folder = embedded_folder(config.model) or Path(config.model).expanduser()
        known = SpeechVocabulary.load(folder).trained_on
        if known and TTS_ALIGNED.name in known.tasks and config.decoding.guidance <= 1:
            return TTS_ALIGNED.name
    return TTS.name


def check_marks(task: Task, vocabulary: SpeechVocabulary, model: str) -> None:
    """Raises ConfigError where a model cannot have learnt a task, since it has no id for one of its marks."""
    if missing := [mark for mark in task.marks if mark not in set(vocabulary.token_names())]:
        raise ConfigError(
            f"task: model {model} has not learnt {task.name} (its vocabulary has no {', '.join(missing)}); fine-tune "
            f"it with task_weights.{task.name}=1"
        )


def reference_of(task: Task, text: str, columns: Mapping[str, str]) -> str:
    """What a task's answer is scored against; empty where the source has no such column, or nothing is known of it."""
    return text if task.reference == "text" else columns.get(task.reference or "", "")


@dataclass(frozen=True)
class Style:
    """How the model is asked, beside the task's marks: as it was in training where nobody says another way.

    Args:
        marks: Those that the model has.
        wording: (T,) ids of the task's wording; None: its marks alone.
        language: The language of every answer; empty: what an utterance's `column` says.
        column: The column that named it in training; empty: no answer had a tag.
    """

    marks: frozenset[str]
    wording: np.ndarray | None = None
    language: str = ""
    column: str = ""

    def of(self, columns: Mapping[str, str]) -> dict[str, Any]:
        """The fields of an utterance that say it.

        Raises:
            TaskError: the model has no tag of its language.
        """
        language = self.language or columns.get(self.column, "")
        mark = language_mark(language) if language else None
        if mark is not None and mark not in self.marks:
            raise TaskError(
                f"language {language!r}: the model has no {mark}; fine-tune it on answers in that language with "
                "prompts.languages, or leave the tag out"
            )
        return {"wording": self.wording, "language": mark}


def style_of(
    config: Any, task: Task, vocabulary: SpeechVocabulary, text_tokenizer: PreTrainedTokenizerBase | None = None
) -> Style:
    """How a configuration asks for a task; without the text tokenizer without its wording."""
    ids = None
    if text_tokenizer is not None and config.wording is None:
        ids = trained_wording(vocabulary, text_tokenizer, task)
    elif text_tokenizer is not None:
        ids = wording_ids(vocabulary, text_tokenizer, config.wording)
    known = vocabulary.trained_on
    column = dict(known.languages).get(task.name, "") if known else ""
    return Style(frozenset(vocabulary.token_names()), ids, config.language, column)


def check_language(config: Any, task: Task, vocabulary: SpeechVocabulary) -> None:
    """Raises ConfigError where the model has no tag of the language that all answers are asked for in."""
    try:
        style_of(config, task, vocabulary).of({})
    except TaskError as error:
        raise ConfigError(str(error)) from error


def warn_of_no_language(config: Any, style: Style) -> None:
    """Warns where the task was trained with the tag of a language and nothing here says which one."""
    if style.language or not style.column:
        return
    columns = CodedCorpus.open(config.corpus).metadata.columns if config.corpus else []
    columns = config.data.columns if config.data else columns
    if style.column not in columns:
        log.warning(
            "%s was trained with the tag of a language, which nothing says here: give language=..., or a data source "
            "or corpus with the column %s",
            task_name(config),
            style.column,
        )


def prompt_utterance(
    task: Task,
    codes: np.ndarray | None,
    text: str,
    columns: Mapping[str, str],
    encode: Callable[[str], np.ndarray],
) -> UtteranceTokens:
    """What a task makes its prompt of.

    Args:
        task: which.
        codes: (K, F) codes of the speech, None where there is none.
        text: what is said; may be empty.
        columns: the further columns; one may be missing or empty.
        encode: from a text to its ids (T,).

    Raises:
        TaskError: the prompt lacks a part.
    """
    utterance = UtteranceTokens(codes, None, dict.fromkeys(task.columns))
    if task.prompt_holds_text:
        ids = {name: encode(columns[name]) if columns.get(name) else None for name in task.columns}
        words = word_ids(encode, text) if task.by_word or task.answer_holds_prosody else None
        utterance = UtteranceTokens(codes, encode(text) if text else None, ids, words=words)
    prompt_size(task, utterance)
    return utterance
