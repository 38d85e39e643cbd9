"""How a task is asked for beside its marks: in which words, with the tag of which language, up to where in its speech.

An instruct LLM's chat template needs none of this: it stands around every prompt (`before` and `between` of the speech
vocabulary), and a wording is what the user's turn begins with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from slm.tasks.registry import Task, TaskError
from slm.vocabulary import MARKS, SpeechVocabulary

_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*")


@dataclass
class PromptsConfig:
    """How tasks are asked for in training; by default by their marks alone."""

    wordings: dict[str, list[str]] = field(
        default_factory=dict,
        metadata={
            "help": "wordings of a task by its name, one of them drawn each time, in front of the prompt: "
            "prompts.wordings.asr=['', Write down what is said.]; an empty one is the marks alone. The first is used "
            "where losses are measured and, later, where nobody asks for another"
        },
    )
    languages: dict[str, str] = field(
        default_factory=dict,
        metadata={
            "help": "column of the corpus that names the language of a task's answers (de, pt-BR), whose tag ends the "
            "prompt: {asr: language, st: translation_language}; a row without one gets no tag"
        },
    )
    share: tuple[float, float] = field(
        default=(0.25, 0.75),
        metadata={
            "help": "of a continuation: the share of the utterance that is its prompt, drawn between these two; twice "
            "the same does not draw"
        },
    )

    def __post_init__(self) -> None:
        low, high = self.share
        if not 0 < low <= high < 1:
            raise TaskError(f"prompts.share: {low:g} and {high:g} must be above 0 and below 1, the lesser first")
        for task, wordings in self.wordings.items():
            if not wordings or len(set(wordings)) < len(wordings):
                raise TaskError(f"prompts.wordings.{task}: give at least one, and none twice; or leave the task out")


@dataclass(frozen=True)
class PromptStyles:
    """What training draws from, in ids.

    Args:
        wordings: Ids (T,) of each wording of a task, by the task's name.
        languages: The mark of the language of each utterance's answer, None without one, by the task's name.
        share: The least and the greatest share of an utterance that is a prompt to be continued.
    """

    wordings: Mapping[str, Sequence[np.ndarray]] = field(default_factory=dict)
    languages: Mapping[str, Sequence[str | None]] = field(default_factory=dict)
    share: tuple[float, float] = (0.25, 0.75)

    def draw(self, task: Task, member: int, rng: np.random.Generator | None) -> dict[str, Any]:
        """The fields of :class:`~slm.tasks.registry.UtteranceTokens` that say how utterance `member` is asked for.

        Nothing is drawn from `rng` for a task that leaves no choice. None draws nothing: the first wording, and the
        middle of the shares.
        """
        style: dict[str, Any] = {}
        if wordings := self.wordings.get(task.name):
            style["wording"] = wordings[0 if rng is None or len(wordings) == 1 else int(rng.integers(len(wordings)))]
        if task.name in self.languages:
            style["language"] = self.languages[task.name][member]
        if task.continues:
            low, high = self.share
            style["prompt_share"] = (low + high) / 2 if rng is None or low == high else float(rng.uniform(low, high))
        return style

    def longest(self, task: Task, member: int) -> dict[str, Any]:
        """The same with the task's longest wording, whatever is drawn."""
        style = self.draw(task, member, None)
        if wordings := self.wordings.get(task.name):
            style["wording"] = max(wordings, key=len)
        return style


def wording_ids(vocabulary: SpeechVocabulary, text_tokenizer: PreTrainedTokenizerBase, wording: str) -> np.ndarray:
    """A wording's ids (T,), on a line of its own; none of an empty one."""
    if not wording:
        return np.zeros(0, dtype=np.int64)
    return vocabulary.encode_text(text_tokenizer, f"{wording}\n")


def trained_wording(
    vocabulary: SpeechVocabulary, text_tokenizer: PreTrainedTokenizerBase, task: Task
) -> np.ndarray | None:
    """Ids (T,) of the wording that a model is asked in where nobody says another; None: the task's marks alone."""
    wordings = dict(vocabulary.trained_on.wordings).get(task.name) if vocabulary.trained_on else None
    return wording_ids(vocabulary, text_tokenizer, wordings[0]) if wordings else None


def language_mark(language: str) -> str:
    """The tag of a language, such as `<|de|>`.

    Raises:
        TaskError: It is no code of a language, or one that another mark is called by.
    """
    mark = f"<|{language}|>"
    if _LANGUAGE.fullmatch(language) is None or mark in MARKS:
        raise TaskError(f"{language!r} is no code of a language; write it as de, yue or pt-BR")
    return mark
