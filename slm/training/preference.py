"""Preference optimisation of an SLM's speech: DPO on pairs of answers, GRPO on groups that are drawn while it trains.

Losses of our own on the Trainer of fine-tuning rather than TRL's trainers, because those (version 1.16 was read)
tokenise texts, where these prompts are ids, draw answers by `generate` from the process's random state, where these are
held to legal ids and must come out the same after a resume, and lay each sequence in a padded row, where these are
packed.

Shapes: R rows of length L, P pairs, S sequences and N answer tokens of a micro-batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slm.tasks.sequences import IGNORE, Example, answer
from slm.training.batches import Batch, PackedBatches, pack
from slm.training.config import TrainingError
from slm.training.preference_losses import clipped_policy_loss, dpo_loss, group_advantages, kl_estimate
from slm.training.reference import Reference, answer_log_probabilities
from slm.training.trainer import Objective, SpeechTrainer


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, the better one first, and their log-probabilities under the frozen start."""

    chosen: Example
    rejected: Example
    reference_chosen: float
    reference_rejected: float


@dataclass(frozen=True)
class Drawn:
    """An answer that a model has drawn, its prompt before it, and what it is worth."""

    example: Example
    reward: float


# From the model in eval mode, the step, and numbers of prompts to the answers of each.
Rollout = Callable[[nn.Module, int, np.ndarray], list[list[Drawn]]]


class _OneTask:
    """Samples of one task: what of the protocol `Samples` is the same for pairs and prompts."""

    task_names: Sequence[str] = ("preference",)
    task_weights: Sequence[float] = (1.0,)
    repeats: np.ndarray | None = None

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.tasks = np.zeros(len(self.lengths), dtype=np.int64)


class PairSamples(_OneTask):
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


class PromptSamples(_OneTask):
    """Prompts as samples: as long as the answers that are drawn for each are expected to be, with their prompts.

    Args:
        prompts: (P,) ids each.
        expected: Tokens of one answer to each, about.
        group_size: Answers of each.
    """

    def __init__(self, prompts: Sequence[np.ndarray], expected: Sequence[int], group_size: int) -> None:
        lengths = [group_size * (len(prompt) + tokens) for prompt, tokens in zip(prompts, expected, strict=True)]
        super().__init__(lengths)
        self.prompts = list(prompts)

    def example(self, index: int, rng: np.random.Generator | None) -> Example:
        """A prompt without an answer."""
        return answer(self.prompts[index], np.zeros(0, dtype=np.int64))


