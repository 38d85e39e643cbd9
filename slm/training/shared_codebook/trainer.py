"""Fine-tuning with a loss that brings a recording and its transcript to the same units of one codebook.

After DCMA (Wang et al. 2022, arXiv 2210.09556), where speech and text pass through a shared memory and a shared
discrete vocabulary and the loss aligns their units, so that a decoder that has learnt to translate text translates
speech. There the decoder reads nothing else; a decoder-only LLM reads its prompt, so here the codebook only looks at
the states of a layer and pulls them together. It is a part of the training: the model that comes out has none.

Shapes: N pairs of a micro-batch, M slots, V entries.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from slm.model.parts import attach
from slm.patterns import LATE
from slm.training.batches import Batch
from slm.training.config import TrainingConfig, TrainingError
from slm.training.shared_codebook.codebook import SharedCodebook, agreement, alignment_loss
from slm.training.shared_codebook.config import SharedCodebookConfig
from slm.training.shared_codebook.pairs import ASR, KEY, layer_states, pairs_of, speech_states, text_states
from slm.training.trainer import Objective, SpeechTrainer, bare_model
from slm.vocabulary import SpeechVocabulary

NAME = "shared_codebook"  # of the submodule, while it is trained


class SharedCodebookTrainer(SpeechTrainer):
    """A `SpeechTrainer` that adds `loss_weight` times the mean alignment loss of a pair, over the step's pairs.

    Args:
        vocabulary: Which ids are speech.
        shared: Layer, sizes and weight.

    Raises:
        TrainingError: The model has no such layer, or there are several processes.
    """

    def __init__(self, *args: Any, vocabulary: SpeechVocabulary, shared: SharedCodebookConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.world_size > 1:
            raise TrainingError(f"{KEY}: in one process alone, for each batch's own units are told apart")
        self.vocabulary, self.shared = vocabulary, shared
        self.bare = bare_model(self.model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.args.seed)
            width = self.bare.get_input_embeddings().weight.shape[1]
            attach(self.bare, NAME, SharedCodebook(width, shared.slots, shared.entries))
        with layer_states(self.bare, shared.layer):  # that there is such a layer
            pass
        self._summed: Tensor | None = None  # of the micro-batch
        self._step_pairs = 1

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; afterwards the model is one without the codebook."""
        try:
            return super().train(*args, **kwargs)
        finally:
            delattr(self.bare, NAME)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Batch], Tensor]:
        """As of `SpeechTrainer`; the pairs of the step are counted beside its answer tokens."""
        batches, total = super().get_batch_samples(*args, **kwargs)
        self._step_pairs = max(1, sum(len(pairs_of(batch, self.vocabulary)) for batch in batches))
        return batches, total

    def _added_loss(self) -> Tensor | None:
        """That of the pairs, over the whole optimizer step."""
        return None if self._summed is None else self.shared.loss_weight * self._summed / self._step_pairs

    def _weighted_sum(self, model: nn.Module, inputs: Batch) -> tuple[Tensor, Any]:
        self._summed = self._beside = None
        pairs = pairs_of(inputs, self.vocabulary)
        if not pairs:
            return super()._weighted_sum(model, inputs)
        with layer_states(self.bare, self.shared.layer) as states:
            found = super()._weighted_sum(model, inputs)
        codebook: SharedCodebook = getattr(self.bare, NAME)
        speech = codebook(*speech_states(states[0], pairs))
        text = codebook(*text_states(self.bare, self.vocabulary, pairs, self.shared.layer))
        (losses, matched), agreed = alignment_loss(speech, text), agreement(speech, text)
        self._summed = losses.sum()
        if model.training:
            self.note(shared_codebook_loss=losses, shared_codebook_matched=matched, shared_codebook_agreement=agreed)
        else:
            sums = torch.stack([losses.sum(), matched.sum(), agreed.sum()])
            self._beside = torch.stack([sums, torch.full_like(sums, len(pairs))]).double().cpu()
        return found

    def _further_figures(self, beside: Tensor) -> dict[str, float]:
        """Means over pairs: the loss, whether the text finds its recording, slots with one unit on both sides."""
        if not beside[1, 0]:  # another task
            return {}
        names = ("loss", "matched", "agreement")
        return {f"shared_codebook_{name}": x for name, x in zip(names, (beside[0] / beside[1]).tolist(), strict=True)}


def check_shared_codebook(config: TrainingConfig, pattern: str, tasks: set[str]) -> None:
    """Refuses a shared codebook where there is nothing to share, or with what it has not been shown to work with.

    Args:
        config: Of the training.
        pattern: Of codes in the sequence.
        tasks: Names of the tasks that are trained.

    Raises:
        TrainingError: Pattern `delay` or `parallel`, an engine that shards, another objective, or no ASR.
    """
    if config.shared_codebook is None:
        return
    if pattern in LATE:
        raise TrainingError(f"{KEY}: not with pattern={pattern}, which has an objective of its own")
    for key in ("deepspeed", "fsdp", "gradient_checkpointing", "multi_token", "alignment"):
        if getattr(config, key):
            raise TrainingError(f"{KEY}: not with training.{key}; leave one of them out")
    if ASR not in tasks:
        raise TrainingError(
            f"{KEY}: its pairs are the recordings and texts of task {ASR}, which task_weights leaves out; add it"
        )


def shared_codebook_objective(vocabulary: SpeechVocabulary, config: SharedCodebookConfig) -> Objective:
    """What `slm.training.train.train` minimises with a shared codebook."""
    return Objective(functools.partial(SharedCodebookTrainer, vocabulary=vocabulary, shared=config))
