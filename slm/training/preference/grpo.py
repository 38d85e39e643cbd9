"""Group relative policy optimisation: of answers to one prompt, those better than their group become likelier.

Shapes: P prompts, and N answer tokens of a micro-batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slm.tasks.sequences import Example, answer
from slm.training.batches import Batch, PackedBatches, pack
from slm.training.config import TrainingError
from slm.training.preference.losses import clipped_policy_loss, group_advantages, kl_estimate
from slm.training.preference.reference import Reference, answer_log_probabilities
from slm.training.preference.trainer import OneTask, PreferenceTrainer
from slm.training.trainer import Objective


@dataclass(frozen=True)
class Drawn:
    """An answer that a model has drawn, its prompt before it, and what it is worth."""

    example: Example
    reward: float


# From the model in eval mode, the step, and numbers of prompts to the answers of each.
Rollout = Callable[[nn.Module, int, np.ndarray], list[list[Drawn]]]


class PromptSamples(OneTask):
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
        """The step's micro-batches, drawn where its turn is, and how many answers they hold, ().

        Raises:
            TrainingError: The training goes on at a step that learns from answers which an earlier step drew.
        """
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


def grpo_objective(
    rollout: Rollout, reference: Reference, *, clip: float, kl_weight: float, updates: int, temperature: float
) -> Objective:
    """GRPO as `slm.training.train.train` takes it, of `PromptSamples`; the arguments are those of `GRPOTrainer`."""
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
