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

import numpy as np
import torch
from torch.utils.data import Dataset

from slm.patterns import EMPTY
from slm.tasks.sequences import IGNORE, Example
from slm.training.config import TrainingConfig
from slm.training.samples import BatchError, Samples

Batch = dict[str, torch.Tensor]

ONE_ROW = -1  # a row length: all sequences of a micro-batch end to end in one row, without padding
LENGTH_MULTIPLE = 16  # of rows that are shorter than they may be: a CPU compiles and keeps kernels for each length


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

    >>> from slm.tasks.sequences import answer
    >>> a, b = answer(np.array([5]), np.array([6, 7])), answer(np.array([8]), np.array([9]))
    >>> batch = pack([a, b], [1.0, 0.5], pack_length=5)
    >>> batch["input_ids"].tolist(), batch["position_ids"].tolist()
    ([[5, 6, 7, 8, 9]], [[0, 1, 2, 0, 1]])
    >>> batch["labels"].tolist(), batch["loss_weights"].tolist()
    ([[-100, 6, 7, -100, 9]], [[0.0, 1.0, 1.0, 0.0, 0.5]])
    """
    rows = _rows_of([len(example) for example in examples], pack_length)
    length = max(sum(len(examples[index]) for index in members) for members in rows)
    if length < pack_length:
        length = min(-(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, pack_length)
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


def _rows_of(lengths: Sequence[int], pack_length: int) -> list[list[int]]:
    """Which sequences lie in each row: the longest first, each in the first row with room (first-fit decreasing)."""
    capacity = sum(lengths) if pack_length == ONE_ROW else max(pack_length, *lengths)
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, free in enumerate(room) if free >= lengths[index]), None) if pack_length else None
        if row is None:
            rows.append([])
            room.append(capacity)
            row = len(rows) - 1
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


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
        """Which of the samples `plan[step]` a micro-batch holds: their places in it, rising, int64."""
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
