"""Tasks by name.

A task is one function from an utterance to the parts of its prompt and of its answer. All else follows from the parts:
the frame around them and the labels (:mod:`slm.tasks.sequences`), and from the answer's modality which ids are legal
when the model generates and where it stops (:mod:`slm.generation`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

Modality = Literal["text", "speech"]


class TaskError(ValueError):
    """No such task, a second one of a name, or an utterance that lacks what the task needs; the message says which."""


@dataclass(frozen=True)
class UtteranceTokens:
    """What a task may take its parts from. A part that is to be generated may be missing, which is None.

    Args:
        codes: (K, F) codes of the speech.
        text: (T,) text ids of the transcript.
        columns: (T,) text ids of further columns of the corpus, such as a translation: those that the task names.
        wording: (T,) text ids of how the task is put in words, in front of the prompt's parts; None: its marks alone
            say it.
        language: The mark that names the answer's language, behind the prompt's parts, such as `<|de|>`; None: none.
        prompt_share: Of a task that continues speech: the share of the codes that its prompt holds, above 0; the rest
            is its answer. 1: all of them, since what follows is still to be generated.
        words: Of a task by word, or with prosody: the ids (T,) of each word of the text.
        word_frames: Of a task by word: how many frames of the codes are each word's.
        prosody: Of a task with prosody: (W, 3) bins of each word (:mod:`slm.prosody`).
    """

    codes: np.ndarray | None = None
    text: np.ndarray | None = None
    columns: Mapping[str, np.ndarray | None] = field(default_factory=dict)
    wording: np.ndarray | None = None
    language: str | None = None
    prompt_share: float = 1.0
    words: Sequence[np.ndarray] | None = None
    word_frames: Sequence[int] | None = None
    prosody: np.ndarray | None = None


@dataclass(frozen=True)
class Speech:
    """A stretch of speech between its two marks: (K, F) codes."""

    codes: np.ndarray | None


@dataclass(frozen=True)
class Text:
    """A stretch of text: (T,) ids. Of an answer it may be `given`: not learnt, nor drawn, nor the mark behind it."""

    ids: np.ndarray | None
    given: bool = False


@dataclass(frozen=True)
class Prosody:
    """How each word is said, in front of an answer's speech: (W, 3) bins (:mod:`slm.prosody`)."""

    bins: np.ndarray | None


@dataclass(frozen=True)
class Mark:
    """One mark by its name in the vocabulary, such as `<|transcribe|>`."""

    name: str


Part = Speech | Text | Prosody | Mark


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
        columns: Columns of the corpus, beside codes and text, whose ids `turn` finds in the utterance's `columns`.
        reference: What an answer is scored against, as it is written or as a judge should read it: the utterance's
            `text`, or one of `columns`; None where nothing is known that the answer should say.
        scored_by: `wer`: word and character errors; `bleu`: BLEU and chrF beside them, as translations are scored.
        continues: Whether prompt and answer are two stretches of one utterance's speech: `turn` cuts it at the
            utterance's `prompt_share`, which training draws.
        by_word: Whether the answer is each word of the text, given, and its speech: `turn` finds the utterance's
            `words`, and `word_frames` beside its codes.
    """

    name: str
    answers: Modality
    turn: Callable[[UtteranceTokens], Turn]
    marks: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    reference: str | None = "text"
    scored_by: Literal["wer", "bleu"] = "wer"
    continues: bool = False
    by_word: bool = False

    @cached_property
    def prompt_holds_speech(self) -> bool:
        """Whether there is speech in the prompt."""
        return any(isinstance(part, Speech) for part in self._sample.prompt)

    @cached_property
    def prompt_holds_text(self) -> bool:
        """Whether there is text in the prompt, or in the answer and given."""
        given = (part for part in self._sample.answer if isinstance(part, Text) and part.given)
        return any(isinstance(part, Text) for part in (*self._sample.prompt, *given))

    @cached_property
    def answer_holds_prosody(self) -> bool:
        """Whether the answer begins with the prosody of the text's words."""
        return any(isinstance(part, Prosody) for part in self._sample.answer)

    def answers_from(self, utterance: UtteranceTokens) -> bool:
        """Whether an utterance has what is known of its words only where they are aligned, if the answer holds that."""
        lacks_words = self.by_word and utterance.word_frames is None
        return not lacks_words and not (self.answer_holds_prosody and utterance.prosody is None)

    @cached_property
    def holds_text(self) -> bool:
        """Whether there is text in the prompt or in the answer; else recordings without a transcript will do."""
        return any(isinstance(part, Text) for part in (*self._sample.prompt, *self._sample.answer))

    @cached_property
    def says_its_prompt(self) -> bool:
        """Whether the answer is one stretch of speech that says the one text of the prompt."""
        texts = [part for part in self._sample.prompt if isinstance(part, Text)]
        one_speech = [type(part) for part in self._sample.answer] == [Speech]
        return one_speech and len(texts) == 1 and not self.prompt_holds_speech and self.reference == "text"

    @cached_property
    def _sample(self) -> Turn:
        text = np.zeros(8, dtype=np.int64)
        codes, columns = np.zeros((1, 8), dtype=np.int64), dict.fromkeys(self.columns, text)
        one_word = {"words": (text,), "word_frames": (8,), "prosody": np.zeros((1, 3), dtype=np.int64)}
        return self.turn(UtteranceTokens(codes, text, columns, **one_word))


_TASKS: dict[str, Task] = {}


def register(task: Task) -> Task:
    """Make a task known under its name.

    Raises:
        TaskError: another task has that name, its modality is none, its reference is a column that it does not read, or
            there is no such score.
    """
    if _TASKS.get(task.name, task) != task:
        raise TaskError(f"task {task.name!r} is there already; give the new one another name")
    if task.answers not in ("text", "speech"):
        raise TaskError(f"task {task.name!r}: answers {task.answers!r} must be text or speech")
    if task.scored_by not in ("wer", "bleu"):
        raise TaskError(f"task {task.name!r}: scored_by {task.scored_by!r} must be wer or bleu")
    if task.reference not in ("text", *task.columns, None):
        raise TaskError(f"task {task.name!r}: reference {task.reference!r} must be text or one of its columns")
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
