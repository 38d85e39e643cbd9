"""Tasks by name.

A task is one function from an utterance to the parts of its prompt and of its answer. All else follows from the parts:
the frame around them and the labels (:mod:`slm.tasks.sequences`), and from the answer's modality which ids are legal
when the model generates and where it stops (:mod:`slm.generation`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Modality = Literal["text", "speech"]


class TaskError(ValueError):
    """No such task, a second one of a name, or an utterance that lacks what the task needs; the message says which."""


@dataclass(frozen=True)
class Utterance:
    """What a task may take its parts from. A part that is to be generated may be missing.

    Args:
        codes: (K, F) codes of the speech.
        text: (T,) text ids of the transcript.
        columns: Whatever else the corpus holds of it, such as a translation's ids.
    """

    codes: np.ndarray | None = None
    text: np.ndarray | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Speech:
    """A stretch of speech between its two marks: (K, F) codes."""

    codes: np.ndarray | None


@dataclass(frozen=True)
class Text:
    """A stretch of text: (T,) ids."""

    ids: np.ndarray | None


@dataclass(frozen=True)
class Mark:
    """One mark by its name in the vocabulary, such as `<|transcribe|>`."""

    name: str


Part = Speech | Text | Mark


@dataclass(frozen=True)
class Turn:
    """The parts of one prompt and of its answer. Loss is taken on the answer alone."""

    prompt: list[Part]
    answer: list[Part]


@dataclass(frozen=True)
class Task:
    """A task: its name in configurations and predictions, what it answers in, and its parts.

    Args:
        name: As in `task_weights` and in predictions.
        answers: The answer's modality. Text is scored against a reference, speech by a judge that reads it.
        turn: From an utterance to the parts of prompt and answer. It is called without the answer's material when the
            model generates, and then only the prompt is used.
        marks: Marks that it needs beside the vocabulary's own; they go behind all ids that there are.
    """

    name: str
    answers: Modality
    turn: Callable[[Utterance], Turn]
    marks: tuple[str, ...] = ()


_TASKS: dict[str, Task] = {}


def register(task: Task) -> Task:
    """Make a task known under its name.

    Raises:
        TaskError: another task has that name, or its modality is none.
    """
    if _TASKS.get(task.name, task) != task:
        raise TaskError(f"task {task.name!r} is there already; give the new one another name")
    if task.answers not in ("text", "speech"):
        raise TaskError(f"task {task.name!r}: answers {task.answers!r} must be text or speech")
    _TASKS[task.name] = task
    return task


def tasks() -> dict[str, Task]:
    """Every task by name, in the order of names."""
    return dict(sorted(_TASKS.items()))


def get_task(name: str) -> Task:
    """The task of a name.

    Raises:
        TaskError: there is none; the message lists those there are.
    """
    if name not in _TASKS:
        raise TaskError(f"task {name!r} is unknown; there are {', '.join(tasks())}")
    return _TASKS[name]
