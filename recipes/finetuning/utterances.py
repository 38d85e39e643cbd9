"""Rows of coded corpora -> the ids of each utterance, its texts as the model writes and as it reads them.

Shapes: codes (K, F) of K books in F frames; text ids (T,).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from eval.text.normalisers import get_normaliser
from recipes.finetuning.config import Config
from recipes.finetuning.corpora import Corpora, columns_of, used_tasks
from recipes.finetuning.prosody import PROSODY, prosody_of
from recipes.finetuning.words import WORDS, words_of
from recipes.runs.logs import log
from slm.corpus import CodedRow
from slm.tasks import Task
from slm.tasks.registry import UtteranceTokens
from slm.tasks.styles import language_mark
from slm.tasks.tts_aligned import word_ids
from slm.vocabulary import SpeechVocabulary


@dataclass
class Split:
    """The utterances of one split, in lists of one length.

    Attributes:
        written: Codes and ids, the texts as the model writes them.
        prompts: The same as it reads them; the very object of `written` where that is alike.
        weights: Of their corpora.
        tasks: Those that their corpora are for; None: all.
        languages: Task -> the mark of each answer's language.
        spoken: The text that each says, and its seconds.
    """

    written: list[UtteranceTokens] = field(default_factory=list)
    prompts: list[UtteranceTokens] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    tasks: list[list[str] | None] = field(default_factory=list)
    languages: dict[str, list[str | None]] = field(default_factory=dict)
    spoken: list[tuple[str, float]] = field(default_factory=list)


class UtteranceReader:
    """Reads the utterances that the tasks of a fine-tuning can be made of.

    Args:
        config: The fine-tuning's.
        corpora: Where they lie.
        tokenizer: The text tokenizer.
        vocabulary: Ids of speech, and the normalisers.

    Raises:
        ConfigError: A corpus lacks a column that a task reads.
    """

    def __init__(
        self, config: Config, corpora: Corpora, tokenizer: PreTrainedTokenizerBase, vocabulary: SpeechVocabulary
    ) -> None:
        self.config, self.corpora, self.vocabulary = config, corpora, vocabulary
        self.columns, self.tasks = columns_of(config, corpora), used_tasks(config)
        self.word_columns = _word_columns(self.tasks)
        self._holds_text = any(task.holds_text for task in self.tasks)
        self._write = get_normaliser(vocabulary.normaliser)
        self._read = get_normaliser(vocabulary.normaliser_of_prompts)
        self._as_written = vocabulary.normaliser == vocabulary.normaliser_of_prompts
        self._encode = functools.partial(vocabulary.encode_text, tokenizer)

    def split(self, name: str) -> Split:
        """The utterances of a split; what is left out of it, or of a task, is told.

        Raises:
            ConfigError: A column of words holds something else, or a row's language is none.
        """
        found = Split(languages={task: [] for task in self.config.prompts.languages})
        n_empty, n_without = 0, dict.fromkeys((task.name for task in self.tasks), 0)
        count = self.corpora.count(name)
        chosen = evaluated(count, self.config.eval_utterances) if name == "valid" else None
        for number, (row, weight, own_tasks) in enumerate(self.corpora.rows(name)):
            if chosen is not None and number not in chosen:
                continue
            texts, asked = self._texts(row)
            own = [task for task in self.tasks if own_tasks is None or task.name in own_tasks]
            if not all(texts[column] and asked[column] for column in self._needed(own)):
                n_empty += 1
                continue
            words = self._words(row, asked["text"])
            codes = row["audio_codes"].astype(np.int32)
            tokens = self._tokens(codes, texts, words)
            without = [task.name for task in own if not task.answers_from(tokens)]
            n_without |= {task: n_without[task] + 1 for task in without}
            if len(without) == len(own):
                continue
            found.written.append(tokens)
            found.prompts.append(tokens if asked == texts else self._tokens(codes, asked, words))
            found.weights.append(weight)
            found.tasks.append(own_tasks)
            for task, column in self.config.prompts.languages.items():
                language = row["columns"].get(column)
                found.languages[task].append(language_mark(language) if language else None)
            found.spoken.append((asked["text"], codes.shape[1] / self.vocabulary.frame_rate))
        self._tell(name, n_empty, n_without)
        return found

    def _needed(self, tasks: list[Task]) -> list[str]:
        """The texts without which an utterance says nothing to these tasks; none where no task at all holds text."""
        return ["text", *dict.fromkeys(c for task in tasks for c in task.columns)] if self._holds_text else []

    def _texts(self, row: CodedRow) -> tuple[dict[str, str], dict[str, str]]:
        """The text and the columns that tasks read, as the model writes them and as it reads them."""
        plain = {"text": row["text"]} | {name: row["columns"].get(name, "") for name in self.columns}
        texts = {name: self._write(text) for name, text in plain.items()}
        return texts, texts if self._as_written else {name: self._read(text) for name, text in plain.items()}

    def _tokens(self, codes: np.ndarray, texts: dict[str, str], words: dict[str, Any]) -> UtteranceTokens:
        ids = {name: self._encode(text) for name, text in texts.items()}
        return UtteranceTokens(codes, ids.pop("text"), ids, **words)

    def _words(self, row: CodedRow, text: str) -> dict[str, Any]:
        """The fields of :class:`UtteranceTokens` that come of columns of words; None where they are not the text's."""
        fields: dict[str, Any] = {}
        place = f"corpus {self.corpora.names}: {row['id']}"
        if WORDS in self.word_columns:
            n_frames = row["audio_codes"].shape[1]
            column = row["columns"].get(WORDS, "")
            fields["word_frames"] = words_of(column, text, n_frames, self.vocabulary.frame_rate, self._read, place)
        if PROSODY in self.word_columns:
            values = prosody_of(row["columns"].get(PROSODY, ""), text, self._read, place)
            fields["prosody"] = None if values is None else self.vocabulary.prosody.cut(values)
        if self.word_columns:
            fields["words"] = word_ids(self._encode, text)
        return fields

    def _tell(self, name: str, n_empty: int, n_without: dict[str, int]) -> None:
        if n_empty:
            named = " or ".join(self._needed(self.tasks))
            log.warning("%s: %d utterances without %s are left out", name, n_empty, named)
        for task, n in n_without.items():
            if n:
                log.warning(
                    "%s: %d utterances whose column %s does not say their text, or has more words than they have "
                    "frames, are left out of %s",
                    name,
                    n,
                    " or ".join(self.word_columns),
                    task,
                )


def _word_columns(tasks: list[Task]) -> list[str]:
    """The columns that tell of the text's words, of those that a task needs."""
    needed = {WORDS: any(task.by_word for task in tasks), PROSODY: any(task.answer_holds_prosody for task in tasks)}
    return [name for name, is_needed in needed.items() if is_needed]


def evaluated(n: int, most: int | None) -> set[int] | None:
    """Which of n utterances the losses are measured on: the same in every run; None: all."""
    if most is None or n <= most:
        return None
    return set(np.random.default_rng(0).choice(n, most, replace=False).tolist())