class PromptBatches(PackedBatches):
    """Micro-batches of prompts whose answers are not drawn yet: `prompts`, their numbers.

    Args:
        updates: Optimizer steps that learn from the same answers.
        steps: As in `PackedBatches`, and so what else there is.
    """

    def __init__(self, *args: Any, updates: int, steps: int, **kwargs: Any) -> None:
        super().__init__(*args, steps=-(-steps // updates), **kwargs)
        self.updates, self.steps = updates, steps

    def __len__(self) -> int:
        return self.steps * self.micro_batches

    def __getitem__(self, item: int) -> Batch:
        step, micro = divmod(item, self.micro_batches)
        members = self.plan[step // self.updates]
        return {"prompts": torch.from_numpy(members[self.places(step // self.updates, micro)])}


class PreferenceTrainer(SpeechTrainer):
    """What DPO and GRPO share: log-probabilities of answers, no dropout."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Dropout would move the probabilities that two of the same model are compared by.
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0


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


class GRPOTrainer(PreferenceTrainer):
    """Group relative policy optimisation of answers to `PromptBatches` (DeepSeekMath, arXiv 2402.03300, eq. 3).

    Args:
        rollout: Draws the answers of a step's prompts, by the step and nothing else.
        reference: The frozen start.
        clip: Ratios of probabilities count from 1 - clip to 1 + clip.
        kl_weight: Of the divergence from the start in the loss.
        updates: Optimizer steps that learn from the same answers.
        temperature: The answers are drawn at.
    """

    def __init__(
        self,
        *args: Any,
        rollout: Rollout,
        reference: Reference,
        clip: float,
        kl_weight: float,
        updates: int,
        temperature: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.rollout, self.reference = rollout, reference
        self.clip, self.kl_weight, self.updates, self.temperature = clip, kl_weight, updates, temperature
        self._drawn: list[Batch] = []

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """The step's micro-batches, drawn where its turn is, and how many answers they hold."""
        prompts = [batch["prompts"] for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        if self.state.global_step % self.updates == 0:
            self._drawn = self._draw([numbers.cpu().numpy() for numbers in prompts])
        elif not self._drawn:
            raise TrainingError(
                f"step {self.state.global_step}: learns from answers that an earlier step drew, which no checkpoint "
                f"keeps; training.save_steps and training.steps must be multiples of {self.updates} (updates)"
            )
        n_answers = sum(len(batch["advantages"]) for batch in self._drawn)
        return self._drawn, torch.tensor(float(n_answers), device=device)

    @torch.no_grad()
    def _draw(self, prompts: list[np.ndarray]) -> list[Batch]:
        """Answers to the prompts of each micro-batch, with all that does not change while they are learnt from."""
        self.model.eval()
        groups = iter(self.rollout(self.model, self.state.global_step, np.concatenate(prompts)))
        batches = []
        for numbers in prompts:
            of_batch = [next(groups) for _ in numbers]
            examples = [drawn.example for group in of_batch for drawn in group]
            rewards = torch.tensor([[drawn.reward for drawn in group] for group in of_batch], dtype=torch.float64)
            advantages = np.concatenate([group_advantages(group) for group in rewards.tolist()])
            # Such a group teaches nothing: all of its advantages are 0.
            self.note(reward=rewards, groups_of_one_reward=rewards.amax(1) == rewards.amin(1))
            batch = pack(examples, [1.0] * len(examples), self.train_dataset.pack_length, numbered=True)
            batches.append(batch | {"advantages": torch.from_numpy(advantages.astype(np.float32))})
        if self.updates > 1:
            for batch in batches:
                inputs = self._prepare_inputs(batch)
                with self.compute_loss_context_manager():
                    values = answer_log_probabilities(self.model, inputs, self.answer_loss, self.temperature)[0]
                batch["drawn_with"] = values
        if self.kl_weight:
            with self.reference.scorer(self.model) as scorer:
                for batch in batches:
                    batch["reference"] = scorer.log_probabilities(batch, self.temperature)[0]
        return batches

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, None]:
        """The micro-batch's part of the mean over the step's answers, each the mean over its tokens."""
        values, sequences = answer_log_probabilities(model, inputs, self.answer_loss, self.temperature)
        drawn_with = inputs.get("drawn_with", values.detach())
        losses, clipped = clipped_policy_loss(values, drawn_with, inputs["advantages"][sequences], self.clip)
        self.note(clipped=clipped)
        if self.kl_weight:
            divergence = kl_estimate(values, inputs["reference"])
            losses = losses + self.kl_weight * divergence
            self.note(kl=divergence)
        lengths = torch.bincount(sequences, minlength=len(inputs["advantages"]))
        loss = (losses / lengths[sequences]).sum() / num_items_in_batch
        return (loss, None) if return_outputs else loss


def dpo(beta: float, sft_weight: float = 0.0) -> Objective:
    """DPO as `slm.training.trainer.train` takes it, of `PairSamples`."""
    trainer = functools.partial(DPOTrainer, beta=beta, sft_weight=sft_weight)
    return Objective(trainer, PairBatches, evaluates_first=True)


def grpo(
    rollout: Rollout, reference: Reference, *, clip: float, kl_weight: float, updates: int, temperature: float
) -> Objective:
    """GRPO as `slm.training.trainer.train` takes it, of `PromptSamples`; the arguments are those of `GRPOTrainer`."""
    trainer = functools.partial(
        GRPOTrainer,
        rollout=rollout,
        reference=reference,
        clip=clip,
        kl_weight=kl_weight,
        updates=updates,
        temperature=temperature,
    )
    return Objective(trainer, functools.partial(PromptBatches, updates=updates), evaluates_first=True)
