"""What can be packed: utterances by task, texts and mixtures of them, each drawn anew with its noise.

Shapes: N samples; codes (n, F) of n books in F frames.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from slm.tasks import Task, TaskError, get_task
from slm.tasks.registry import UtteranceTokens
from slm.tasks.sequences import Example, answer, example_length, make_example
from slm.tasks.styles import PromptStyles
from slm.vocabulary import SpeechVocabulary


class BatchError(ValueError):
    """Samples that no batch can be made of; the message names the setting and the way out."""


@dataclass
class NoiseConfig:
    """What training does to a prompt: to its speech tokens, against over-fitting. The answer is never touched."""

    replace: float = field(default=0.05, metadata={"help": "share of codes replaced by a random one of their book"})
    drop: float = field(default=0.05, metadata={"help": "share of frames left out, in spans"})
    drop_span: int = field(default=3, metadata={"help": "longest span of frames left out together"})
    drop_prompt: float = field(
        default=0.0,
        metadata={
            "help": "share of answers in speech that are learnt with nothing but marks in the prompt, which "
            "classifier-free guidance (decoding.guidance of `slm synthesize`) builds on: 0.1, say"
        },
    )

    def __post_init__(self) -> None:
        for name in ("replace", "drop", "drop_prompt"):
            if not 0 <= getattr(self, name) < 1:
                raise BatchError(f"noise.{name}: {getattr(self, name)} must be at least 0 and below 1")
        if self.drop_span < 1:
            raise BatchError(f"noise.drop_span: {self.drop_span} must be at least 1")

    def apply(self, codes: np.ndarray, sizes: Sequence[int], rng: np.random.Generator) -> np.ndarray:
        """(n, F) codes -> (n, F') codes, F' <= F and at least 1."""
        n, frames = codes.shape
        if self.replace:
            random = np.stack([rng.integers(0, size, frames) for size in sizes[:n]])
            codes = np.where(rng.random((n, frames)) < self.replace, random, codes)
        if self.drop and frames > 1:
            # A frame starts a span so often that `drop` of all frames fall into one.
            starts = rng.random(frames) < self.drop * 2 / (self.drop_span + 1)
            lengths = rng.integers(1, self.drop_span + 1, frames)
            keep = np.ones(frames, dtype=bool)
            for start in np.flatnonzero(starts):
                keep[start : start + lengths[start]] = False
            codes = codes[:, keep] if keep.any() else codes[:, :1]
        return codes


class Samples(Protocol):
    """What can be packed: a length and a task per sample, and the sequence itself, drawn anew each time."""

    lengths: np.ndarray  # (N,) int64: the length before any noise
    tasks: np.ndarray  # (N,) int64: index into `task_names`
    task_names: Sequence[str]
    task_weights: Sequence[float]
    repeats: np.ndarray | None  # (N,): how often an epoch sees each on average; None: once

    def example(self, index: int, rng: np.random.Generator | None) -> Example:
        """The sequence of one sample; `rng` None leaves noise out."""
        ...


class SpeechSamples:
    """Every utterance once per task that can be made of it.

    Args:
        vocabulary: Ids of speech.
        utterances: Codes and text ids of each, its texts as the model writes them. One without `word_frames` or
            `prosody` has no sample of the tasks that answer with them.
        task_weights: Weight of a token of each task in the loss, by name; 0 leaves the task out.
        noise: What is done to speech in a prompt in training.
        max_length: Longer sequences are left out, and counted in `n_too_long`.
        prompts: The same utterances with their texts as the model reads them; None: as it writes them.
        repeats: How often an epoch sees each utterance, on average: 0.5 every other time; None: once each.
        styles: How the tasks are asked for, beside their marks.
        tasks_of: The tasks that each utterance is learnt in, by name; None: all.

    Raises:
        BatchError: Unknown tasks, or nothing is left.
    """

    def __init__(
        self,
        vocabulary: SpeechVocabulary,
        utterances: Sequence[UtteranceTokens],
        task_weights: dict[str, float],
        noise: NoiseConfig | None = None,
        max_length: int | None = None,
        prompts: Sequence[UtteranceTokens] | None = None,
        repeats: Sequence[float] | None = None,
        styles: PromptStyles | None = None,
        tasks_of: Sequence[Collection[str] | None] | None = None,
    ) -> None:
        try:
            self._tasks = [get_task(name) for name in sorted(task_weights)]
        except TaskError as error:
            raise BatchError(f"task_weights: {error}") from error
        self.task_names = tuple(task.name for task in self._tasks)
        self.task_weights = [float(task_weights[name]) for name in self.task_names]
        if not any(weight > 0 for weight in self.task_weights) or min(self.task_weights) < 0:
            raise BatchError(f"task_weights: {task_weights} must not fall below 0, and one must be above")
        self.vocabulary, self.noise, self.styles = vocabulary, noise, styles or PromptStyles()
        self.utterances = [_small(utterance, vocabulary.n_codebooks) for utterance in utterances]
        self.prompts = self.utterances
        if prompts is not None:
            self.prompts = [
                kept if own is read else dataclasses.replace(_small(read, vocabulary.n_codebooks), codes=kept.codes)
                for kept, own, read in zip(self.utterances, utterances, prompts, strict=True)
            ]
        used = [number for number, weight in enumerate(self.task_weights) if weight > 0]
        tasks = [self._tasks[number] for number in used]
        has = np.array([[task.answers_from(one) for one in self.utterances] for task in tasks])
        if tasks_of is not None:
            has &= np.array([[names is None or task.name in names for names in tasks_of] for task in tasks])
        lengths = np.zeros(has.shape, dtype=np.int64)
        for row, member in zip(*np.nonzero(has), strict=True):
            lengths[row, member] = self._length(tasks[row], member)
        fits = has & (lengths <= max_length) if max_length else has
        self.n_too_long = int((has & ~fits).any(axis=0).sum())
        rows, self.members = np.nonzero(fits)
        self.tasks, self.lengths = np.array(used, dtype=np.int64)[rows], lengths[fits]
        self.repeats = None if repeats is None else np.asarray(repeats, dtype=float)[self.members]
        if not len(self.lengths):
            raise BatchError(
                f"no utterance fits: {len(self.utterances)} given, longest allowed {max_length} tokens; raise "
                f"max_length or cut the audio"
            )

    def _length(self, task: Task, member: int) -> int:
        style = self.styles.longest(task, member)
        return example_length(self.vocabulary, task, *self._pair(member, style))

    def _pair(self, member: int, style: dict[str, Any]) -> tuple[UtteranceTokens, UtteranceTokens]:
        """An utterance as its answer and as its prompt is made of it."""
        pair = self.utterances[member], self.prompts[member]
        return tuple(dataclasses.replace(one, **style) for one in pair) if style else pair

    def asked(self, task: Task, member: int) -> UtteranceTokens:
        """What the prompt of one of `utterances` is made of, without noise and without a draw."""
        return self._pair(member, self.styles.draw(task, member, None))[1]

    def example(self, index: int, rng: np.random.Generator | None) -> Example:
        """The sequence of one sample."""
        change, bare = None, False
        task, member = self._tasks[self.tasks[index]], self.members[index]
        utterance, prompted = self._pair(member, self.styles.draw(task, member, rng))
        if rng is not None and self.noise is not None:
            noise, sizes = self.noise, self.vocabulary.book_sizes

            def change(codes: np.ndarray) -> np.ndarray:
                return noise.apply(codes, sizes, rng)

            if noise.drop_prompt and task.answers == "speech":
                bare = bool(rng.random() < noise.drop_prompt)
        return make_example(self.vocabulary, task, utterance, change, prompted, bare)


def _small(utterance: UtteranceTokens, n_codebooks: int) -> UtteranceTokens:
    """The books used, and the smallest type that fits: a thousand hours at 25 Hz are 90 million codes."""
    columns = {name: np.asarray(ids).astype(np.int32) for name, ids in utterance.columns.items()}
    codes = np.asarray(utterance.codes[:n_codebooks]).astype(np.int32)
    words = None if utterance.words is None else tuple(np.asarray(ids).astype(np.int32) for ids in utterance.words)
    text = np.asarray(utterance.text).astype(np.int32)
    prosody = None if utterance.prosody is None else np.asarray(utterance.prosody).astype(np.int32)
    return UtteranceTokens(codes, text, columns, words=words, word_frames=utterance.word_frames, prosody=prosody)


class TextSamples:
    """Texts for a text LM: `<bos> text <eos>`, loss on all but the bos; without a bos on all but the first id.

    Args:
        texts: One (T,) array of ids per text, without bos and eos.
        bos_id: The id before a text; None where the tokenizer has none.
        eos_id: The id after it.
        weight: Of a token in the loss.
        repeat: How often an epoch sees each text, on average.
    """

    task_names: Sequence[str] = ("text",)

    def __init__(
        self,
        texts: Sequence[np.ndarray],
        bos_id: int | None,
        eos_id: int,
        weight: float = 1.0,
        repeat: float | None = None,
    ) -> None:
        if not len(texts):
            raise BatchError("no sentence to train on")
        self.texts, self.eos_id = list(texts), eos_id
        self.before = [] if bos_id is None else [bos_id]
        self.task_weights: Sequence[float] = (weight,)
        self.lengths = np.array([len(self.before) + len(text) + 1 for text in self.texts], dtype=np.int64)
        self.tasks = np.zeros(len(self.texts), dtype=np.int64)
        self.repeats = None if repeat is None else np.full(len(self.texts), float(repeat))

    def example(self, index: int, rng: np.random.Generator | None) -> Example:
        """The sequence of one text."""
        ids = np.array([*self.before, *self.texts[index], self.eos_id], dtype=np.int64)
        return answer(ids[:1], ids[1:])


class MixedSamples:
    """Samples of several kinds in one training, such as speech and plain text; each kind has tasks of its own.

    Args:
        parts: What is mixed.
    """

    def __init__(self, parts: Sequence[Samples]) -> None:
        self.parts = list(parts)
        self.task_names = [name for part in parts for name in part.task_names]
        self.task_weights = [weight for part in parts for weight in part.task_weights]
        firsts = np.cumsum([0, *(len(part.task_names) for part in parts)])
        self.tasks = np.concatenate([part.tasks + first for part, first in zip(parts, firsts, strict=False)])
        self.lengths = np.concatenate([part.lengths for part in parts])
        self.repeats = None
        if any(part.repeats is not None for part in parts):
            every = (np.ones(len(p.lengths)) if p.repeats is None else p.repeats for p in parts)
            self.repeats = np.concatenate(list(every))
        self._ends = np.cumsum([len(part.lengths) for part in parts])

    def example(self, index: int, rng: np.random.Generator | None) -> Example:
        """The sequence of one sample."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[part].example(index - (int(self._ends[part - 1]) if part else 0), rng)
