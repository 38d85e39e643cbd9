"""The task that ``slm transcribe`` and ``slm synthesize`` run, and what its prompts are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from recipes.config import ConfigError
from slm.tasks import Task, TaskError, get_task, tasks
from slm.tasks.registry import Modality, UtteranceTokens
from slm.tasks.sequences import prompt_size
from slm.vocabulary import SpeechVocabulary

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


def check_marks(task: Task, vocabulary: SpeechVocabulary, model: str) -> None:
    """Raises ConfigError where a model cannot have learnt a task, since it has no id for one of its marks."""
    if missing := [mark for mark in task.marks if mark not in set(vocabulary.token_names())]:
        raise ConfigError(
            f"task: model {model} has not learnt {task.name} (its vocabulary has no {', '.join(missing)}); fine-tune "
            f"it with task_weights.{task.name}=1"
        )


def reference_of(task: Task, text: str, columns: Mapping[str, str]) -> str:
    """What a task's answer is scored against; empty where the source has no such column."""
    return text if task.reference == "text" else columns.get(task.reference, "")


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
        utterance = UtteranceTokens(codes, encode(text) if text else None, ids)
    prompt_size(task, utterance)
    return utterance
