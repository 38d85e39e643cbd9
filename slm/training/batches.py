"""From samples to packed batches, in an order that is a pure function of the seed.

Shapes: R rows of length L; `input_ids`, `labels`, `position_ids` (R, L) int64, `loss_weights` (R, L) float32; of n - 1
further books beside the ids `further`, `further_labels` (R, L, n - 1) int64, `further_weights` (R, L) float32; of N
texts that are said `spoken` (N, 6) int64.

Several sequences lie in one row, each with position ids from 0; transformers' models keep attention within each of
them. What optimizer step s sees is decided before it is dealt out to micro-batches, so gradient accumulation, the
number of processes and a resume change nothing but the rounding of sums.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from slm.patterns import EMPTY
from slm.tasks import Task, TaskError, get_task
from slm.tasks.registry import UtteranceTokens
from slm.tasks.sequences import IGNORE, Example, answer, example_length, make_example
from slm.tasks.styles import PromptStyles
from slm.training.config import TrainingConfig
from slm.vocabulary import SpeechVocabulary

Batch = dict[str, torch.Tensor]

ONE_ROW = -1  # a row length: all sequences of a micro-batch end to end in one row, without padding


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


def _epoch(n: int, repeats: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """The samples of one epoch, shuffled; one of 2.3 is there twice, and in three of ten epochs a third time."""
    if repeats is None:
        return rng.permutation(n)
    times = np.floor(repeats).astype(np.int64)
    times += rng.random(n) < repeats - times
    return rng.permutation(np.repeat(np.arange(n), times))


def plan_steps(
    lengths: np.ndarray, tokens_per_step: int, steps: int, seed: int, repeats: np.ndarray | None = None
) -> list[np.ndarray]:
    """Which samples each optimizer step sees: shuffled epochs on end, cut where a step's tokens are full.

    Args:
        lengths: (N,) tokens of each sample.
        tokens_per_step: What a step may hold.
        steps: How many.
        seed: Decides the order.
        repeats: (N,) how often an epoch sees each sample, on average; None: once.

    Returns:
        `steps` arrays of sample indices; a step holds as many as fit in `tokens_per_step`, and at least one.
    """
    plan: list[np.ndarray] = []
    order, epoch = np.zeros(0, dtype=np.int64), 0
    while len(plan) < steps:
        order = np.concatenate([order, _epoch(len(lengths), repeats, np.random.default_rng([seed, epoch]))])
        ends, start, epoch = np.cumsum(lengths[order]), 0, epoch + 1
        while len(plan) < steps:
            before = ends[start - 1] if start else 0
            stop = max(int(np.searchsorted(ends, before + tokens_per_step, side="right")), start + 1)
            if stop >= len(order):
                break  # The rest of this epoch and the start of the next make one step.
            plan.append(order[start:stop])
            start = stop
        order = order[start:]
    return plan


def with_steps(config: TrainingConfig, samples: Samples) -> TrainingConfig:
    """The same with the steps that its epochs come to; as it is where it says steps."""
    if config.epochs is None:
        return config
    repeats = np.ones(len(samples.lengths)) if samples.repeats is None else samples.repeats
    steps = round(config.epochs * float(samples.lengths @ repeats) / config.tokens_per_step)
    return dataclasses.replace(config, steps=max(1, steps), epochs=None)


def pack(examples: Sequence[Example], weights: Sequence[float], pack_length: int, numbered: bool = False) -> Batch:
    """Lays sequences end to end in rows of at most `pack_length` (or the longest sequence, if that is longer).

    Args:
        examples: The sequences.
        weights: Loss weight of each one's answer.
        pack_length: Row length; attention's cost grows with it, padding's share shrinks. 0: one sequence a row;
            ONE_ROW: all in one.
        numbered: Whether the batch tells whose each place is.

    Returns:
        `input_ids`, `labels`, `position_ids`, `loss_weights`, each (R, L). Padding is a sequence of its own without
        loss. With `numbered` also `sequences`, (R, L) int64: the number of the example, -1 for padding. Where sequences
        have further books also `further`, `further_labels` and `further_weights`. Where some say a text also
        `spoken`, a line for each: its row, where the sequence begins, where its text begins, tokens of the text, from
        where its codes are predicted, and how many they are.

    >>> a, b = answer(np.array([5]), np.array([6, 7])), answer(np.array([8]), np.array([9]))
    >>> batch = pack([a, b], [1.0, 0.5], pack_length=5)
    >>> batch["input_ids"].tolist(), batch["position_ids"].tolist()
    ([[5, 6, 7, 8, 9]], [[0, 1, 2, 0, 1]])
    >>> batch["labels"].tolist(), batch["loss_weights"].tolist()
    ([[-100, 6, 7, -100, 9]], [[0.0, 1.0, 1.0, 0.0, 0.5]])
    """
    lengths = [len(example) for example in examples]
    capacity = sum(lengths) if pack_length == ONE_ROW else max(pack_length, *lengths)
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(examples)), key=lambda i: -len(examples[i])):
        size = len(examples[index])
        row = next((r for r, free in enumerate(room) if free >= size), None) if pack_length else None
        if row is None:
            rows.append([])
            room.append(capacity)
            row = len(rows) - 1
        rows[row].append(index)
        room[row] -= size
    length = capacity - min(room)
    ids = np.zeros((len(rows), length), dtype=np.int64)
    labels = np.full((len(rows), length), IGNORE, dtype=np.int64)
    positions = np.zeros((len(rows), length), dtype=np.int64)
    loss_weights = np.zeros((len(rows), length), dtype=np.float32)
    sequences = np.full((len(rows), length), -1, dtype=np.int64)
    beside = max(0 if example.further is None else example.further.shape[1] for example in examples)
    further = np.full((len(rows), length, beside), EMPTY, dtype=np.int64)
    further_labels, further_weights = np.full_like(further, IGNORE), np.zeros_like(loss_weights)
    spoken: list[list[int]] = []
    for row, members in enumerate(rows):
        start = 0
        for index in members:
            example = examples[index]
            cells = slice(start, start + len(example))
            ids[row, cells], labels[row, cells] = example.input_ids, example.labels
            positions[row, cells] = np.arange(len(example))
            loss_weights[row, cells] = (example.labels != IGNORE) * weights[index]
            sequences[row, cells] = index
            if example.further is not None:
                further[row, cells], further_labels[row, cells] = example.further, example.further_labels
                further_weights[row, cells] = weights[index]
            if example.spoken is not None:
                text, speech = example.spoken.text, example.spoken.speech
                spoken.append([row, start, start + text.start, len(text), start + speech.start, len(speech)])
            start += len(example)
        positions[row, start:] = np.arange(length - start)
    arrays = {"input_ids": ids, "labels": labels, "position_ids": positions, "loss_weights": loss_weights}
    if beside:
        arrays |= {"further": further, "further_labels": further_labels, "further_weights": further_weights}
    if numbered:
        arrays["sequences"] = sequences
    if spoken:
        arrays["spoken"] = np.array(spoken, dtype=np.int64)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class PackedBatches(Dataset):
    """Item i is micro-batch i % n of optimizer step i // n, n = accumulation x processes.

    Args:
        samples: What is packed.
        steps: Optimizer steps.
        tokens_per_step: Tokens that one step sees, over all processes and micro-batches.
        micro_batches: n.
        pack_length: Row length, as `pack` takes it.
        seed: Decides order and noise.

    Raises:
        BatchError: A step has fewer sequences than micro-batches.
    """

    def __init__(
        self, samples: Samples, *, steps: int, tokens_per_step: int, micro_batches: int, pack_length: int, seed: int
    ) -> None:
        self.samples, self.micro_batches, self.pack_length, self.seed = samples, micro_batches, pack_length, seed
        self.plan = plan_steps(samples.lengths, tokens_per_step, steps, seed, samples.repeats)
        least = min(len(step) for step in self.plan)
        if least < micro_batches:
            raise BatchError(
                f"tokens_per_step: {tokens_per_step} holds as few as {least} sequences, which cannot be dealt "
                f"to {micro_batches} "
                "micro-batches (gradient_accumulation x processes); raise tokens_per_step or accumulate less"
            )

    def __len__(self) -> int:
        return len(self.plan) * self.micro_batches

    def places(self, step: int, micro: int) -> np.ndarray:
        """Which of the samples `plan[step]` a micro-batch holds, by their places in it."""
        members = self.plan[step]
        by_length = np.argsort(-self.samples.lengths[members], kind="stable")
        # Dealt there and back, so that the micro-batches are of about one size.
        rank = np.arange(len(members))
        lap, seat = np.divmod(rank, self.micro_batches)
        seat = np.where(lap % 2 == 0, seat, self.micro_batches - 1 - seat)
        return np.sort(by_length[rank[seat == micro]])

    def __getitem__(self, item: int) -> Batch:
        step, micro = divmod(item, self.micro_batches)
        members, places = self.plan[step], self.places(step, micro)
        examples = [
            self.samples.example(int(members[place]), np.random.default_rng([self.seed, step, int(place)]))
            for place in places
        ]
        weights = [self.samples.task_weights[self.samples.tasks[members[place]]] for place in places]
        return pack(examples, weights, self.pack_length)


def evaluation_batches(samples: Samples, tokens_per_batch: int, pack_length: int) -> dict[str, list[Batch]]:
    """Every sample once, without noise, packed per task: {task: batches}."""
    batches: dict[str, list[Batch]] = {}
    for task in sorted(set(samples.tasks.tolist())):
        members = np.flatnonzero(samples.tasks == task)
        members = members[np.argsort(samples.lengths[members], kind="stable")]
        groups = np.cumsum(samples.lengths[members]) // max(1, tokens_per_batch)
        batches[samples.task_names[task]] = [
            pack([samples.example(int(i), None) for i in group], [1.0] * len(group), pack_length)
            for group in np.split(members, np.flatnonzero(np.diff(groups)) + 1)
        ]
    return batches
