"""Direct preference optimisation: of two answers to a prompt, the better one becomes the likelier.

Shapes: P pairs of a micro-batch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slm.tasks.sequences import IGNORE, Example
from slm.training.batches import Batch, PackedBatches, pack
from slm.training.preference.losses import dpo_loss
from slm.training.preference.reference import answer_log_probabilities
from slm.training.preference.trainer import OneTask, PreferenceTrainer
from slm.training.trainer import Objective


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, the better one first, and their log-probabilities under the frozen start."""

    chosen: Example
    rejected: Example
    reference_chosen: float
    reference_rejected: float


class PairSamples(OneTask):
    """Pairs as samples: as long as both answers with their prompts.

    Args:
        pairs: At least one.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        super().__init__([len(pair.chosen) + len(pair.rejected) for pair in pairs])
        self.pairs = list(pairs)

    def example(self, index: int, rng: np.random.Generator | None) -> Example:
        """The chosen answer of a pair."""
        return self.pairs[index].chosen


class PairBatches(PackedBatches):
    """Micro-batches of whole pairs: `sequences` 2 i and 2 i + 1 are the chosen and the rejected answer of pair i.

    Beside what `pack` makes: `reference` (P, 2) float32, and `chosen_tokens` (), the answer tokens of chosen answers.
    """

    samples: PairSamples

    def __getitem__(self, item: int) -> Batch:
        step, micro = divmod(item, self.micro_batches)
        pairs = [self.samples.pairs[i] for i in self.plan[step][self.places(step, micro)]]
        examples = [example for pair in pairs for example in (pair.chosen, pair.rejected)]
        batch = pack(examples, [1.0] * len(examples), self.pack_length, numbered=True)
        reference = [(pair.reference_chosen, pair.reference_rejected) for pair in pairs]
        chosen_tokens = sum(int((pair.chosen.labels != IGNORE).sum()) for pair in pairs)
        return batch | {"reference": torch.tensor(reference), "chosen_tokens": torch.tensor(chosen_tokens)}


class DPOTrainer(PreferenceTrainer):
    """Direct preference optimisation of `PairBatches`.

    Args:
        beta: How strongly the start holds the model.
        sft_weight: Of the chosen answers' mean loss per token, added to DPO's.
    """

    def __init__(self, *args: Any, beta: float, sft_weight: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.beta, self.sft_weight = beta, sft_weight

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """The step's micro-batches, and how many pairs and chosen tokens they hold, (2,)."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        counts = [[len(batch["reference"]), int(batch["chosen_tokens"])] for batch in batches]
        return batches, torch.tensor(counts, dtype=torch.float32).sum(0).to(device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, None]:
        """The micro-batch's part of the mean over the step's pairs."""
        values, sequences = answer_log_probabilities(model, inputs, self.answer_loss)
        n_pairs, chosen_tokens = num_items_in_batch
        sums = values.new_zeros(2 * len(inputs["reference"])).index_add(0, sequences, values)
        chosen, rejected = sums.view(-1, 2).unbind(1)
        of_chosen, of_rejected = inputs["reference"].unbind(1)
        losses, margins = dpo_loss(chosen, rejected, of_chosen, of_rejected, self.beta)
        loss = losses.sum() / n_pairs
        if self.sft_weight:
            loss = loss - self.sft_weight * chosen.sum() / chosen_tokens
        self.note(
            reward_margin=margins,
            reward_accuracy=margins > 0,
            reward_chosen=self.beta * (chosen - of_chosen),
            reward_rejected=self.beta * (rejected - of_rejected),
        )
        return (loss, None) if return_outputs else loss


def dpo_objective(beta: float, sft_weight: float = 0.0) -> Objective:
    """DPO as `slm.training.train.train` takes it, of `PairSamples`."""
    trainer = functools.partial(DPOTrainer, beta=beta, sft_weight=sft_weight)
    return Objective(trainer, PairBatches, evaluates_first=True)
